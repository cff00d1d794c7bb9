"""The authors' own step-aware preference model: its file, its modulation, its sinusoid, its resizing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from PIL import Image
from transformers import CLIPModel

from baselines import released_preference_model as released
from eval.metrics import pick_score
from pso.config import load
from pso.miniature import world

CAPTIONS = list(world.OF_CAPTION)[::80]
LAYER = "model.vision_model.encoder.layers.{}.adaLN_modulation.1."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.clip_files(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    return toy.pictures(len(CAPTIONS))


def state_of(files, gate: float = 1.0, std: float = 0.0, bias_std: float = 0.0) -> dict[str, torch.Tensor]:
    """The authors' state dict around this CLIP: zero weights and gates of 1 are PickScore itself."""
    torch.manual_seed(1)
    clip = CLIPModel.from_pretrained(files["model"])
    width = clip.config.vision_config.hidden_size
    state = {f"model.{key}": value.clone() for key, value in clip.state_dict().items()}
    for name, inputs in (("0", 256), ("2", width)):
        state[f"model.t_embedder.mlp.{name}.weight"] = 0.02 * torch.randn(width, inputs)
        state[f"model.t_embedder.mlp.{name}.bias"] = torch.zeros(width)
    for place in (*(LAYER.format(i) for i in range(3)), "model.vision_model.adaLN_modulation.1."):
        parts = 2 if "layers" not in place else 6
        bias = bias_std * torch.randn(parts, width)
        bias[[2, 5] if parts == 6 else []] += gate
        state[f"{place}weight"] = std * torch.randn(parts * width, width)
        state[f"{place}bias"] = bias.flatten()
    return state


def scorer(files, path, **how) -> released.ReleasedScorer:
    torch.save(state_of(files, **how), path)
    return released.load({**files, "head": path}, "cpu")


@pytest.mark.parametrize("t", [0, 249, 999])
def test_without_modulation_it_is_pick_score(files, pictures, tmp_path, t):
    plain = pick_score.load(files, "cpu")
    expected = plain.model.logit_scale.exp() * plain.score(pictures, CAPTIONS)
    found = scorer(files, tmp_path / "spm.bin").score(pictures, CAPTIONS, t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    other = scorer(files, tmp_path / "spm.bin", gate=0.9).score(pictures, CAPTIONS, t)
    assert not torch.allclose(other, expected, rtol=1e-5, atol=1e-4)


def by_hand(files, state, x: torch.Tensor, t: int) -> torch.Tensor:
    """Unit features in float64, from the file's own names: arXiv 2406.04314's modulated layers written out."""
    clip = CLIPModel.from_pretrained(files["model"], attn_implementation="eager").double().eval()
    vision = clip.vision_model
    of = {key.removeprefix("model."): value.double() for key, value in state.items()}
    angles = float(t) * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    time = torch.cat([angles.cos(), angles.sin()])
    time = F.linear(time, of["t_embedder.mlp.0.weight"], of["t_embedder.mlp.0.bias"])
    time = F.linear(F.silu(time), of["t_embedder.mlp.2.weight"], of["t_embedder.mlp.2.bias"])

    def modulation(place: str, parts: int) -> torch.Tensor:
        key = f"{place}adaLN_modulation.1."
        return F.linear(F.silu(time), of[f"{key}weight"], of[f"{key}bias"]).reshape(parts, -1)

    h = vision.pre_layrnorm(vision.embeddings(x.double()))
    for i, layer in enumerate(vision.encoder.layers):
        m = modulation(f"vision_model.encoder.layers.{i}.", 6)
        h = h + m[2] * layer.self_attn(layer.layer_norm1(h) * (1 + m[1]) + m[0], attention_mask=None)[0]
        h = h + m[5] * layer.mlp(layer.layer_norm2(h) * (1 + m[4]) + m[3])
    shift, scale = modulation("vision_model.", 2)
    return F.normalize(clip.visual_projection(vision.post_layernorm(h[:, 0]) * (1 + scale) + shift), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 37, 999])
def test_features_are_those_of_the_formula(files, tmp_path, t):
    how = {"std": 0.5, "bias_std": 0.2}
    made = scorer(files, tmp_path / "spm.bin", **how)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found = made.modulation.image_features(made.base.model, x, t)
    torch.testing.assert_close(found.double(), by_hand(files, state_of(files, **how), x, t), rtol=1e-4, atol=1e-4)
    other = made.modulation.image_features(made.base.model, x, t + 50)
    assert (other - found).abs().max() > 1e-3


def test_the_file_brings_its_own_clip_and_scale(files, pictures, tmp_path):
    """The authors' file is a whole model: PickScore's weights are only its shape."""
    state = state_of(files)
    state["model.logit_scale"] = torch.tensor(2.0)
    state["model.text_projection.weight"] = -state["model.text_projection.weight"]
    torch.save(state, tmp_path / "spm.bin")
    made = released.load({**files, "head": tmp_path / "spm.bin"}, "cpu")
    plain = pick_score.load(files, "cpu")
    expected = -math.exp(2.0) * plain.score(pictures, CAPTIONS)
    torch.testing.assert_close(made.score(pictures, CAPTIONS, 5), expected, rtol=1e-4, atol=1e-4)
    assert made.spec["logit_scale"] == pytest.approx(math.exp(2.0), abs=1e-3) and made.step_aware


def test_pick_score_beside_it_keeps_its_own_weights(files, pictures, tmp_path):
    plain = pick_score.load(files, "cpu")
    before, state = plain.score(pictures, CAPTIONS), state_of(files)
    state["model.visual_projection.weight"] = state["model.visual_projection.weight"].flip(0)
    torch.save(state, tmp_path / "spm.bin")
    loaded = released.load({**files, "head": tmp_path / "spm.bin"}, "cpu")
    assert not torch.equal(loaded.base.model.visual_projection.weight, plain.model.visual_projection.weight)
    assert torch.equal(plain.score(pictures, CAPTIONS), before)


@pytest.mark.parametrize("fault", ["lacks", "foreign", "cut", "list"])
def test_every_key_has_to_find_its_place(files, tmp_path, fault):
    path, state = tmp_path / "spm.bin", state_of(files)
    state["model.vision_model.embeddings.position_ids"] = torch.arange(3)  # of old files, known and left out
    torch.save(state, path)
    released.load({**files, "head": path}, "cpu")
    if fault == "lacks":
        del state[f"{LAYER.format(1)}bias"]
    if fault == "foreign":
        state["model.vision_model.encoder.layers.9.adaLN_modulation.1.bias"] = torch.zeros(3)
    torch.save(list(state.values()) if fault == "list" else state, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"spm\.bin is not the authors' preference model \(.*\); fetch it again"):
        released.load({**files, "head": path}, "cpu")


@pytest.mark.parametrize("size", [(64, 64), (48, 32), (32, 40)])
def test_pictures_are_resized_as_tensors(size):
    """torch's own bicubic on the authors' range [-1, 1], then clamped and cut: not Pillow's, which smooths."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = released.resized(Image.fromarray(pixels), 32)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1
    scale = 32 / min(size)
    target = tuple(int(side * scale + 0.5) for side in reversed(size))
    x = (F.interpolate(x, target, mode="bicubic", align_corners=False) / 2 + 0.5).clamp(0, 1)[0]
    top, left = (target[0] - 32) // 2, (target[1] - 32) // 2
    x = x[:, top : top + 32, left : left + 32]
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    torch.testing.assert_close(found.double(), (x - mean) / std, rtol=1e-4, atol=1e-4)


def test_the_entry_names_this_module():
    entry = load().metrics["spm_released"]
    assert entry.module == released.__name__ and entry.head.file.startswith("sdxl_") and "paper" in entry.only_scales
