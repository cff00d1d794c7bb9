"""Every official file format through the real loader: it loads whole, and what is wrong with it is named."""

import json
import os
import shutil
from pathlib import Path

import formats
import pytest
import torch
import toy
from diffusers import StableDiffusionXLPipeline
from formats import (
    BASE,
    DMD2,
    DPO,
    FORMATS,
    FULL,
    HALF,
    LCM,
    LORA_FILE,
    MAPO,
    QUERY,
    SPO,
    SPO_FILE,
    TURBO,
    VAE,
    escaped,
    policy,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from toy import quiet  # noqa: F401

from pso import lora_files, state_dicts, weights
from pso.entries import UNetSource
from pso.hub import Hub
from pso.provenance import UserError


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    return formats.build(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published, tmp_path) -> Path:
    """A hub of one's own; a file in it is to be unlinked before it is written."""
    return Path(shutil.copytree(published, tmp_path / "hub", copy_function=os.link))


every = pytest.mark.parametrize("kind", FORMATS, ids=str)
TORCH = [kind for kind in FORMATS if not kind.file.endswith(".safetensors")]


def refused(kind, hub) -> str:
    with pytest.raises(UserError) as caught:
        kind.load(hub)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and kind.file.split("/")[1] in text, text
    assert "fetch" in text
    return text


# ---- each format: whole, and with one fault ----


@every
def test_it_loads(kind, published):
    kind.load(published)


@every
def test_a_missing_key_is_named(kind, hub):
    state = kind.read(hub)
    del state[kind.key]
    kind.write(hub, state)
    text = refused(kind, hub)
    assert (kind.named or kind.key) in text and "lacks" in text


@every
def test_an_extra_key_is_named(kind, hub):
    state = kind.read(hub)
    state[f"{kind.key}.more"] = torch.zeros(2)
    kind.write(hub, state)
    text = refused(kind, hub)
    assert f"{kind.named or kind.key}.more" in text and "in excess" in text


@every
def test_a_key_of_another_shape_is_named_with_both(kind, hub):
    state = kind.read(hub)
    old = [*state[kind.key].shape]
    state[kind.key] = torch.zeros(*old, 2)
    kind.write(hub, state)
    text = refused(kind, hub)
    assert f"{kind.named or kind.key} of shape [{', '.join(map(str, [*old, 2]))}]; expected [" in text


@every
def test_whole_numbers_in_place_of_weights_are_named(kind, hub):
    if kind.key.endswith(".alpha"):
        pytest.skip("an alpha may be a whole number")
    state = kind.read(hub)
    state[kind.key] = state[kind.key].to(torch.int8)
    kind.write(hub, state)
    assert kind.key in (text := refused(kind, hub)) and "floating-point" in text


@every
@pytest.mark.parametrize("how", ["cut", "empty", "other"])
def test_a_file_that_is_cut_or_something_else_is_one_sentence(kind, hub, how):
    path = hub / kind.file
    content = path.read_bytes()
    path.unlink()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"version https://git-lfs"}[how])
    assert str(path) in refused(kind, hub)


RAN = []


def run(what: str) -> None:
    RAN.append(what)


class Code:
    def __reduce__(self):
        return (run, ("it",))


@pytest.mark.parametrize("kind", TORCH, ids=str)
@pytest.mark.parametrize("where", ["whole", "one"])
def test_a_pickle_with_code_is_refused_and_not_run(kind, hub, where):
    state = Code() if where == "whole" else {**kind.read(hub), "extra": Code()}
    kind.write(hub, state)
    text = refused(kind, hub)
    assert "a pickle with code" in text and "was not run" in text and "safetensors" in text
    assert RAN == []


def test_there_is_a_pickle_that_runs_where_it_is_let(tmp_path):
    torch.save(Code(), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert RAN.pop() == "it"


# ---- what arrives ----


def exactly(found: torch.nn.Module, state: dict) -> bool:
    own = found.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v.to(own[k])) for k, v in state.items())


@pytest.mark.parametrize(
    ("parts", "file"),
    [
        ({}, f"{BASE}/unet/{FULL}"),
        ({"base": TURBO}, f"{TURBO}/unet/{HALF}"),
        ({"unet": {"repo": DMD2, "file": "dmd2_sdxl_4step_unet_fp16.bin"}}, f"{DMD2}/dmd2_sdxl_4step_unet_fp16.bin"),
        ({"unet": {"repo": LCM}, "guidance_embedding": 8.0}, f"{LCM}/{HALF}"),
        ({"unet": {"repo": DPO, "subfolder": "unet"}}, f"{DPO}/unet/{HALF}"),
        ({"unet": {"repo": MAPO}}, f"{MAPO}/{FULL}"),
    ],
    ids=["base", "turbo", "dmd2", "lcm", "dpo", "mapo"],
)
def test_a_unet_has_exactly_the_numbers_of_its_file(published, parts, file):
    path = published / file
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    found = policy(published, **parts)
    assert exactly(found.unet, state) and found.unet.dtype == torch.float32
    assert not any(value.is_meta for part in (found.unet, found.pipeline.vae) for value in part.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_is_in_the_dtype_that_was_asked_for(published, dtype):
    entry = formats.ModelEntry(
        title="x", base=BASE, vae=VAE, sampler="renoise", grids={4: toy.TIMES}, guidance_scale=0.0, resolution=16,
        loras=[{"repo": SPO, "file": SPO_FILE}],
    )  # fmt: skip
    pipeline = formats.load_policy(entry, Hub(published), dtype, "cpu").pipeline
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    found = [{value.dtype for value in part.parameters()} for part in parts]
    assert found == [{dtype}, {torch.float16}, {dtype}, {dtype}]  # the VAE in the finer half
    assert not any(part.training for part in parts)


def by_hand(unet, state: dict, targets: list[str], alpha: float, names) -> dict:
    """W + alpha / rank * up down, in float64."""
    found = {key: value.double() for key, value in unet.state_dict().items()}
    for layer, weight in formats.adapted(unet, targets):
        down, up = (state[name].double() for name in names(layer))
        change = torch.einsum("or,r...->o...", up.flatten(1), down)
        found[f"{layer}.weight"] = weight.double() + alpha / len(down) * change
    return found


@pytest.mark.parametrize("style", ["kohya", "peft", "diffusers", "processor"])
def test_a_fused_lora_is_the_files_product_at_the_files_alpha(hub, style):
    unet = toy.pipeline().unet
    targets, alpha = (formats.ACCELERATION, formats.ALPHA) if style == "kohya" else (formats.ATTENTION, formats.RANK)
    state = formats.kohya(unet) if style == "kohya" else formats.of_diffusers(unet, style)
    (hub / "a/lora").mkdir(parents=True)
    save_file(state, hub / "a/lora" / LORA_FILE)
    keys = iter(state)  # in the order of the layers
    pairs = {}
    for layer, _ in formats.adapted(unet, targets):
        pairs[layer] = (next(keys), next(keys))
        if style == "kohya":
            next(keys)
    expected = by_hand(unet, state, targets, alpha, pairs.get)
    found = policy(hub, loras=[{"repo": "a/lora", "file": LORA_FILE}]).unet.state_dict()
    changed = 0
    for key, value in expected.items():
        assert torch.allclose(found[key].double(), value, atol=1e-5)
        changed += not torch.allclose(unet.state_dict()[key].double(), value, atol=1e-3)
    assert changed == len(pairs)


# ---- a folder's files ----


def base_unet(hub, repo: str, **more):
    return weights.load_unet(hub, UNetSource(repo=repo, **more), BASE, torch.float32)


def test_full_precision_is_taken_where_both_lie_there(hub):
    formats.unet(9).half().save_pretrained(hub / MAPO, variant="fp16")
    record = Hub(hub)
    assert exactly(base_unet(record, MAPO), load_file(hub / MAPO / FULL))
    assert {used["file"] for used in record.inputs()} == {"config.json", FULL}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_with_their_index_are_one_network(hub, variant):
    (hub / MAPO / FULL).unlink()
    formats.unet(9).save_pretrained(hub / MAPO, variant=variant, max_shard_size="500KB")
    record = Hub(hub)
    assert exactly(base_unet(record, MAPO), formats.unet(9).state_dict())
    shards = sorted((hub / MAPO).glob("*-of-*.safetensors"))
    assert len(shards) > 2 and {used["file"] for used in record.inputs()} >= {path.name for path in shards}
    shards[1].unlink()
    with pytest.raises(UserError, match=escaped("index", f"names {shards[1].name}, which does not lie beside it")):
        base_unet(record, MAPO)
    next((hub / MAPO).glob("*.index*.json")).unlink()
    with pytest.raises(UserError, match=escaped(f"has the shard {shards[0].name} and no {FULL}.index.json")):
        base_unet(record, MAPO)


def test_a_tensor_that_two_shards_have_is_refused(tmp_path):
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors has x, which another shard has too"):
        state_dicts.headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_without_config_or_weights_is_one_sentence(hub, part):
    folder = hub / BASE / part
    weight = next(folder.glob("*.safetensors"))
    weight.unlink()
    with pytest.raises(UserError, match=escaped(BASE, f"{folder} has neither {weight.name} nor", "fetch it again.")):
        policy(hub, vae=None)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=escaped(BASE, f"{folder} has no config.json", "fetch it again.")):
        policy(hub, vae=None)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=escaped(f"{BASE} has no folder {part}")):
        policy(hub, vae=None)


CONFIGS = [("unet/config.json", "_class_name", "AutoencoderKL"), ("vae/config.json", "_class_name", "VQModel"),
           ("text_encoder/config.json", "model_type", "t5"), ("text_encoder_2/config.json", "model_type", "bert"),
           ("model_index.json", "_class_name", "StableDiffusionPipeline")]  # fmt: skip


def edit(path, **changes) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(("file", "key", "value"), CONFIGS, ids=[c[0] for c in CONFIGS])
def test_a_config_of_another_class_is_refused(hub, file, key, value):
    edit(hub / BASE / file, **{key: value})
    with pytest.raises(UserError, match=escaped(BASE, f"{file} is of a {value}; expected", "fetch it again.")):
        policy(hub, vae=None)
    (hub / BASE / file).write_text("{")
    with pytest.raises(UserError, match=escaped(f"{file} is not JSON", "fetch it again.")):
        policy(hub, vae=None)


def test_a_vae_of_before_2023_loads(hub):
    path = hub / VAE / FULL
    state, old = load_file(path), {}
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for key, value in state.items():
        for now, then in names.items():
            key = key.replace(now, then)
        old[key] = value
    assert len(old.keys() - state.keys()) == 16
    path.unlink()
    save_file(old, path)
    assert exactly(policy(hub).pipeline.vae, state)
    path.unlink()
    save_file({key: value.clone() for key, value in (old | state).items()}, path)  # twice is once too often
    with pytest.raises(UserError, match=escaped(VAE, "attentions.0.key.bias", "in excess")):
        policy(hub)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_buffer_of_old_text_encoders_is_left_out(hub, part):
    path = hub / BASE / part / "model.safetensors"
    state = load_file(path)
    assert any(key.startswith("text_model.") for key in state)
    path.unlink()
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    policy(hub)


# ---- LoRAs: every tensor arrives ----


def with_lora(hub, state: dict, metadata: dict | None = None):
    (hub / "a/lora").mkdir(parents=True, exist_ok=True)
    save_file(state, hub / "a/lora" / LORA_FILE, metadata)
    return policy(hub, loras=[{"repo": "a/lora", "file": LORA_FILE}])


def lora_refused(hub, state: dict, *said: str) -> None:
    with pytest.raises(UserError, match=escaped("models.mine.loras[0] cannot be loaded (", *said)):
        with_lora(hub, state)


def test_a_layer_without_its_lora_is_named(hub):
    """A layer's tensors lost together leave no half behind; that its kind is adapted elsewhere tells."""
    for state, layer in (
        (formats.kohya(toy.pipeline().unet), "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2."),
        (formats.of_diffusers(toy.pipeline().unet, "peft"), f"unet.{QUERY}."),
    ):
        lora_refused(hub, {k: v for k, v in state.items() if not k.startswith(layer)}, "lacks", layer)


def test_a_lora_of_two_kinds_of_names_is_refused(hub):
    both = {style: formats.of_diffusers(toy.pipeline().unet, style) for style in ("peft", "diffusers")}
    half = len(both["peft"]) // 2
    mixed = dict([*list(both["peft"].items())[: half + 2], *list(both["diffusers"].items())[half + 2 :]])
    lora_refused(hub, mixed, "lacks", "lora_A.weight", "lora.down.weight", "in excess")


@pytest.mark.parametrize("key", ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "x.dora_scale"])
def test_what_is_not_for_the_unet_is_named(hub, key):
    lora_refused(hub, formats.kohya(toy.pipeline().unet) | {key: torch.zeros(4, 8)}, key, "in excess")


def test_a_lora_of_no_known_names_is_refused(hub):
    plain = {k.removeprefix("unet."): v for k, v in formats.of_diffusers(toy.pipeline().unet, "peft").items()}
    lora_refused(hub, plain, "in excess", f"(the first 3 of {len(plain)})")


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([0.5]), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_an_alpha_may_be_of_any_type(hub, alpha):
    state = formats.kohya(toy.pipeline().unet)
    expected = formats.kohya(toy.pipeline().unet, alpha=alpha.item())
    found = with_lora(hub, {k: alpha.clone() if k.endswith(".alpha") else v for k, v in state.items()})
    assert exactly(with_lora(hub, expected).unet, found.unet.state_dict())


def test_ranks_of_their_own_arrive_and_alphas_are_not_lost_silently(hub):
    """diffusers 0.42 applies one alpha to all attention layers of a file of kohya's, with a warning at most."""
    unet = toy.pipeline().unet
    expected, state = {key: value.double() for key, value in unet.state_dict().items()}, {}
    for i, (layer, weight) in enumerate(formats.adapted(unet, formats.ACCELERATION)):
        rank = (2, 5, 8)[i % 3]
        stem, (down, up) = "lora_unet_" + layer.replace(".", "_"), formats.factors(weight, rank, i)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(0.5)}
        change = torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
        expected[f"{layer}.weight"] += 0.5 / rank * change
    found = with_lora(hub, state).unet.state_dict()
    assert all(torch.allclose(found[key].double(), value, atol=1e-5) for key, value in expected.items())
    one = f"lora_unet_{QUERY.replace('.', '_')}.alpha"
    with pytest.raises(UserError, match=escaped("did not put", ".alpha", "where it belongs")):
        with_lora(hub, state | {one: torch.tensor(3.0)})


@pytest.mark.parametrize("fault", ["scale", "number", "layer"])
def test_a_loader_that_loses_something_is_noticed(hub, monkeypatch, fault):
    """diffusers' own door, made to do what versions of it have done: forget an alpha, a tensor, a layer."""
    real = StableDiffusionXLPipeline.load_lora_weights

    def careless(self, *arguments, adapter_name, **options):
        real(self, *arguments, adapter_name=adapter_name, **options)
        module = self.unet.get_submodule(QUERY)
        if fault == "scale":
            module.scaling[adapter_name] = 1.0
        if fault == "number":
            module.lora_B[adapter_name].weight.data.zero_()
        if fault == "layer":
            module.scaling.pop(adapter_name)

    monkeypatch.setattr(StableDiffusionXLPipeline, "load_lora_weights", careless)
    said = {"scale": "did not put", "number": "did not put", "layer": f"the first is {QUERY}"}[fault]
    lora_refused(hub, formats.kohya(toy.pipeline().unet), said)


def test_a_scale_without_alpha_is_noticed(hub, monkeypatch):
    real = StableDiffusionXLPipeline.load_lora_weights

    def careless(self, *arguments, adapter_name, **options):
        real(self, *arguments, adapter_name=adapter_name, **options)
        self.unet.get_submodule(QUERY).scaling[adapter_name] = 0.125

    monkeypatch.setattr(StableDiffusionXLPipeline, "load_lora_weights", careless)
    said = f"has no alpha, but {QUERY} was scaled by 0.125; expected 1"
    with pytest.raises(UserError, match=escaped(said)):
        with_lora(hub, formats.of_diffusers(toy.pipeline().unet, "diffusers"))


def test_the_kinds_of_layers():
    names = lora_files.layers(toy.pipeline().unet)
    kinds = {lora_files.kind(name) for name in names}
    assert {"resnets.conv1", "attentions.transformer_blocks.attn1.to_out.0", "downsamplers.conv", "conv_in"} <= kinds
    assert not any("_block" in kind.replace("transformer_blocks", "") for kind in kinds)


# ---- what the samplers assume of the base ----

SCHEDULE = [("prediction_type", "v_prediction"), ("num_train_timesteps", 500), ("beta_end", 0.02),
            ("beta_schedule", "linear"), ("rescale_betas_zero_snr", True)]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SCHEDULE, ids=[key for key, _ in SCHEDULE])
def test_a_base_of_another_schedule_is_refused(hub, key, value):
    edit(hub / BASE / "scheduler/scheduler_config.json", **{key: value})
    said = f"{key} in scheduler/scheduler_config.json of {BASE} is {value!r}, and the samplers here assume"
    with pytest.raises(UserError, match=escaped(said, "take a base model")):
        policy(hub)


def test_a_vae_of_other_latents_is_refused(hub):
    edit(hub / VAE / "config.json", scaling_factor=0.18215)
    with pytest.raises(UserError, match=escaped(f"{VAE} is 0.18215, and {BASE} was trained with 0.13025")):
        policy(hub)


def test_a_text_encoder_that_the_unet_is_not_made_for_is_refused(hub):
    formats.unet(0, projection_class_embeddings_input_dim=15 + 48).save_pretrained(hub / "a/narrow")
    with pytest.raises(UserError, match=escaped("text_encoder_2", "64 numbers", "63", "belong together")):
        policy(hub, unet={"repo": "a/narrow"})
