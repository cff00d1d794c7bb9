"""Scorers against transformers' own path and numpy, with tiny random networks; transforms against Pillow's."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import toy
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from toy import quiet  # noqa: F401
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval.metrics import aesthetic_score, clip_score, hf_ratio, pick_score, sharpness
from eval.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    clip_pil224,
    hps_letterbox224_aa,
    hps_letterbox224_noaa,
    normalise,
    openai_pil224,
    to_tensor,
)
from pso.config import import_module, load
from pso.miniature import world
from pso.miniature.judges import new_head
from pso.miniature.text import WINDOW

# rewards only; files of their own have likeness, ImageReward, HPS and what compares with other pictures
ELSEWHERE = ("spm_", "clip_t", "clip_i", "dino", "image_reward", "hps_", "drift", "diversity", "sharpness_ratio")
METRICS = {name: entry for name, entry in load().metrics.items() if not name.startswith(ELSEWHERE)}
CAPTIONS = list(world.OF_CAPTION)[::40]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return toy.clip_files(tmp_path_factory.mktemp("clip"))["model"]


@pytest.fixture(scope="module")
def quick_clip(tmp_path_factory):
    """As OpenAI's: QuickGELU."""
    return toy.clip_files(tmp_path_factory.mktemp("clip"), "quick_gelu")["model"]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The five layers of an aesthetic head and their file."""
    torch.manual_seed(1)
    layers = new_head(32)
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, path)
    return layers, path


@pytest.fixture
def files(clip):
    return {"model": clip, "processor": clip}


@pytest.fixture
def rated(quick_clip, head):
    """Files of the aesthetic score."""
    return {"model": quick_clip, "processor": quick_clip, "head": head[1]}


@pytest.fixture
def scorer(files):
    return pick_score.load(files, "cpu")


@pytest.fixture(scope="module")
def pictures():
    return toy.pictures(len(CAPTIONS))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- the contract ----


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_it_is_and_gives_one_number_per_picture(name, files, rated, pictures):
    found = import_module(METRICS[name].module, name).load(
        rated if name == "aesthetic_score" else files, "cpu", **METRICS[name].settings
    )
    assert isinstance(found.spec, dict) and json.loads(json.dumps(found.spec)) == found.spec
    assert found.spec["output"]
    scores = found.score(pictures, CAPTIONS)
    assert scores.shape == (len(pictures),) and scores.dtype == torch.float32 and torch.isfinite(scores).all()


@pytest.mark.parametrize("name", METRICS)
def test_a_score_does_not_depend_on_order_or_batch(name, files, rated, pictures):
    found = import_module(METRICS[name].module, name).load(
        rated if name == "aesthetic_score" else files, "cpu", **METRICS[name].settings
    )
    together = found.score(pictures, CAPTIONS)
    order = np.random.default_rng(0).permutation(len(pictures))
    shuffled = found.score([pictures[i] for i in order], [CAPTIONS[i] for i in order])
    alone = torch.cat([found.score([i], [c]) for i, c in zip(pictures, CAPTIONS, strict=True)])
    assert torch.allclose(shuffled, together[order], rtol=1e-5, atol=1e-5)
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)


# ---- CLIP ----


def by_transformers(folder, images, prompts) -> torch.Tensor:
    """Cosines by transformers' processor and whole forward pass."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image
    return logits.diagonal() / model.logit_scale.exp()


def test_the_score_is_the_cosine_that_transformers_computes(clip, scorer, pictures):
    expected = by_transformers(clip, pictures, CAPTIONS)
    assert torch.allclose(scorer.score(pictures, CAPTIONS), expected.detach(), atol=1e-5)
    assert expected.std() > 1e-3, "the random network tells the pictures apart"


def test_pictures_of_other_sizes_are_scored_as_transformers_does(clip, scorer):
    images = [noise(64, 48), noise(48, 64), noise(200, 200), noise(20, 30)]
    prompts = CAPTIONS[: len(images)]
    assert torch.allclose(scorer.score(images, prompts), by_transformers(clip, images, prompts).detach(), atol=1e-5)


def test_the_score_depends_on_picture_and_prompt(scorer, pictures):
    base = scorer.score([pictures[0]], [CAPTIONS[0]])
    assert (scorer.score([pictures[1]], [CAPTIONS[0]]) - base).abs() > 1e-4
    assert (scorer.score([pictures[0]], [CAPTIONS[1]]) - base).abs() > 1e-4


def test_duplicates_have_the_same_score(scorer, pictures):
    scores = scorer.score([pictures[0], pictures[1], pictures[0]], [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert scores[0] == pytest.approx(scores[2].item(), abs=1e-6)


def test_each_prompt_is_encoded_once(scorer, pictures, monkeypatch):
    seen, encode = [], scorer.model.get_text_features

    def counted(input_ids, **more):
        seen.extend(map(tuple, input_ids.tolist()))
        return encode(input_ids=input_ids, **more)

    monkeypatch.setattr(scorer.model, "get_text_features", counted)
    scorer.score(pictures[:3], ["a", "b", "a"])
    scorer.score(pictures[:3], ["b", "c", "a"])
    assert len(seen) == len(set(seen)) == 3


def test_kept_text_features_change_nothing(scorer, files, pictures):
    first = scorer.score(pictures, CAPTIONS)
    assert torch.equal(scorer.score(pictures, CAPTIONS), first)
    assert torch.allclose(pick_score.load(files, "cpu").score(pictures[:2], CAPTIONS[:2]), first[:2], atol=1e-6)


def test_a_prompt_beyond_the_window_is_cut_and_ends_with_the_end(scorer, pictures):
    long = " ".join(["red"] * (WINDOW - 2))
    first, second = (scorer.score([pictures[0]], [f"{long} {rest}"]) for rest in ("blue circle", "green cross on teal"))
    assert first.item() == pytest.approx(second.item(), abs=1e-5)
    assert scorer.tokenizer(long + " blue", truncation=True)["input_ids"][-1] == scorer.tokenizer.eos_token_id
    assert (scorer.score([pictures[0]], [f"red blue {long}"]) - first).abs() > 1e-3


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "日本語 ☃ é", "<|endoftext|>", "x" * 5000])
def test_odd_prompts_have_a_finite_score(scorer, pictures, prompt):
    assert -1 <= scorer.score([pictures[0]], [prompt]).item() <= 1


def test_the_empty_prompt_is_no_other_prompt(scorer, pictures):
    assert scorer.score([pictures[0]], [""]) != scorer.score([pictures[0]], ["red"])


@pytest.mark.parametrize("lost", [("vocab.json", "merges.txt", "tokenizer.json"), ()], ids=["files gone", "other size"])
def test_a_tokenizer_of_another_size_is_refused(clip, tmp_path, lost):
    size = len(CLIPTokenizer.from_pretrained(clip))
    shutil.copytree(clip, tmp_path / "other")
    for name in lost:
        (tmp_path / "other" / name).unlink()
    if not lost:
        tokenizer = CLIPTokenizer.from_pretrained(clip)
        tokenizer.add_tokens(["zzz"])
        tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"tokenizer in .*other has (2|{size + 1}) tokens; expected {size}"):
        pick_score.load({"model": clip, "processor": tmp_path / "other"}, "cpu")


def test_a_checkpoint_without_a_weight_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "other")
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"visual_projection\.weight"):
        pick_score.load({"model": tmp_path / "other", "processor": clip}, "cpu")


def test_a_checkpoint_in_half_precision_is_scored_in_float32(clip, tmp_path):
    CLIPModel.from_pretrained(clip).half().save_pretrained(tmp_path / "half")
    scorer = pick_score.load({"model": tmp_path / "half", "processor": clip}, "cpu")
    assert str(scorer.model.dtype) == f"torch.{scorer.spec['dtype']}"


def test_each_metric_has_the_official_transform(files):
    assert pick_score.load(files, "cpu").transform == "clip_pil224"
    assert clip_score.load(files, "cpu").transform == "hps_letterbox224_noaa"


# ---- the aesthetic head ----


def layer_by_layer(layers, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(layers).double().eval()(x.double())[:, 0]


def test_the_folded_head_is_its_five_layers_on_the_unit_embedding(rated, head, quick_clip, pictures):
    scorer = aesthetic_score.load(rated, "cpu")
    pixels = CLIPImageProcessorPil.from_pretrained(quick_clip)(images=pictures, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(quick_clip).eval()
    with torch.no_grad():
        embedded = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).double()
        expected = layer_by_layer(head[0], embedded / embedded.norm(dim=-1, keepdim=True))
        without_norm = layer_by_layer(head[0], embedded)
    found = scorer.score(pictures, CAPTIONS).double()
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - without_norm).abs().max() > 1e-3, "the norm matters"


def test_the_prompts_do_not_matter_to_the_rating(rated, pictures):
    scorer = aesthetic_score.load(rated, "cpu")
    assert torch.equal(scorer.score(pictures, CAPTIONS), scorer.score(pictures, CAPTIONS[::-1]))


@pytest.mark.parametrize("change", ["missing", "unexpected", "renamed"])
def test_a_head_with_other_keys_is_refused(rated, head, tmp_path, change):
    state = torch.load(head[1], weights_only=True)
    if change != "unexpected":
        state.pop("layers.7.bias")
    if change != "missing":
        state["layers.8.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth (lacks|has) \['layers\.[78]\.bias'\]"):
        aesthetic_score.load(rated | {"head": tmp_path / "other.pth"}, "cpu")


# ---- transforms ----

SIZES = [
    (227, 224),
    (229, 224),
    (224, 224),
    (300, 200),
    (200, 300),
    (1024, 1024),
    (640, 481),
    (481, 640),
    (512, 768),
    (50, 70),
    (225, 224),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_clip_pil_equals_transformers_bit_for_bit(size):
    image = noise(*size)
    assert torch.equal(
        clip_pil224(image), CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
    )


def test_openai_rounds_the_crop_as_torchvision_does_and_transformers_floors_it():
    image = noise(227, 224)  # 1.5 px too many on each side
    theirs = np.asarray(image)[:, 2 : 2 + 224]  # round(1.5) = 2, torchvision's center_crop
    assert torch.equal(openai_pil224(image), normalise(to_tensor(Image.fromarray(theirs))))
    other = CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(other, normalise(to_tensor(Image.fromarray(np.asarray(image)[:, 1 : 1 + 224]))))
    assert torch.equal(other, clip_pil224(image))


def test_clip_pil_resizes_to_the_official_width():
    image = noise(142, 71)
    assert torch.equal(
        clip_pil224(image), CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
    )


def test_clip_constants_are_openais():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert list(CLIP_MEAN) == list(OPENAI_CLIP_MEAN) and list(CLIP_STD) == list(OPENAI_CLIP_STD)


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((448, 224), (56, 168), (0, 224)), ((112, 224), (0, 224), (56, 168))]
)
def test_the_letterbox_pads_with_black_before_normalising(size, rows, columns):
    white = Image.new("RGB", size, (255, 255, 255))
    expected = np.zeros((224, 224, 3), np.uint8)
    expected[slice(*rows), slice(*columns)] = 255
    found = hps_letterbox224_noaa(white)
    assert torch.allclose(found, normalise(to_tensor(Image.fromarray(expected))), atol=1e-5)
    border = found[:, 0, 0]
    assert torch.allclose(border, -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)) and (border != 0).all()


def test_the_letterbox_puts_the_odd_row_below():
    found = hps_letterbox224_noaa(Image.new("RGB", (224, 221), (255, 255, 255)))  # 3 rows of padding: 1 above, 2 below
    black = (found == found[:, :1, :1]).all(dim=(0, 2)).nonzero()[:, 0].tolist()
    assert black == [0, 222, 223]


def test_the_letterbox_leaves_a_picture_of_its_own_size_alone():
    image = noise(224, 224)
    assert torch.equal(hps_letterbox224_noaa(image), normalise(to_tensor(image)))


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resized(level: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Bicubic along the last axis: a = -0.75 on 4 px, or a = -0.5 stretched over the scale."""
    length = level.shape[-1]
    scale = length / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    stretch, a = (max(scale, 1), -0.5) if antialias else (1, -0.75)
    at = np.arange(-8 * int(stretch + 1), length + 8 * int(stretch + 1))
    weight = cubic((at - centre[:, None]) / stretch, a)
    if antialias:  # weights outside the picture are dropped
        weight[:, (at < 0) | (at >= length)] = 0
    weight /= weight.sum(1, keepdims=True)
    return level[..., np.clip(at, 0, length - 1)] @ weight.T


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("side", [300, 512, 150])
def test_the_letterbox_is_bicubic_by_the_textbook(side, antialias):
    image = noise(side, side)
    level = np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255
    both = resized(resized(level, 224, antialias).transpose(0, 2, 1), 224, antialias).transpose(0, 2, 1)
    mean, std = (np.array(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    assert (
        np.abs((hps_letterbox224_aa if antialias else hps_letterbox224_noaa)(image).numpy() - (both - mean) / std).max()
        < 1e-3
    )  # positions in float32


def test_antialiasing_flattens_a_checkerboard_and_its_absence_does_not():
    board = Image.fromarray((np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    with_it, without = hps_letterbox224_aa(board), hps_letterbox224_noaa(board)  # off, as under torchvision 0.15.2
    assert with_it[0, 20:-20, 20:-20].std() < 0.05 and without[0, 20:-20, 20:-20].std() > 0.5


# ---- sharpness and high frequencies ----

BLURS = (0.0, 0.4, 0.6, 0.8, 1.2, 2.0, 4.0)


@pytest.mark.parametrize("metric", [sharpness, hf_ratio])
def test_blur_lowers_the_score_of_every_picture_step_by_step(metric, pictures):
    scorer = metric.load({}, "cpu")
    blurred = [[p.filter(ImageFilter.GaussianBlur(r)) if r else p for p in pictures] for r in BLURS]
    scores = torch.stack([scorer.score(images, CAPTIONS) for images in blurred])
    steps = slice(None) if metric is sharpness else slice(0, 5)  # 4 px raise hf_ratio to 1e-4: rounding to 8 bits
    assert (scores.diff(dim=0)[steps] < 0).all()


def test_sharpness_is_the_variance_of_the_laplacian(pictures):
    found = sharpness.load({}, "cpu").score(pictures, CAPTIONS)
    for picture, value in zip(pictures, found.tolist(), strict=True):
        grey = np.asarray(picture).astype(np.float64) @ [0.299, 0.587, 0.114]
        edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
        assert value == pytest.approx(edges.var(), rel=1e-4)


def test_sharpness_of_a_checkerboard_by_hand():
    board = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 10).astype(np.uint8)).convert("RGB")
    assert sharpness.load({}, "cpu").score([board], [""]).item() == pytest.approx(40.0**2, rel=1e-4)


def test_white_noise_has_the_share_of_the_plane_above_a_quarter():
    images = [noise(size, size, size) for size in (96, 128, 192)]
    found = hf_ratio.load({}, "cpu").score(images, [""] * 3)
    assert torch.allclose(found, torch.tensor(1 - np.pi * 0.25**2), atol=0.03)


@pytest.mark.parametrize(("frequency", "expected"), [(0.125, 0.0), (0.22, 0.0), (0.28, 1.0), (0.45, 1.0)])
def test_a_wave_counts_from_a_quarter_of_a_cycle_per_pixel(frequency, expected):
    wave = 127 + 100 * np.cos(2 * np.pi * frequency * np.arange(128))
    image = Image.fromarray(np.tile(wave, (128, 1)).round().astype(np.uint8)).convert("RGB")
    assert hf_ratio.load({}, "cpu").score([image], [""]).item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (77, 38, 178), (1, 200, 3)], ids=str)
def test_a_picture_of_one_colour_has_no_high_frequencies_and_no_edges(colour):
    image = Image.new("RGB", (48, 32), colour)
    for metric in (hf_ratio, sharpness):
        assert metric.load({}, "cpu").score([image], [""]).item() == pytest.approx(0, abs=1e-6)


def test_high_frequencies_are_a_share(pictures):
    found = hf_ratio.load({}, "cpu").score(pictures, CAPTIONS)
    assert ((found > 0) & (found < 1)).all()


def test_a_brighter_or_stronger_picture_has_the_same_share_of_high_frequencies():
    level = np.random.default_rng(0).integers(0, 100, (64, 64, 1)).repeat(3, -1)
    images = [Image.fromarray((a * level + b).astype(np.uint8)) for a, b in ((1, 0), (2, 0), (1, 100))]
    found = hf_ratio.load({}, "cpu").score(images, [""] * 3)
    assert torch.allclose(found, found[:1].expand(3), rtol=1e-4)


def test_luminance_is_rec_601():
    primaries = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    found = torch.stack([sharpness.luminance(p)[0, 0] for p in primaries]) / 255
    assert torch.allclose(found, torch.tensor([0.299, 0.587, 0.114]))
