"""Ours against scores that the official packages gave: same random checkpoints, same pictures, no package needed.

tests/golden/official_scores.json was made by the command and the versions that it names. The networks are built anew
here from their names. A wrong variant of a scorer, each of them a mistake that others made, misses those numbers.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from toy import quiet  # noqa: F401

from eval import clip_model, transforms
from eval.metrics import dino, image_reward
from eval.seeded import build
from eval.seeded_pictures import compared, digest_of, pairs
from eval.verify_scorers import CASES, FEW, TOLERANCE, entry_of
from pso.hub import Hub
from pso.models import load_metric
from pso.provenance import ROOT

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official_scores.json").read_text())
OF_CLIP_H = ("pick_score", "clip_score", "hps_v2", "hps_v21")
CLEAR = 10 * TOLERANCE  # a mistake shows by at least this much


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return build(tmp_path_factory.mktemp("seeded"))


@pytest.fixture(scope="module")
def pictures():
    return pairs(FEW)


def loaded(hub, key: str, **settings):
    name, entry = entry_of(key)
    return load_metric(name, entry.model_copy(update={"settings": {**entry.settings, **settings}}), Hub(hub), "cpu")


def error(scorer, key: str, pictures) -> float:
    """max |official - ours|."""
    _, images, prompts = pictures
    return (
        (scorer.score(images, prompts, *compared(scorer, images)) - torch.tensor(GOLDEN["scores"][key]))
        .abs()
        .max()
        .item()
    )


def test_the_pictures_are_those_that_were_scored(pictures):
    assert digest_of(pictures[1]) == GOLDEN["pictures"], "numpy or Pillow draws them otherwise: make the golden anew"
    assert {i.mode for i in pictures[1]} >= {"L", "P", "RGBA", "I;16", "LA", "1", "CMYK"}
    assert "" in pictures[2] and any("’" in p for p in pictures[2]) and max(map(len, pictures[2])) > 500


@pytest.mark.parametrize("key", CASES)
def test_ours_is_the_official_score(hub, pictures, key):
    assert error(loaded(hub, key), key, pictures) <= TOLERANCE
    assert torch.tensor(GOLDEN["scores"][key]).std() > 100 * CLEAR, "the network tells the pictures apart"


def test_every_learned_column_of_the_paper_has_golden_scores():
    names = {"pick_score", "clip_score", "image_reward", "aesthetic_score", "clip_t", "dino", "clip_i"}
    assert names <= set(GOLDEN["scores"]) == set(CASES)


# ---- mistakes ----


@pytest.mark.parametrize("key", CASES)
def test_bgr_is_another_score(hub, pictures, key, monkeypatch):
    right = transforms.to_tensor
    monkeypatch.setattr(transforms, "to_tensor", lambda image: right(image).flip(0))
    assert error(loaded(hub, key), key, pictures) > CLEAR


@pytest.mark.parametrize(
    "key", ["pick_score", "clip_score", "hps_v2", "hps_v21", "aesthetic_score", "clip_t", "clip_i"]
)
def test_the_other_gelu_is_another_score(hub, pictures, key):
    scorer = loaded(hub, key)
    model = getattr(scorer, "clip", scorer).model
    wrong = transformers.activations.QuickGELUActivation() if key in OF_CLIP_H else nn.GELU()
    for module in model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = wrong
    assert error(scorer, key, pictures) > CLEAR


@pytest.mark.parametrize(
    ("key", "transform"),
    [
        ("clip_score", "hps_letterbox224_aa"),
        ("clip_score_aa", "hps_letterbox224_noaa"),
        ("clip_score_pil", "clip_pil224"),
        ("clip_score_pil", "hps_letterbox224_aa"),
        ("hps_v2", "hps_letterbox224_aa"),
        ("hps_v2 (antialiased)", "hps_letterbox224_noaa"),
        ("hps_v21", "clip_pil224"),
    ],
)
def test_another_transform_is_another_score(hub, pictures, key, transform):
    assert error(loaded(hub, key, transform=transform), key, pictures) > CLEAR


@pytest.mark.parametrize("key", ["aesthetic_score", "clip_score", "clip_i"])
def test_features_without_unit_length_are_another_score(hub, pictures, key, monkeypatch):
    monkeypatch.setattr(clip_model.F, "normalize", lambda x, dim: x)
    assert error(loaded(hub, key), key, pictures) > CLEAR


@pytest.mark.parametrize("key", ["clip_score", "hps_v2", "clip_t"])
def test_transformers_tokens_alone_are_another_score(hub, pictures, key):
    scorer = loaded(hub, key)
    scorer.clean = str
    assert error(scorer, key, pictures) > CLEAR


def test_pick_score_has_transformers_tokens(hub, pictures):
    scorer = loaded(hub, "pick_score")
    scorer.clean = clip_model.as_open_clip
    assert error(scorer, "pick_score", pictures) > CLEAR


def sliced(tokenizer, window: int):
    """A tokenizer that does not cut; its ids are cut afterwards, so that the end-of-text is lost."""

    def call(texts, **options):
        if isinstance(texts, str):
            return tokenizer(texts)
        long = tokenizer(texts, padding="max_length", truncation=True, max_length=500, return_tensors="pt")
        return transformers.BatchEncoding({key: value[:, :window] for key, value in long.items()})

    return call


@pytest.mark.parametrize("key", ["pick_score", "clip_score", "hps_v2", "image_reward"])
def test_ids_sliced_after_tokenising_are_another_score(hub, pictures, key):
    scorer = loaded(hub, key)
    scorer.tokenizer = sliced(scorer.tokenizer, 35 if key == "image_reward" else 77)
    assert error(scorer, key, pictures) > CLEAR


def test_image_reward_as_a_decoder_is_another_score(hub, pictures):
    scorer = loaded(hub, "image_reward")
    text = scorer.text
    scorer.text = lambda **given: text(**{**given, "is_decoder": True})
    assert error(scorer, "image_reward", pictures) > CLEAR


def test_image_reward_with_another_epsilon_is_another_score(hub, pictures, monkeypatch):
    monkeypatch.setattr(image_reward, "VISION_EPS", 1e-5)  # transformers' default
    assert error(loaded(hub, "image_reward"), "image_reward", pictures) > CLEAR


def test_image_reward_without_its_mean_and_deviation_is_another_score(hub, pictures, monkeypatch):
    monkeypatch.setattr(image_reward, "MEAN", 0.0)
    assert error(loaded(hub, "image_reward"), "image_reward", pictures) > CLEAR


def test_image_reward_converts_to_rgb_after_resizing(hub, pictures, monkeypatch):
    monkeypatch.setitem(transforms.PRESETS, "openai_pil224", transforms.clip_pil224)
    assert error(loaded(hub, "image_reward"), "image_reward", pictures) > CLEAR


@pytest.mark.parametrize("eps", [1e-12, 1e-5], ids=["of the published config", "of other ViTs"])
def test_dino_with_another_epsilon_is_another_score(hub, pictures, eps, monkeypatch):
    monkeypatch.setattr(dino, "LAYER_NORM_EPS", eps)
    assert error(loaded(hub, "dino"), "dino", pictures) > CLEAR


def test_dino_squashed_to_224_is_another_score(hub, pictures, monkeypatch):
    from PIL import Image

    def squashed(image, size=224):
        small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return transforms.normalise(transforms.to_tensor(small), transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)

    monkeypatch.setitem(transforms.PRESETS, "dino_256_224", squashed)
    assert error(loaded(hub, "dino"), "dino", pictures) > CLEAR


# ---- choosing the implementation ----


def test_an_official_scorer_says_which_package_it_lacks(hub):
    if any(_installed(name) for name in ("hpsv2", "open_clip", "ImageReward")):
        pytest.skip("the official packages are installed here")
    from pso.provenance import UserError

    for key in ("clip_score", "image_reward", "hps_v2", "aesthetic_score"):
        name, entry = entry_of(key)
        chosen = entry.model_copy(update={"implementation": "official"})
        with pytest.raises(UserError, match=r"needs the module .* not installed; run in the env"):
            load_metric(name, chosen, Hub(hub), "cpu")


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_a_metric_without_an_official_implementation_is_refused(hub):
    from pso.config import ConfigError, load

    entry = load().metrics["sharpness"].model_copy(update={"implementation": "official"})
    with pytest.raises(ConfigError, match=r"metrics\.sharpness\.implementation .*eval\.official has no 'sharpness'"):
        load_metric("sharpness", entry, Hub(hub), "cpu")


def test_rows_of_the_two_implementations_are_never_taken_for_each_other(hub, monkeypatch):
    """An official scorer's spec names its packages, its code and that it is official."""
    from eval import official, official_packages

    spec = official_packages.spec("cosine", ("torch",), [], transform="clip_pil224")
    fake = SimpleNamespace(spec=spec, score=lambda images, prompts: None)
    monkeypatch.setattr(official, "pick_score", SimpleNamespace(load=lambda files, device: fake))
    name, entry = entry_of("pick_score")
    theirs = load_metric(name, entry.model_copy(update={"implementation": "official"}), Hub(hub), "cpu").spec
    ours = loaded(hub, "pick_score").spec
    assert theirs["implementation"] == "official" and "torch" in theirs["packages"]
    assert theirs["files"] == ours["files"] and theirs["code"] != ours["code"] and theirs != ours


@pytest.mark.parametrize("first", ["import pso", "import eval.metrics.sharpness", "pass"])
def test_a_torchvision_that_cannot_load_beside_this_torch_is_importable(tmp_path, first):
    """A stand-in that needs its operators' schemas, as PyPI's does, and has no compiled part that loads."""
    import subprocess
    import sys

    package = tmp_path / "torchvision"
    package.mkdir()
    code = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda dets, scores, iou: dets)\n"
    (package / "__init__.py").write_text(code)
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{first}\nassert 'torchvision' not in sys.modules\n"
    run += "import torchvision, torch; torch.ops.torchvision.qnms.default"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=ROOT)
    if first == "pass":
        assert "operator torchvision::nms does not exist" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
