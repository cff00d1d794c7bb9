"""CLIP-T, CLIP-I and DINO against computations of their own, on tiny random networks in the real files' formats."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from PIL import Image
from safetensors.torch import load_file, save_file
from test_metrics import by_transformers, noise, quick_clip  # noqa: F401
from toy import quiet  # noqa: F401
from transformers import CLIPModel, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval.metrics import clip_i, clip_t, dino
from eval.score import score_pictures
from eval.transforms import IMAGENET_MEAN, IMAGENET_STD, dino_256_224
from pso.config import import_module, load
from pso.dreambooth import IDENTIFIER
from pso.miniature import subjects, world

PROMPTS = ["a [V] circle on the left, teal background", "left: one [V] cross, backdrop black"]
TINY = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as of facebook/dino-vits16, its config's layer_norm_eps as wrong as the real one's."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(2)
    config = ViTConfig(**TINY, patch_size=4, image_size=32, initializer_range=0.3, layer_norm_eps=1e-12)
    model = ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    images, *_ = world.render_many(7, 5)
    return [Image.fromarray(image) for image in images]


# ---- CLIP-T ----


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (PROMPTS[0], "a circle on the left, teal background"),
        ("[V] circle, left side", "circle, left side"),
        ("a photo of a circle", "a photo of a circle"),
        ("a v circle [v]", "a v circle [v]"),  # only the identifier itself
        ("the circle [V]", "the circle"),
    ],
)
def test_the_identifier_is_taken_out_and_nothing_else(prompt, text):
    assert clip_t.stripped(prompt) == text


def test_the_identifier_is_that_of_the_prompts():
    assert clip_t.IDENTIFIER == IDENTIFIER


def test_clip_t_is_the_cosine_with_the_stripped_prompt(quick_clip, pictures):  # noqa: F811
    scorer = clip_t.load({"model": quick_clip, "processor": quick_clip}, "cpu")
    found = scorer.score(pictures[:2], PROMPTS)
    assert torch.allclose(
        found, by_transformers(quick_clip, pictures[:2], [clip_t.stripped(p) for p in PROMPTS]), atol=1e-6
    )
    assert (found - by_transformers(quick_clip, pictures[:2], PROMPTS)).abs().max() > 1e-4, "the identifier matters"
    assert scorer.spec["strip_identifier"] is True


# ---- CLIP-I ----


def clip_vectors(folder, images) -> torch.Tensor:
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_clip_i_is_the_mean_cosine_with_every_real_picture(quick_clip, pictures, count):  # noqa: F811
    made, real = pictures[:2], pictures[2 : 2 + count]
    found = clip_i.load({"model": quick_clip, "processor": quick_clip}, "cpu").score(made, PROMPTS, [real] * 2)
    one, other = clip_vectors(quick_clip, made), clip_vectors(quick_clip, real)
    by_hand = [np.mean([F.cosine_similarity(a, b, dim=0).item() for b in other]) for a in one]
    assert found.tolist() == pytest.approx(by_hand, abs=1e-6)


# ---- DINO ----


def by_hand(state: dict, x: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """A ViT's class token [B, D], from the weights by their published names; x [B, 3, H, W]."""

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, v):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return v * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["embeddings.patch_embeddings.projection.weight"]
    patches = F.unfold(x, kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2)
    tokens = patches @ kernel.flatten(1).T + state["embeddings.patch_embeddings.projection.bias"]
    tokens = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), tokens], 1)
    tokens = tokens + state["embeddings.position_embeddings"]
    layers = len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")})
    for block in (f"encoder.layer.{i}" for i in range(layers)):
        seen = norm(f"{block}.layernorm_before", tokens)
        q, k, v = (
            linear(f"{block}.attention.attention.{name}", seen).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + linear(f"{block}.attention.output.dense", (weights @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{block}.intermediate.dense", norm(f"{block}.layernorm_after", tokens)))
        tokens = tokens + linear(f"{block}.output.dense", inner)
    return norm("layernorm", tokens)[:, 0]


@pytest.mark.parametrize("count", [1, 5])
def test_dino_is_the_mean_cosine_of_class_tokens_with_every_real_picture(vit, pictures, count):
    made, real = pictures[:2], pictures[2 : 2 + count]
    state = load_file(vit / "model.safetensors")
    one, other = (
        by_hand(state, torch.stack([dino_256_224(image, 32) for image in images]), 3, 1e-6) for images in (made, real)
    )
    expected = [np.mean([F.cosine_similarity(a, b, dim=0).item() for b in other]) for a in one]
    found = dino.load({"model": vit}, "cpu").score(made, PROMPTS, [real] * 2)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_dino_has_the_epsilon_that_it_was_trained_with(vit, tmp_path):
    """Of tokens that hardly differ the normalisation is all epsilon."""
    shutil.copytree(vit, tmp_path / "flat")
    state = load_file(vit / "model.safetensors")
    flat = {k: v * (1e-4 if "embeddings" in k else 0 if "output.dense" in k else 1) for k, v in state.items()}
    save_file(flat, tmp_path / "flat" / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "flat" / "config.json").read_text())["layer_norm_eps"] == 1e-12
    scorer = dino.load({"model": tmp_path / "flat"}, "cpu")
    image = noise(32, 32)
    right, wrong = (by_hand(flat, dino_256_224(image, 32)[None], 3, eps) for eps in (1e-6, 1e-12))
    found = scorer.model(pixel_values=dino_256_224(image, 32)[None]).last_hidden_state[:, 0]
    assert torch.allclose(found, right, atol=1e-5) and not torch.allclose(right, wrong, atol=1e-2)
    assert scorer.spec["layer_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [((300, 200), (384, 256), (80, 16)), ((512, 512), (256, 256), (16, 16)), ((100, 101), (256, 258), (16, 17))],
)
def test_dinos_transform_resizes_to_256_and_crops_224(size, resized, box):
    image = noise(*size)
    left, top = box
    cut = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    expected = (np.asarray(cut, np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert np.allclose(dino_256_224(image).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_imagenets_constants_are_those_of_transformers():
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    assert list(IMAGENET_MEAN) == IMAGENET_DEFAULT_MEAN and list(IMAGENET_STD) == IMAGENET_DEFAULT_STD


@pytest.mark.parametrize("change", ["missing", "excess"])
def test_a_checkpoint_with_other_weights_is_refused(vit, tmp_path, change):
    shutil.copytree(vit, tmp_path / "other")
    state = load_file(vit / "model.safetensors")
    if change == "missing":
        del state["layernorm.weight"]
    else:
        state["head.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layernorm\.weight|head\.weight"):
        dino.load({"model": tmp_path / "other"}, "cpu")


# ---- the contract ----


@pytest.fixture
def scorers(quick_clip, vit):  # noqa: F811
    return {
        "clip_t": clip_t.load({"model": quick_clip, "processor": quick_clip}, "cpu"),
        "clip_i": clip_i.load({"model": quick_clip, "processor": quick_clip}, "cpu"),
        "dino": dino.load({"model": vit}, "cpu"),
    }


def test_only_likeness_to_pictures_asks_for_them(scorers, pictures):
    entries = load().metrics
    for name, scorer in scorers.items():
        scorer.compared_with = entries[name].compared_with  # as pso.models.load_metric does
        assert scorer.compared_with == (None if name == "clip_t" else "pictures")
        assert (getattr(scorer, "truncated", None) is not None) == (name == "clip_t"), "the others read no prompt"
        prompts = [PROMPTS[0]] * len(pictures)
        one, other = (
            score_pictures(pictures, prompts, {name: scorer}, real=real)[name] for real in (pictures[:2], pictures[3:])
        )
        assert one.shape == (len(pictures),) and one.dtype == "float64" and np.isfinite(one).all()
        assert one.equals(other) == (name == "clip_t")
        assert json.loads(json.dumps(scorer.spec)) == scorer.spec


@pytest.mark.parametrize("name", ["clip_t", "clip_i", "dino"])
def test_a_score_depends_on_no_other_picture(scorers, name, pictures):
    def score(images):
        more = ([pictures[:3]] * len(images),) if name != "clip_t" else ()
        return scorers[name].score(images, [PROMPTS[0]] * len(images), *more)

    together, alone = score(pictures), torch.cat([score([picture]) for picture in pictures])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(
        score(pictures[::-1]), together.flip(0), atol=1e-5
    )


# ---- the stand-in judges ----


def test_dinos_training_input_is_its_scorers_transform():
    from pso.miniature.common import pixels
    from pso.miniature.likeness import dino_input

    images = np.stack(subjects.pictures(next(iter(subjects.SUBJECTS.values())), 3, seed=1))
    expected = torch.stack([dino_256_224(Image.fromarray(image), 32) for image in images])
    error = (dino_input(pixels(images)) - expected).abs()
    assert error.mean() < 0.01, "Pillow rounds to whole grey levels and clips, nothing else differs"


def test_likeness_of_a_perfect_and_a_blind_judge():
    from pso.miniature.likeness import likeness

    count = len(subjects.SUBJECTS)
    numbers = iter(range(count))
    perfect = likeness(lambda x: F.one_hot(torch.tensor(next(numbers)), count).float().expand(len(x), -1))
    assert perfect == {"same_subject": 1.0, "other_subject": 0.0}
    assert likeness(lambda x: torch.eye(len(x))) == {"same_subject": 0.0, "other_subject": 0.083}  # 12 of 144


@pytest.mark.parametrize("name", ["clip_t", "clip_i"])
def test_a_variant_on_laions_vit_h_takes_gelu_and_refuses_openais(quick_clip, tmp_path, name):  # noqa: F811
    entry = load().metrics[f"{name}_h14"]
    module, gelu = import_module(entry.module, name), toy.clip_files(tmp_path)["model"]
    assert entry.checkpoint.repo == load().metrics["clip_score"].checkpoint.repo
    assert module.load({"model": gelu, "processor": gelu}, "cpu", **entry.settings).spec["output"]
    with pytest.raises(ValueError, match="hidden_act"):
        module.load({"model": quick_clip, "processor": quick_clip}, "cpu", **entry.settings)
