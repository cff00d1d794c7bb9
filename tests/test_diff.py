"""Directions and cells against the paper, on made-up scores."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from synthetic import ROWS, config, frame, metric, scores_path, table, write_scores

from eval.diff import base_label, compare_cell, diff, stale, summary, to_markdown, write
from eval.paper import load_reference
from eval.tables import write as write_table
from pso.entries import Row
from pso.paths import run_dir, scores_file
from pso.provenance import UserError

UNTUNED_ROW, OFFLINE, ONLINE = ROWS[2], ROWS[3], ROWS[4]
EXISTING = {row.label: row for row in (UNTUNED_ROW, OFFLINE, ONLINE)}


def paper_table(existing=EXISTING):
    """table1 with all rows of the paper; those that are not in `existing` are missing."""
    labels = load_reference("table1").drop_duplicates("label")
    rows = [
        existing.get(label) or Row(label=label, steps=steps, missing="not built yet")
        for label, steps in zip(labels["label"], labels["steps"], strict=True)
    ]
    metrics = ["pick_score", "clip_score", "image_reward", "aesthetic_score"]
    missing = {"image_reward": "not built yet", "aesthetic_score": "no weights"}
    return table(rows=rows, extra_rows=[], extra_metrics=[], metrics=metrics, missing_metrics=missing)


def tree(results, differences: dict[str, np.ndarray], **changes):
    """A row's score is the untuned row's plus its difference: one number, or one per image."""
    cfg = config(table_entries={"table1": paper_table()}, **changes)
    for row in EXISTING.values():
        for eval_set in cfg.table_entries["table1"].eval_sets:
            for name in ("pick_score", "clip_score"):
                scores = frame(UNTUNED_ROW, eval_set, name)
                scores["score"] += differences.get(row.label, 0.0)
                write_scores(scores_path(cfg, results, row, eval_set, name), scores, row, eval_set, name)
    return cfg


def verdicts(found: dict) -> dict:
    return {(e["eval_set"], e["label"], e["metric"]): e["verdict"] for e in found["directions"]}


def test_verdicts(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.01, 60)
    cfg = tree(tmp_path, {OFFLINE.label: 0.01, ONLINE.label: noise - noise.mean()})
    found = verdicts(diff(cfg, tmp_path, "table1"))
    assert len(found) == 12 * 4 * 2  # every row but the base, every column, both sets
    assert found["pickapic_test", OFFLINE.label, "pick_score"] == "agrees"
    assert found["pickapic_test", OFFLINE.label, "clip_score"] == "agrees"
    assert found["pickapic_test", ONLINE.label, "pick_score"] == "inconclusive"
    assert found["pickapic_test", OFFLINE.label, "image_reward"] == "missing: not built yet"
    assert found["pickapic_test", OFFLINE.label, "aesthetic_score"] == "missing: no weights"
    assert found["parti_prompts", "SDXL-SPO", "pick_score"] == "missing: not built yet"
    cfg = tree(tmp_path, {OFFLINE.label: -0.01, ONLINE.label: 0.01})
    found = verdicts(diff(cfg, tmp_path, "table1"))
    assert found["parti_prompts", OFFLINE.label, "pick_score"] == "disagrees"
    assert found["pickapic_test", ONLINE.label, "clip_score"] == "disagrees"  # the paper: .3671 below .3679
    assert found["parti_prompts", ONLINE.label, "clip_score"] == "agrees"


def test_equal_numbers_in_the_paper_give_no_direction(tmp_path):
    teacher = ROWS[0]
    cfg = tree(tmp_path, {})
    cfg.table_entries["table1"] = paper_table({**EXISTING, teacher.label: teacher})
    for eval_set in ("pickapic_test", "parti_prompts"):
        for name in ("pick_score", "clip_score"):
            scores = frame(UNTUNED_ROW, eval_set, name).assign(score=lambda f: f["score"] + 0.05)
            write_scores(scores_path(cfg, tmp_path, teacher, eval_set, name), scores, teacher, eval_set, name)
    found = diff(cfg, tmp_path, "table1")
    entry = next(e for e in found["directions"] if (e["eval_set"], e["label"], e["metric"])
                 == ("parti_prompts", "SDXL", "clip_score"))  # fmt: skip
    assert (entry["paper"], entry["verdict"]) == ("equal", "inconclusive")  # .3607 and .3607


@pytest.mark.parametrize("scale", ["miniature", "smoke", "reduced"])
def test_no_number_is_held_against_the_papers_outside_scale_paper(tmp_path, scale):
    cfg = tree(tmp_path, {OFFLINE.label: 0.01}, scale=scale)
    found = write(cfg, tmp_path, "table1")
    text = (tmp_path / scale / "tables/table1.diff.md").read_text()
    assert found == json.loads((tmp_path / scale / "tables/table1.diff.json").read_text())
    assert not found["comparable"] and len(found["cells"]) == 104
    assert {(e["difference"], e["tolerance"]) for e in found["cells"]} == {(None, None)}
    measured = [e for e in found["cells"] if e["ours"] is not None]
    assert len(measured) == 3 * 2 * 2  # rows, columns and sets that the tree has
    assert {e["verdict"] for e in measured} == {"not comparable"}
    assert all(e["verdict"].startswith("missing: ") for e in found["cells"] if e["ours"] is None)
    assert found["cell_counts"]["not comparable"] == len(re.findall(r"\| – +\| – +\| not comparable +\|", text)) == 12
    assert summary(found) in text
    assert sum(found["counts"].values()) == 96


def test_a_cell_says_what_is_ours_and_the_papers(tmp_path):
    cfg = tree(tmp_path, {OFFLINE.label: 0.01})
    found = diff(cfg, tmp_path, "table1")
    (entry,) = [e for e in found["cells"] if (e["eval_set"], e["label"], e["metric"])
                == ("parti_prompts", OFFLINE.label, "pick_score")]  # fmt: skip
    by_hand = 100 * (frame(UNTUNED_ROW, "parti_prompts", "pick_score")["score"] + 0.01).mean()
    assert (entry["paper"], entry["ours"]) == ("23.07", pytest.approx(by_hand))
    low, high = entry["interval"]
    assert low < entry["ours"] < high
    line = next(li for li in to_markdown(cfg, found).splitlines() if "| 23.07 " in li)
    assert f"| {by_hand:.3f} " in line and f"[{low:.3f}, {high:.3f}]" in line


def test_a_diff_that_is_older_than_its_table_is_told_by_cell(tmp_path):
    cfg = tree(tmp_path, {OFFLINE.label: 0.01})
    write(cfg, tmp_path, "table1")
    write_table(cfg, tmp_path, "table1")
    path = tmp_path / "miniature/tables/table1.diff.json"
    told, frame_of = json.loads(path.read_text()), pd.read_csv(path.with_name("table1.csv"))
    assert stale(told, frame_of) == [], "rows that are missing in both among them"
    here = (frame_of["eval_set"] == "parti_prompts") & (frame_of["label"] == OFFLINE.label)
    place = f"{OFFLINE.label}, parti_prompts, pick_score"
    for factor in (1 + 1e-8, np.nan):
        changed = frame_of["pick_score"].mask(here, factor * frame_of["pick_score"])
        assert stale(told, frame_of.assign(pick_score=changed)) == [place]
    assert stale(told, frame_of[~here]) == [place, place.replace("pick_score", "clip_score")]
    (cell,) = [c for c in told["cells"] if f"{c['label']}, {c['eval_set']}, {c['metric']}" == place]
    cell["ours"] = None
    assert stale(told, frame_of) == [place], "a row that has been measured since"


def test_every_direction_is_in_the_text(tmp_path):
    cfg = tree(tmp_path, {OFFLINE.label: 0.01})
    found = diff(cfg, tmp_path, "table1")
    text = to_markdown(cfg, found)
    for label in {entry["label"] for entry in found["directions"]}:
        assert label in text
    assert len(re.findall(r"\| agrees +\|", text)) == found["counts"]["agrees"] > 0
    assert "SDXL-SPO" in text and "not built yet" in text


def cell(printed: str, decimals: int, label: str = OFFLINE.label):
    reference = load_reference("table1").set_index(["eval_set", "label", "metric"], drop=False)
    found = reference.loc[("pickapic_test", label, "pick_score")].copy()
    found["printed"], found["value"], found["decimals"] = printed, float(printed), decimals
    return found


class Given:
    """Stands for eval.diff.Reader: one made-up row."""

    def __init__(self, scores):
        self.table, self.scores = paper_table(), scores

    def missing(self, row, metric):
        return row.missing

    def __call__(self, row, eval_set, metric):
        return type("Scores", (), {"frame": self.scores})


@pytest.mark.parametrize(
    ("printed", "verdict"),
    [("22.46", "same"), ("22.456", "same"), ("22.44", "higher"), ("22.48", "lower"), ("22.5", "lower")],
)
def test_a_cell_without_spread_is_the_same_within_half_a_digit(printed, verdict):
    scores = frame(OFFLINE, "pickapic_test", "pick_score").assign(score=22.46, subject=None)
    assert compare_cell(config(scale="paper"), Given(scores), cell(printed, 2))["verdict"] == verdict


def test_tolerance_by_hand():
    scores = frame(OFFLINE, "pickapic_test", "pick_score").assign(subject=None)
    found = compare_cell(config(scale="paper"), Given(scores), cell("0.23", 2))
    prompts = [scores["score"][i : i + 2].mean() for i in range(0, 60, 2)]
    error = np.sqrt(np.sum((prompts - np.mean(prompts)) ** 2) / 29 / 30)
    assert found["tolerance"] == pytest.approx(2 * error + 0.005)
    assert found["difference"] == pytest.approx(np.mean(prompts) - 0.23)


def test_scale_paper_compares_cells(tmp_path):
    cfg = tree(tmp_path, {}, scale="paper")
    found = diff(cfg, tmp_path, "table1")
    assert found["comparable"] and len(found["cells"]) == 104
    for entry in [e for e in found["cells"] if e["ours"] is not None]:
        assert entry["difference"] == pytest.approx(entry["ours"] - float(entry["paper"]))
        assert entry["interval"][0] < entry["ours"] < entry["interval"][1]
    verdict = {(e["eval_set"], e["label"], e["metric"]): e["verdict"] for e in found["cells"]}
    assert verdict["pickapic_test", "SDXL-DMD2", "pick_score"] in ("same", "higher", "lower")
    assert verdict["pickapic_test", "SDXL", "pick_score"] == "missing: not built yet"
    text = to_markdown(cfg, found)
    assert "22.46" in text and "2 SE + half a unit" in text and "104 cells" in text


@pytest.mark.parametrize(
    ("name", "label", "base"),
    [
        ("table1", "SDXL-DPO", "SDXL-DMD2"),
        ("table1", "SDXL", "SDXL-DMD2"),
        ("table1", "SDXL-DPO + DMD2-LoRA", "SDXL-DMD2"),
        ("table2", "Online-PSO w/ SDXL-Turbo-1step", "SDXL-Turbo-1step"),
        ("table2", "Online-PSO w/ SDXL-Turbo-4step", "SDXL-Turbo-4step"),
        ("table3", "Dreambooth w/ SDXL", "SDXL-Turbo"),
        ("table4", "SDXL-DPO + LCM-LoRA", "SDXL + LCM-LoRA"),
        ("table4", "Online-PSO w/ SDXL-LCM", "SDXL-LCM"),
    ],
)
def test_base_rows(name, label, base):
    assert base_label(load_reference(name), label) == base


CONCEPT = {
    "Dreambooth w/ SDXL": Row(label="Dreambooth w/ SDXL", model="sdxl", method="dreambooth", steps=50),
    "SDXL-Turbo": Row(label="SDXL-Turbo", model="sdxl_turbo", method="untuned", steps=4),
    "PSO w/ SDXL-Turbo": Row(label="PSO w/ SDXL-Turbo", model="sdxl_turbo", method="pso", steps=4),
}
LIKENESS = {"Dreambooth w/ SDXL": 0.6, "SDXL-Turbo": 0.2, "PSO w/ SDXL-Turbo": 0.5}


@pytest.mark.parametrize(("scale", "verdict"), [("miniature", "not comparable"), ("paper", "lower")])
def test_table_3_has_one_eval_set_and_its_own_columns(tmp_path, scale, verdict):
    columns = ["clip_t", "dino", "clip_i"]
    entry = table(
        task="concept", eval_sets=["dreambooth_prompts"], metrics=columns, rows=list(CONCEPT.values()),
        missing_metrics={}, extra_metrics=[], extra_rows=[],
    )  # fmt: skip
    metrics = {name: metric(name.upper(), decimals=3) for name in columns}
    datasets = {"dreambooth_prompts": config().datasets["pickapic_test"]}
    cfg = config(scale=scale, table_entries={"table3": entry}, metrics=metrics, datasets=datasets, tables=["table3"])
    noise = np.random.default_rng(0).normal(0, 0.01, 60)
    for row in CONCEPT.values():
        for name in columns:
            scores = frame(UNTUNED_ROW, "pickapic_test", "pick_score").assign(score=LIKENESS[row.label] + noise)
            run = run_dir(scale, "concept", row.model, row.method, 0, tmp_path)
            write_scores(scores_file(run, "dreambooth_prompts", row.steps, name), scores, row,
                         "dreambooth_prompts", name)  # fmt: skip
    found = diff(cfg, tmp_path, "table3")
    assert [(e["label"], e["base"], e["metric"], e["paper"], e["verdict"]) for e in found["directions"]] == [
        ("Dreambooth w/ SDXL", "SDXL-Turbo", "clip_t", "below", "disagrees"),
        ("Dreambooth w/ SDXL", "SDXL-Turbo", "dino", "above", "agrees"),
        ("Dreambooth w/ SDXL", "SDXL-Turbo", "clip_i", "above", "agrees"),
        *(("PSO w/ SDXL-Turbo", "SDXL-Turbo", name, "above", "agrees") for name in columns),
    ]
    cells = {(e["label"], e["metric"]): e["verdict"] for e in found["cells"]}
    assert len(cells) == 9 and cells["PSO w/ SDXL-Turbo", "dino"] == verdict
    text = to_markdown(cfg, found)
    assert "Against SDXL-Turbo: Dreambooth w/ SDXL and PSO w/ SDXL-Turbo are above on every measured column." in text
    assert "5 of 6 measured directions agree with the paper's and 1 disagrees." in text


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="--table is 'table5', which the paper does not have; expected one of table1"):
        load_reference("table5")
    short = config(table_entries={"table1": table()})
    with pytest.raises(UserError, match="tables.table1.rows lacks .*SDXL-SPO.* of the paper's table"):
        diff(short, tmp_path, "table1")
