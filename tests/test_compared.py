"""Metrics that compare a picture with others: against numpy, and where a table can have their columns at all."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from synthetic import ROWS, config, metric, table
from test_likeness import by_hand, vit  # noqa: F401
from toy import quiet  # noqa: F401

from eval.compared import mean_cosine, mean_distance
from eval.metrics import dino, diversity, drift, sharpness_ratio
from eval.score import score_pictures
from eval.transforms import dino_256_224, one_batch
from pso.config import load
from pso.entries import DatasetEntry, Row
from pso.hub import Hub
from pso.models import load_metric
from pso.provenance import UserError
from pso.runs import Job, jobs, metric_missing, metrics, not_comparable

PROMPTS = ["a", "b", "a", "b", "a", "a"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.fixture(scope="module")
def blurred(pictures):
    return [picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures]


@pytest.fixture
def scorers(vit):  # noqa: F811
    found = {"drift": drift.load({"model": vit}, "cpu"), "diversity": diversity.load({"model": vit}, "cpu")}
    found["sharpness_ratio"] = sharpness_ratio.load({}, "cpu")
    for name, scorer in found.items():
        scorer.compared_with = load().metrics[name].compared_with
    return found


def cosine(vit, a: Image.Image, b: Image.Image) -> float:  # noqa: F811
    state = {key: value.double() for key, value in load_file(vit / "model.safetensors").items()}
    x = torch.stack([dino_256_224(image, 32).double() for image in (a, b)])
    return F.cosine_similarity(*by_hand(state, x, 3, 1e-6), dim=0).item()


def laplacian(image: Image.Image) -> float:
    grey = np.asarray(image.convert("RGB")).astype(np.float64) @ [0.299, 0.587, 0.114]
    edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return edges.var()


# ---- values ----


def test_drift_is_the_distance_to_the_untuned_picture_of_the_same_noise(scorers, pictures, blurred, vit):  # noqa: F811
    found = score_pictures(pictures, PROMPTS, {"drift": scorers["drift"]}, untuned=blurred)["drift"]
    expected = [1 - cosine(vit, a, b) for a, b in zip(pictures, blurred, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and min(expected) > 1e-3
    shifted = score_pictures(pictures, PROMPTS, {"drift": scorers["drift"]}, untuned=[*blurred[1:], blurred[0]])
    assert np.abs(shifted["drift"] - found).max() > 1e-3, "which picture it is compared with matters"


def test_nothing_drifts_from_itself(scorers, pictures):
    both = {name: scorers[name] for name in ("drift", "sharpness_ratio")}
    for untuned in (pictures, [picture.copy() for picture in pictures]):
        found = score_pictures(pictures, PROMPTS, both, untuned=untuned)
        assert set(found["drift"]) == {0.0} and set(found["sharpness_ratio"]) == {1.0}


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_diversity_is_the_mean_distance_to_the_prompts_other_pictures(scorers, pictures, vit, batch):  # noqa: F811
    found = score_pictures(pictures, PROMPTS, {"diversity": scorers["diversity"]}, batch=batch)["diversity"]
    for i, prompt in enumerate(PROMPTS):
        others = [j for j, other in enumerate(PROMPTS) if other == prompt and j != i]
        distances = [1 - cosine(vit, pictures[i], pictures[j]) for j in others]
        assert found[i] == pytest.approx(np.mean(distances), abs=1e-5) and found[i] > 1e-3


def test_one_picture_for_every_noise_has_no_diversity(scorers, pictures):
    same = [pictures["ab".index(prompt)].copy() for prompt in PROMPTS]
    assert score_pictures(same, PROMPTS, {"diversity": scorers["diversity"]})["diversity"].abs().max() < 1e-6


def test_prompt_ids_say_who_is_a_sibling(scorers, pictures):
    one = {"diversity": scorers["diversity"]}
    by_text = score_pictures(pictures, PROMPTS, one)
    assert score_pictures(pictures, ["x"] * 6, one, prompt_ids=PROMPTS).equals(by_text)
    assert not score_pictures(pictures, ["x"] * 6, one).equals(by_text)


def test_a_picture_without_siblings_is_a_sentence(scorers, pictures):
    one, names = {"diversity": scorers["diversity"]}, ["p0", "p1", "p2", "p3", "p4", "five"]
    with pytest.raises(UserError, match="diversity compares pictures of one prompt, and five is the only one"):
        score_pictures(pictures, [*PROMPTS[:5], "c"], one, names=names)


def test_sharpness_ratio_is_the_ratio_of_the_laplacians(scorers, pictures, blurred):
    one = {"sharpness_ratio": scorers["sharpness_ratio"]}
    found = score_pictures(blurred, PROMPTS, one, untuned=pictures)["sharpness_ratio"]
    expected = [laplacian(b) / laplacian(a) for a, b in zip(pictures, blurred, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4) and max(expected) < 0.2
    back = score_pictures(pictures, PROMPTS, one, untuned=blurred)["sharpness_ratio"]
    assert (found * back).tolist() == pytest.approx([1.0] * 6, rel=1e-5)


def test_a_flat_picture_counts_as_smooth_as_rounding_leaves_one(scorers, pictures):
    flat, other = Image.new("RGB", (36, 40), "teal"), Image.new("RGB", (36, 40), "red")
    one = {"sharpness_ratio": scorers["sharpness_ratio"]}
    found = score_pictures([flat, pictures[0]], ["a", "b"], one, untuned=[other, flat])["sharpness_ratio"]
    assert found.tolist() == pytest.approx([1.0, laplacian(pictures[0]) / (20 / 12)], rel=1e-4)
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    smooth = 127 + 100 * np.sin(x / 17.3 + (y / 23.1) ** 1.3 / 5) + 13 * np.cos(y / 9)
    rounded = Image.fromarray(smooth.round().astype(np.uint8)).convert("RGB")
    assert laplacian(rounded) == pytest.approx(20 / 12, rel=0.15), "the bound is what rounding gives a smooth picture"


def test_a_picture_too_small_for_a_laplacian_is_a_sentence(scorers):
    small = [Image.new("RGB", (2, 9))]
    with pytest.raises(UserError, match="2 x 9 px has no Laplacian"):
        score_pictures(small, ["a"], {"sharpness_ratio": scorers["sharpness_ratio"]}, untuned=small)


@pytest.mark.parametrize(("name", "word"), [("drift", "untuned"), ("sharpness_ratio", "untuned"), ("dino", "pictures")])
def test_what_is_needed_is_asked_for_before_anything_is_decoded(scorers, name, word, vit):  # noqa: F811
    scorer = scorers.get(name) or dino.load({"model": vit}, "cpu")
    scorer.compared_with = load().metrics[name].compared_with

    class Never(list):
        def __getitem__(self, row):
            raise AssertionError

    with pytest.raises(UserError, match=f"{name} compares with .*give --{word} or leave it out"):
        score_pictures(Never([None]), ["a"], {name: scorer})


# ---- sharing ----


def test_one_network_looks_once_at_every_picture_of_a_batch(scorers, pictures, blurred, vit, monkeypatch):  # noqa: F811
    likeness = dino.load({"model": vit}, "cpu")
    likeness.compared_with = "pictures"
    both = {"dino": likeness} | {name: scorers[name] for name in ("drift", "diversity")}
    assert len({id(scorer.model) for scorer in both.values()}) == 1
    seen, forward = [], likeness.model.forward

    def counted(pixel_values):
        seen.append(len(pixel_values))
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(likeness.model, "forward", counted)
    score_pictures(pictures, PROMPTS, both, untuned=blurred, real=pictures[:2])
    assert seen == [6, 6], "the six, their untuned ones; the real two are among the six"


def test_means_by_hand():
    a, b, c = (Image.new("RGB", (1, 1)) for _ in range(3))
    of = {id(a): torch.tensor([1.0, 0]), id(b): torch.tensor([0.6, 0.8]), id(c): torch.tensor([0.0, 1])}

    def features(images):
        return torch.stack([of[id(image)] for image in images])

    others = [[b, c], [a]]
    with one_batch():
        assert mean_cosine(features, [a, b], others).tolist() == pytest.approx([0.3, 0.6])
        assert mean_distance(features, [a, b], others).tolist() == pytest.approx([0.7, 0.4])


# ---- entries, tables and jobs ----


def test_entry_and_code_must_agree(vit, tmp_path):  # noqa: F811
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook" / "dino-vits16").symlink_to(vit)
    entry = load().metrics["drift"]
    assert load_metric("drift", entry, Hub(tmp_path), "cpu").compared_with == "untuned"
    for name in ("drift", "sharpness"):
        wrong = load().metrics[name]
        wrong = wrong.model_copy(update={"compared_with": None if wrong.compared_with else "siblings"})
        with pytest.raises(UserError, match=rf"metrics.{name}.compared_with is (None|siblings), but score\(\) of"):
            load_metric(name, wrong, Hub(tmp_path), "cpu")


def test_what_compares_can_be_no_reward():
    with pytest.raises(UserError, match="methods.pso_online measures drift, which compares with untuned"):
        load({"methods": {"pso_online": {"reward": "drift"}}})
    with pytest.raises(UserError, match="methods.diffusion measures diversity, which compares with siblings"):
        load({"methods": {"diffusion": {"tune": {"probe_metrics": ["diversity"]}}}})


def made_up(**changes):
    entries = {name: metric(name, compared_with=how) for name, how in
               {"drift": "untuned", "diversity": "siblings", "dino": "pictures"}.items()}  # fmt: skip
    return config(metrics=config().metrics | entries, **changes)


def test_a_column_that_has_nothing_to_compare_with_says_so():
    cfg = made_up()
    assert metric_missing(cfg, table(), "drift") is None and metric_missing(cfg, table(), "diversity") is None
    assert "no subject" in metric_missing(cfg, table(), "dino") or "has none" in metric_missing(cfg, table(), "dino")
    alone = table(rows=[row for row in ROWS if row.label != "SDXL-DMD2"])
    assert metric_missing(cfg, alone, "drift") == (
        "compares with the untuned model's images, and no row shows sdxl_dmd2 untuned at 4 steps"
    )
    other_steps = table(rows=[*ROWS, Row(label="1", model="sdxl_dmd2", method="pso_online", steps=1)])
    assert "sdxl_dmd2 untuned at 1 steps" in metric_missing(cfg, other_steps, "drift")
    one = DatasetEntry(format="parti_tsv", repo="none/none", files="none", num_seeds=1)
    cfg = made_up(datasets=cfg.datasets | {"parti_prompts": one})
    assert metric_missing(cfg, table(), "diversity") == (
        "compares images of one prompt, and datasets.parti_prompts.num_seeds is 1"
    )
    assert metric_missing(cfg, table(eval_sets=["pickapic_test"]), "diversity") is None


def test_jobs_of_another_table_are_left_out_one_by_one():
    """One process scores all tables of a task; a metric that one of them shows may not exist for another's images."""
    cfg = made_up()
    one = DatasetEntry(format="parti_tsv", repo="none/none", files="none", num_seeds=1)
    tables = {
        "table1": table(eval_sets=["pickapic_test"], extra_metrics=["diversity", "drift"]),
        "table2": table(eval_sets=["parti_prompts"], rows=ROWS[3:], extra_rows=[], extra_metrics=["drift"]),
    }
    cfg = made_up(datasets=cfg.datasets | {"parti_prompts": one}, table_entries=tables, tables=list(tables))
    assert {"diversity", "drift"} <= set(metrics(cfg, "preference"))
    shown = set(jobs(cfg))
    reasons = {
        (j.eval_set, j.method): [not_comparable(cfg, m, j, shown) for m in ("diversity", "drift")] for j in shown
    }
    assert all(why == [None, None] for (name, _), why in reasons.items() if name == "pickapic_test")
    assert all(None not in why for (name, _), why in reasons.items() if name == "parti_prompts")


def test_the_untuned_job_shares_everything_but_method_and_seed():
    job = Job("preference", "sdxl_dmd2", "pso_online", 3, "parti_prompts", 4)
    assert job.untuned == dataclasses.replace(job, method="untuned", seed=0) and job.untuned.untuned == job.untuned


@pytest.mark.parametrize("scale", ["miniature", "smoke"])
def test_the_shipped_preference_tables_can_have_what_they_ask_for(scale):
    cfg = load({"scale": scale})
    for name in ("table1", "table2", "table4", "validation", "extended"):
        found = {m: metric_missing(cfg, cfg.table_entries[name], m) for m in ("drift", "sharpness_ratio", "diversity")}
        assert found["drift"] is None and found["sharpness_ratio"] is None
        assert (found["diversity"] is None) == (scale == "miniature")
