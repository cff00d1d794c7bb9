"""What scorers share: one model per checkpoint, and in a batch what they make of the same pictures."""

import gc

import pytest
import torch
import toy
from test_metrics import CAPTIONS
from toy import quiet  # noqa: F401
from transformers import CLIPModel

from eval import checkpoints, transforms
from eval.clip_model import as_open_clip, load_clip
from eval.metrics import clip_score, pick_score

NAMES = ("pick_score", "clip_score")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.clip_files(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    return toy.pictures(len(CAPTIONS))


# ---- one model per checkpoint ----


def test_scorers_of_one_checkpoint_hold_one_model(files):
    assert pick_score.load(files, "cpu").model is clip_score.load(files, "cpu").model


def test_a_model_goes_with_its_last_scorer(files):
    checkpoints._loaded.clear()
    scorer = pick_score.load(files, "cpu")
    assert len(checkpoints._loaded) == 1
    del scorer
    gc.collect()
    assert len(checkpoints._loaded) == 0


@pytest.mark.parametrize("wrong", ["quick_gelu", "relu"])
def test_a_checkpoint_whose_config_names_another_activation_is_refused(files, wrong):
    with pytest.raises(ValueError, match=rf"text_config\.hidden_act in .*config\.json is 'gelu'; expected '{wrong}'"):
        load_clip(files["model"], wrong, "cpu")


def test_it_matters(files, pictures, tmp_path):
    """The same weights under the other activation: the difference is far above that of any tuning."""
    config = CLIPModel.config_class.from_pretrained(files["model"])
    for part in (config.text_config, config.vision_config):
        part.hidden_act = "quick_gelu"
    CLIPModel.from_pretrained(files["model"], config=config).save_pretrained(tmp_path)
    right = load_clip(files["model"], "gelu", "cpu").get_image_features(pixel_values=torch.ones(1, 3, 32, 32))
    wrong = load_clip(tmp_path, "quick_gelu", "cpu").get_image_features(pixel_values=torch.ones(1, 3, 32, 32))
    assert (right.pooler_output - wrong.pooler_output).abs().max() > 1e-3


# ---- one batch ----


@pytest.fixture
def calls(files, monkeypatch):
    """Number of pictures that the vision network has seen and that transforms have resized."""
    counts = {"network": 0, "resized": 0}
    scorers = {"pick_score": pick_score.load(files, "cpu"), "again": pick_score.load(files, "cpu")}
    features, crop = scorers["pick_score"].model.get_image_features, transforms.centre

    def counted(pixel_values):
        counts["network"] += len(pixel_values)
        return features(pixel_values=pixel_values)

    def cropped(*args):
        counts["resized"] += 1
        return crop(*args)

    monkeypatch.setattr(scorers["pick_score"].model, "get_image_features", counted)
    monkeypatch.setattr(transforms, "centre", cropped)
    return scorers, counts


def test_in_a_batch_pictures_are_made_and_seen_once(calls, pictures):
    scorers, counts = calls
    with transforms.one_batch():
        found = [scorer.score(pictures, CAPTIONS) for scorer in scorers.values()]
    assert counts == {"network": len(pictures), "resized": len(pictures)} and torch.equal(*found)
    outside = [scorer.score(pictures, CAPTIONS) for scorer in scorers.values()]
    assert counts == {"network": 3 * len(pictures), "resized": 3 * len(pictures)} and torch.equal(outside[0], found[0])


def test_other_pictures_in_the_same_batch_are_other_pictures(calls, pictures):
    scorer, _ = calls[0]["pick_score"], calls[1]
    with transforms.one_batch():
        all_of_them, two = scorer.image_features(pictures), scorer.image_features(pictures[:2])
        turned = scorer.image_features(pictures[::-1])
    assert two.shape[0] == 2 and torch.allclose(two, all_of_them[:2], atol=1e-6)
    assert torch.allclose(turned, all_of_them.flip(0), atol=1e-6) and not torch.allclose(turned, all_of_them)


def test_two_transforms_of_one_model_are_not_mixed(files, pictures):
    grown = [picture.resize((48, 40)) for picture in pictures]
    alone = {name: pick_score.load(files, "cpu") for name in NAMES[:1]}
    alone["clip_score"] = clip_score.load(files, "cpu")
    expected = {name: scorer.score(grown, CAPTIONS) for name, scorer in alone.items()}
    with transforms.one_batch():
        found = {name: scorer.score(grown, CAPTIONS) for name, scorer in alone.items()}
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert (found["pick_score"] - found["clip_score"]).abs().max() > 1e-5


# ---- text ----


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("A  Red\n\tFox ", "a red fox"),
        ("the conductor\u2019s \u201chat\u201d", 'the conductor\'s "hat"'),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("schÃ¶n", "schön"),  # text that was decoded wrongly
        ("ＡＢＣ！", "abc!"),  # full width
        ("", ""),
    ],
)
def test_open_clip_mends_a_text_before_it_cuts_it(prompt, seen):
    assert as_open_clip(prompt) == seen


def test_clip_score_sees_the_mended_text_and_pick_score_the_prompt(files, pictures):
    picture = pictures[:1]
    mended, plain = clip_score.load(files, "cpu"), pick_score.load(files, "cpu")
    assert mended.score(picture, ["red &amp; blue"]) == mended.score(picture, ["red & blue"])
    assert plain.score(picture, ["red &amp; blue"]) != plain.score(picture, ["red & blue"])


@pytest.mark.parametrize("words", [1, 22, 23, 40])
def test_a_prompt_counts_as_cut_beyond_the_window(files, words):
    assert pick_score.load(files, "cpu").truncated(" ".join(["red"] * words)) == (words > 22)  # 24 with both ends
