"""The official files of diffusion models at their real sizes, on the meta device: every key has its place.

Their keys come from the published networks (pso/architectures.py) and the naming of the official scripts (formats.py);
the numbers beside them are those of the published files.
"""

from pathlib import Path

import formats
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft

from baselines import released_preference_model as released
from pso import architectures, lora_files, state_dicts, weights

PATH = Path("the.file")


@pytest.fixture(scope="module")
def unet():
    return architectures.unet()


def numbers(state: dict) -> int:
    return sum(value.numel() for value in state.values())


def faults(state: dict, key: str) -> list[tuple[dict, str]]:
    """The state with one fault, and how the sentence about it begins."""
    less = {k: v for k, v in state.items() if k != key}
    misshapen = torch.empty(7, *state[key].shape, device="meta")
    return [
        (less, f"{PATH} lacks ['{key}']"),
        ({**state, f"{key}.more": state[key]}, f"{PATH} has ['{key}.more'] in excess"),
        ({**less, key: misshapen}, f"{PATH} has {key} of shape {[*misshapen.shape]}; expected {[*state[key].shape]}"),
        ({**less, key: state[key].to(torch.int8)}, f"{PATH} has {key} as int8; expected floating-point"),
    ]


# ---- networks ----

NETWORKS = {  # numbers in the published file; fp16 files have twice as many bytes and a head
    "DMD2's, DPO's, MaPO's and Turbo's UNet": (architectures.unet, 2_567_463_684, "conv_in.weight"),
    "LCM's UNet": (lambda: architectures.unet(True), 2_567_545_604, "time_embedding.cond_proj.weight"),
    "VAE": (architectures.vae, 83_653_863, "decoder.mid_block.attentions.0.to_q.weight"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_full_size_file_is_accounted_for(name):
    make, expected, key = NETWORKS[name]
    wanted = make().state_dict()
    published = {k: v.half() for k, v in wanted.items()}
    assert numbers(published) == expected
    state_dicts.check(published, wanted, PATH)
    for state, said in faults(published, key):
        with pytest.raises(ValueError) as caught:
            state_dicts.check(state, wanted, PATH)
        assert str(caught.value).startswith(said)


def test_lcms_file_is_no_state_dict_of_sdxls_unet(unet):
    told = architectures.unet(True).state_dict()
    key = "time_embedding.cond_proj.weight"
    assert told[key].shape == (320, 256)
    for state, wanted, word in ((told, unet.state_dict(), "in excess"), (unet.state_dict(), told, "lacks")):
        with pytest.raises(ValueError, match=rf"{key}.*{word}|{word}.*{key}"):
            state_dicts.check(state, wanted, PATH)


def test_the_vaes_names_of_before_2023_have_their_places():
    vae = architectures.vae()
    new = vae.state_dict()
    old = [key.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn.") for key in new]
    names = weights.present_names(old, vae)
    assert len(set(old) - set(new)) == 8 and sorted(names.values()) == sorted(new)


def test_the_text_encoders_have_the_published_sizes():
    found = [numbers(part.state_dict()) for part in architectures.text_encoders()]
    assert found == [123_060_480, 694_659_840]


# ---- LoRAs ----


def published_loras(unet) -> dict[str, tuple[dict, int, int]]:
    """File -> its tensors, how many a layer has, its published size in MB: of rank 64, in float16 and float32."""
    kohya = formats.kohya(unet, 64, 8)
    return {
        "DMD2 and LCM": (kohya, 3, 394),
        **{f"SPO by {s}": (formats.of_diffusers(unet, s, 64), 2, 372) for s in ("peft", "diffusers", "processor")},
    }


LORAS = ["DMD2 and LCM", "SPO by peft", "SPO by diffusers", "SPO by processor"]


@pytest.mark.parametrize("name", LORAS)
def test_every_key_of_a_full_size_lora_has_its_layer(unet, name):
    state, per_layer, megabytes = published_loras(unet)[name]
    place = lora_files.places(state, lora_files.layers(unet), PATH)
    assert place.keys() == state.keys()
    layers = {layer for layer, _ in place.values()}
    assert len(state) == per_layer * len(layers)
    assert len(layers) == (788 if per_layer == 3 else 560)
    assert round(sum(value.numel() * value.element_size() for value in state.values()) / 1e6) == megabytes
    parts = {layer: {part for at, part in place.values() if at == layer} for layer in list(layers)[:20]}
    assert all(len(found) == per_layer for found in parts.values())


@pytest.mark.parametrize("name", LORAS)
def test_diffusers_puts_a_full_size_lora_into_the_same_layers(unet, name):
    state = published_loras(unet)[name][0]
    place = lora_files.places(state, lora_files.layers(unet), PATH)
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=unet.config)
    found = {key.removeprefix("unet."): value for key, value in found.items()}
    if "lora_A" not in next(iter(found)):
        found = convert_unet_state_dict_to_peft(found)
    ends = {"down": "lora_A.weight", "up": "lora_B.weight"}
    ours = {f"{layer}.{ends[part]}": state[key].shape for key, (layer, part) in place.items() if part in ends}
    assert {key: value.shape for key, value in found.items()} == ours
    assert set((alphas or {}).values()) == ({8.0} if name == LORAS[0] else set())


@pytest.mark.parametrize("name", LORAS)
def test_a_full_size_lora_with_a_fault_is_refused_by_the_name_of_the_key(unet, name):
    state, layers = published_loras(unet)[name][0], lora_files.layers(unet)
    key = next(key for key in state if "up_blocks" in key and "attn2" in key and ("up.w" in key or "lora_B" in key))
    for wrong, said in faults(state, key):
        with pytest.raises(ValueError) as caught:
            lora_files.places(wrong, layers, PATH)
        assert str(caught.value).startswith(said)


def test_a_lora_for_lcms_unet_or_another_model_is_refused(unet):
    other = formats.unet(0)  # the toy's
    state = formats.of_diffusers(other, "peft", 64)
    with pytest.raises(ValueError, match=r"lacks .*|of shape"):
        lora_files.places(state, lora_files.layers(unet), PATH)


# ---- SPO's preference model ----


def test_every_tensor_of_the_full_size_preference_model_has_its_place():
    clip = architectures.clip("clip_h14")
    with torch.device("meta"):
        modulation = released.Modulation(clip)
    state = formats.preference_model(clip)
    wanted = released.published(clip, modulation)
    state_dicts.check(state, wanted, PATH)
    assert 1.30e9 < numbers(state) < 1.31e9  # ViT-H's 0.986 and about 6 x 1280^2 x 32 for the modulation
    key = "model.vision_model.encoder.layers.31.adaLN_modulation.1.weight"
    assert state[key].shape == (7680, 1280)
    for wrong, said in faults(state, key):
        with pytest.raises(ValueError) as caught:
            state_dicts.check(wrong, wanted, PATH)
        assert str(caught.value).startswith(said)
