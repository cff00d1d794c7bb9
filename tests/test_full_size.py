"""The published files at their real sizes, on the meta device: every key and shape has its place, nothing is left over.

What the files hold is written down in eval/seeded.py by the official codes' names; the networks are transformers'.
"""

import json

import pytest
import torch
from transformers import BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel

from eval import seeded
from eval.metrics.image_reward import UNUSED, text_config, text_name, vision_config, vision_name
from eval.open_clip_weights import load_open_clip, to_open_clip
from pso import architectures

VOCABULARY = 49408


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.fixture(scope="module")
def hps() -> dict[str, tuple[int, ...]]:
    """HPS_v2_compressed.pt, and open_clip's ViT-H-14."""
    return seeded.clip_shapes(*seeded.PUBLISHED[seeded.CLIP_H], VOCABULARY)


@pytest.mark.parametrize(
    ("name", "repo"), [("clip_h14", seeded.CLIP_H), ("clip_l14", seeded.CLIP_L), ("clip_b32", seeded.CLIP_B)]
)
def test_each_clip_in_transformers_has_the_official_tensors(name, repo):
    expected = seeded.clip_shapes(*seeded.PUBLISHED[repo], VOCABULARY)
    assert shapes(to_open_clip(architectures.clip(name).state_dict())) == expected


def test_the_sizes_of_seeded_checkpoints_are_those_of_the_published_ones():
    vision, text, width = seeded.PUBLISHED[seeded.CLIP_H]
    config = CLIPConfig.from_dict(seeded.clip_config(vision, text, width, VOCABULARY, 80, "gelu"))
    with torch.device("meta"):
        assert shapes(CLIPModel(config).state_dict()) == shapes(architectures.clip("clip_h14").state_dict())


@pytest.mark.parametrize("fault", ["lacks", "has", "shape"])
def test_a_full_size_hps_file_with_a_fault_is_refused_by_the_name_of_the_key(hps, fault, tmp_path):
    state = {key: torch.empty(shape, device="meta") for key, shape in hps.items()}
    key = "visual.transformer.resblocks.31.mlp.c_proj.weight"
    if fault == "has":
        state["visual.transformer.resblocks.32.mlp.c_proj.weight"] = state[key]
    else:
        state |= {key: state.pop(key).T} if fault == "shape" else {}
        state = state if fault == "shape" else {k: v for k, v in state.items() if k != key}
    config = architectures.clip("clip_h14").config
    with pytest.raises(ValueError, match=r"resblocks\.3[12]\.mlp\.c_proj\.weight"):
        load_open_clip(state, config, tmp_path / "HPS_v2_compressed.pt", "meta")


def test_every_tensor_of_a_full_size_image_reward_has_its_place(tmp_path):
    expected = seeded.image_reward_shapes(seeded.MED_CONFIG, *seeded.PUBLISHED_BLIP["vision"])
    state = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    (tmp_path / "med_config.json").write_text(json.dumps(seeded.MED_CONFIG))
    seen = vision_config(state, tmp_path / "ImageReward.pt")
    read = text_config(tmp_path / "med_config.json", seen.hidden_size)
    with torch.device("meta"):
        vision, text = BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)
    found = {vision_name(key): value for key, value in vision.state_dict().items()}
    found |= {text_name(key): value for key, value in text.state_dict().items()}
    rest = {key for key in expected if key not in found}
    assert {key: expected[key] for key in found} == shapes(found)
    assert rest - set(UNUSED) == {key for key in expected if key.startswith("mlp.")} and len(rest - set(UNUSED)) == 10
    for ours, theirs in zip((vision, text), architectures.image_reward(), strict=True):
        assert shapes(ours.state_dict()) == shapes(theirs.state_dict())


def test_the_guidance_embedding_is_all_that_lcms_unet_has_more():
    plain, lcm = (shapes(architectures.unet(flag).state_dict()) for flag in (False, True))
    assert {key: lcm[key] for key in lcm if key not in plain} == {"time_embedding.cond_proj.weight": (320, 256)}
    assert {key: lcm[key] for key in plain} == plain
