"""Two trees of results side by side, on made-up scores and records; and one against the paper."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import EVAL_SETS, NUM_PROMPTS, NUM_SEEDS, frame, scores_path, write_scores
from test_diff import EXISTING, OFFLINE, ONLINE, UNTUNED_ROW, tree

from eval import claims, compare, diff, tables
from eval.compare_cells import INTERVALS, PAIRED
from eval.compare_config import ABSENT, differing, matched
from eval.compare_same import sentence, shown
from eval.compare_text import strength, to_html, to_text
from eval.compare_trees import names_of, read_tree
from pso import paths
from pso.provenance import UserError

SETTINGS = {"method": {"pso_offline": {"tune": {"learning_rate": 1e-4, "batch_size": 48}}}}
GAINS = {OFFLINE.label: 0.01, ONLINE.label: 0.02}
METRICS = ("pick_score", "clip_score")


def record(row, **changes) -> dict:
    sampled = {"resolution": 32, "guidance_scale": 0.0, "guidance_embedding": None, "sampler": "renoise"}
    model = {row.model: {**sampled, "grids": {"4": [999, 749, 499, 249]}}}
    return {
        "schema_version": 1,
        "config": {"scale": "miniature", "model": model, **SETTINGS, "seed": 0},
        "config_digest": "whatever",
        "code": {"commit": "a" * 40, "dirty": None},
        "inputs": [{"repo": "tianweiy/DMD2", "file": "dmd2.bin", "sha256": "1" * 64}],
        "versions": {"torch": "2.13.0"},
        "hardware": {"machine": "x86_64"},
        "numerics": {"dtype": "float32"},
        "cost": {"wall_s": 12.3},
        "final": {"loss": 0.69},
    } | changes


def write_record(results: Path, row, content: dict, name: str = "run.json") -> None:
    run = paths.run_dir("miniature", "preference", row.model, row.method, 0, results)
    path = run / name if name == "run.json" else run.parent.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def finished(cfg, results: Path) -> Path:
    """What the rules make of scores: a folder of one scale."""
    tables.write(cfg, results, "table1")
    diff.write(cfg, results, "table1")
    claims.write(cfg, results)
    return results / cfg.scale


def make(results: Path, gains: dict = GAINS, records: bool = True, **changes) -> tuple:
    cfg = tree(results, gains, **changes)
    for row in (OFFLINE, ONLINE) if records else ():
        write_record(results, row, record(row))
    return cfg, finished(cfg, results)


def opened(a: Path, b: Path) -> tuple:
    names = names_of(a, b)
    return read_tree(a, names[0], side="A"), read_tree(b, names[1], side="B")


def compared(cfg, a: Path, b: Path, **options) -> dict:
    found = compare.compare({cfg.scale: cfg}, *opened(a, b), **options)
    return found | {"fail_on": "cells", "differs": compare.differs(found, "cells")}


def rewrite(cfg, results: Path, row, eval_set: str, metric: str, change=lambda scores: scores, **told) -> None:
    """A row's scores of one column, changed, with its table as the rules make it."""
    scores = frame(UNTUNED_ROW, eval_set, metric)
    scores["score"] += GAINS.get(row.label, 0.0)
    write_scores(scores_path(cfg, results, row, eval_set, metric), change(scores), row, eval_set, metric, **told)


@pytest.fixture
def one(tmp_path):
    return make(tmp_path / "one")


@pytest.fixture
def other(one, tmp_path):
    """An equal tree beside the first, to be changed."""
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    return tmp_path / "other"


# ---- equal trees ----


def test_equal_trees_have_no_difference(one, other):
    cfg, folder = one
    found = compared(cfg, folder, other / "miniature")
    assert found["cells"]["compared"] == found["cells"]["equal"] == 3 * 2 * 2  # rows, columns, sets that have numbers
    assert found["cells"]["counts"] == {"higher": 0, "lower": 0, "only in A": 0, "only in B": 0, "same": 12}
    assert found["directions"]["compared"] == 96 and found["claims"]["compared"] == 1
    assert not any(compare.differs(found, kind) for kind in compare.KINDS)
    assert found["config"]["changes"] == [] and found["config"]["records_compared"] == {"run.json": 2}
    assert "--fail-on cells: no difference" in to_text(found)


def test_costs_and_last_losses_are_no_change(one, other):
    cfg, folder = one
    write_record(other, OFFLINE, record(OFFLINE, cost={"wall_s": 99.0}, final={"loss": 0.5}))
    assert not compare.differs(compared(cfg, folder, other / "miniature"), "anything")


# ---- cells ----


def test_a_shifted_row_is_the_one_that_is_named(one, other):
    cfg, folder = one
    shift = np.random.default_rng(1).normal(0.002, 0.001, NUM_PROMPTS * NUM_SEEDS)
    rewrite(cfg, other, OFFLINE, "pickapic_test", "pick_score", lambda f: f.assign(score=f["score"] + shift))
    found = compared(cfg, folder, finished(cfg, other))
    moved = [e for e in found["cells"]["cells"] if not e["equal"]]
    places = [(e["eval_set"], e["label"], e["metric"], e["verdict"], e["rule"]) for e in moved]
    assert places == [("pickapic_test", OFFLINE.label, "pick_score", "higher", PAIRED)]
    by_prompt = 100 * shift.reshape(NUM_PROMPTS, NUM_SEEDS).mean(axis=1)
    (entry,) = moved
    assert entry["difference"] == pytest.approx(by_prompt.mean(), rel=1e-9)
    draws = np.random.default_rng(2).choice(by_prompt, (20_000, NUM_PROMPTS)).mean(axis=1)
    assert entry["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.012)
    assert entry["b"]["value"] - entry["a"]["value"] == pytest.approx(entry["difference"])
    back = compared(cfg, other / "miniature", folder)
    (entry,) = [e for e in back["cells"]["cells"] if not e["equal"]]
    assert entry["verdict"] == "lower" and entry["difference"] == pytest.approx(-by_prompt.mean())
    text = to_text(found)
    assert f"{by_prompt.mean():+.3f}" in text and "1 higher, 11 same; 11 equal to the last digit" in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_pairing_sees_what_two_intervals_cannot(one, other, tmp_path):
    cfg, folder = one
    rewrite(cfg, other, OFFLINE, "pickapic_test", "pick_score", lambda f: f.assign(score=f["score"] + 0.001))
    shifted = finished(cfg, other)
    assert compared(cfg, folder, shifted)["cells"]["counts"]["higher"] == 1
    bare = tmp_path / "bare/miniature"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("preference"))
    found = compared(cfg, bare, shifted)
    assert found["cells"]["counts"]["same"] == 12 and found["cells"]["by_rule"] == {PAIRED: 0, INTERVALS: 12}
    (entry,) = [e for e in found["cells"]["cells"] if not e["equal"]]
    assert entry["why_not_paired"] == "A: no scores of single images" and entry["interval"] is None
    assert "The clearest change among the same: Offline-PSO w/ SDXL-DMD2, PickScore" in " ".join(to_text(found).split())


def test_intervals_that_do_not_meet_are_a_difference(one, tmp_path):
    cfg, folder = one
    _, far = make(tmp_path / "far", {OFFLINE.label: 0.11, ONLINE.label: 0.02})
    for path in (folder, far):
        shutil.rmtree(path / "preference")
    found = compared(cfg, folder, far)
    assert {(e["label"], e["verdict"]) for e in found["cells"]["cells"] if e["verdict"] != "same"} == {
        (OFFLINE.label, "higher")
    }
    assert "have no run.json" in " ".join(to_text(found).split())


def test_a_row_that_one_tree_alone_has(one, tmp_path):
    cfg, folder = one
    path = folder / "tables/table1.csv"
    frame_of = pd.read_csv(path)
    frame_of.loc[frame_of["label"] == ONLINE.label, ["pick_score", "pick_score_low", "pick_score_high"]] = np.nan
    shutil.copytree(folder, tmp_path / "less/miniature")
    frame_of.to_csv(tmp_path / "less/miniature/tables/table1.csv", index=False)
    found = compared(cfg, folder, tmp_path / "less/miniature")
    assert found["cells"]["counts"]["only in A"] == 2 and found["differs"]
    assert "Cells only in A\n  - table1, pickapic_test, Online-PSO w/ SDXL-DMD2 (no such number): PickScore" in to_text(
        found
    )
    assert compared(cfg, tmp_path / "less/miniature", folder)["cells"]["counts"]["only in B"] == 2


def test_a_table_older_than_its_scores_is_named_and_the_scores_count(one, other):
    cfg, folder = one
    rewrite(cfg, other, ONLINE, "parti_prompts", "clip_score", lambda f: f.assign(score=f["score"] + 0.01))
    found = compared(cfg, folder, other / "miniature")  # its table is not made anew
    (entry,) = [e for e in found["cells"]["cells"] if not e["equal"]]
    assert entry["difference"] == pytest.approx(0.01) and entry["b"]["value"] - entry["a"]["value"] == pytest.approx(
        0.01
    )
    assert entry["b"]["interval"][0] > entry["a"]["interval"][0]
    (line,) = found["stale"]
    assert line.startswith("B: tables/table1.csv has 0.") and "`python -m eval.tables --table table1`" in line
    assert "Out of date, B: tables/table1.csv" in " ".join(to_text(found).split())


def test_a_number_without_an_interval_has_no_verdict(one, other):
    cfg, folder = one
    for path in (folder, other / "miniature"):
        shutil.rmtree(path / "preference")
    path = other / "miniature/tables/table1.csv"
    frame_of = pd.read_csv(path)
    here = (frame_of["label"] == ONLINE.label) & (frame_of["eval_set"] == "parti_prompts")
    frame_of.loc[here, "pick_score_high"] = np.nan
    frame_of.loc[here, "clip_score_low"] = -np.inf
    frame_of.loc[here, "clip_score"] += 1  # in the table alone: its diff is left as it is
    frame_of.to_csv(path, index=False)
    found = compared(cfg, folder, other / "miniature")
    cells = {e["metric"]: e for e in found["cells"]["cells"] if e["verdict"] is None}
    assert {name: (e["difference"], e["interval"]) for name, e in cells.items()} == {
        "pick_score": (0.0, None),
        "clip_score": (pytest.approx(1.0), None),
    }
    assert cells["clip_score"]["b"]["interval"] is None and cells["clip_score"]["a"]["interval"] is not None
    assert found["cells"]["not_judged"] == 2 and found["cells"]["counts"]["same"] == 10
    told = f"No interval in A or in B, so without a verdict: {ONLINE.label}, PickScore (table1, parti_prompts)"
    assert told in " ".join(to_text(found).split()) and '<span class="">no interval</span>' in to_html(found)
    assert not compare.differs(found, "cells") and compare.differs(found, "anything")


# ---- verdicts ----


def test_verdicts_that_changed(one, tmp_path):
    cfg, folder = one
    _, turned = make(tmp_path / "turned", {OFFLINE.label: 0.01, ONLINE.label: -0.02})
    found = compared(cfg, folder, turned)
    (claim,) = found["claims"]["changed"]
    assert (claim["id"], claim["change"]) == ("online_above", "holds -> fails")
    changed = {(e["eval_set"], e["metric"]): e["change"] for e in found["directions"]["changed"]}
    assert changed["pickapic_test", "pick_score"] == "agrees -> disagrees" and len(changed) == 4
    assert found["directions"]["transitions"] == {"agrees -> disagrees": 3, "disagrees -> agrees": 1}
    assert {e["label"] for e in found["directions"]["changed"]} == {ONLINE.label}
    assert compare.differs(found, "verdicts")


def test_a_diff_older_than_its_table_is_named_and_not_used(one, other):
    cfg, folder = one
    path = other / "miniature/tables/table1.csv"
    shutil.copy(path, path.with_name("table4.csv"))
    frame_of = pd.read_csv(path)
    here = (frame_of["label"] == ONLINE.label) & (frame_of["eval_set"] == "parti_prompts")
    frame_of.loc[here, "clip_score"] *= 1 + 1e-6
    frame_of.to_csv(path, index=False)
    diff_json = path.with_name("table1.diff.json")
    told = json.loads(diff_json.read_text())
    diff_json.write_text(json.dumps(told | {"directions": told["directions"][1:]}))  # 95 of 96: the rest are no change
    found = compared(cfg, folder, other / "miniature")
    (said,) = [line for line in found["directions"]["missing"] if "table1" in line]
    assert said == (
        "B (other/miniature): tables/table1.diff.json has other numbers than tables/table1.csv (1, the first of "
        f"{ONLINE.label}, parti_prompts, clip_score), so one is older and nothing of tables/table1.diff.json is used; "
        "`python -m eval.diff --table table1` makes it anew."
    )
    assert said in " ".join(to_text(found).split()) and "Directions: not compared." in to_text(found)
    assert not compare.differs(found, "verdicts") and found["directions"]["only_in"] is None
    with pytest.raises(UserError, match="has other numbers than .*`python -m eval.diff --table table1` makes it anew"):
        asked(other, "paper")
    diff_json.with_name("table4.diff.json").write_text(json.dumps(told))
    found = asked(other, "paper")
    assert {entry["table"] for entry in found["directions"]["entries"]} == {"table4"}
    assert [note for note in found["notes"] if "table1" in note] == [said.replace("B (", "A (")]


def test_a_claim_that_is_declared_otherwise_is_a_change(one, other):
    cfg, folder = one
    path = other / "miniature/claims.json"
    content = json.loads(path.read_text())
    content[0]["bound"] = -0.5
    path.write_text(json.dumps(content))
    (claim,) = compared(cfg, folder, other / "miniature")["claims"]["changed"]
    assert claim["change"] == "holds, declared otherwise"


@pytest.mark.parametrize(("name", "part"), [("claims.json", "claims"), ("tables/table1.diff.json", "directions")])
def test_verdicts_that_one_tree_alone_has_are_a_difference(one, other, name, part):
    cfg, folder = one
    (other / "miniature" / name).unlink()
    found = compared(cfg, folder, other / "miniature")
    assert compare.differs(found, "verdicts") and not compare.differs(found, "nothing")
    assert f"{part.capitalize()}: not compared, A alone has any." in to_text(found)
    assert any(f"B (other/miniature) has no {name}" in line for line in found[part]["missing"])
    (folder / name).unlink()  # in neither
    assert not compare.differs(compared(cfg, folder, other / "miniature"), "cells")


def test_claims_of_other_tables_are_no_equal_claims(one, other):
    cfg, folder = one
    path = other / "miniature/claims.json"
    path.write_text(json.dumps([claim | {"table": "table2"} for claim in json.loads(path.read_text())]))
    found = compared(cfg, folder, other / "miniature")
    assert compare.differs(found, "verdicts") and "Claims: not compared, A alone has any." in to_text(found)


# ---- how they were made ----


def test_claims_that_were_judged_among_others_are_told(one, other):
    """Holm's p of one claim rests on all that are measured beside it."""
    cfg, a = one
    b = other / "miniature"
    path = b / "claims.json"
    judged = json.loads(path.read_text())
    assert "Holm" not in to_text(compared(cfg, a, b))
    measured = sum(claim["estimate"] is not None for claim in judged)
    path.write_text(json.dumps([*judged, {**judged[0], "id": "of another table", "table": "table9"}]))
    text = " ".join(to_text(compared(cfg, a, b)).split())
    assert (
        f"A measured {measured} of its {len(judged)} claims, B {measured + 1} of {len(judged) + 1}; Holm's p is" in text
    )


def test_what_did_not_move_is_never_the_clearest_change():
    still = {"difference": 0.0, "interval": [0.0, 0.0]}
    assert strength(still) < strength({"difference": 0.01, "interval": [-0.5, 0.5]})


def test_a_changed_setting_is_a_dotted_key(one, other):
    cfg, folder = one
    settings = {"method": {"pso_offline": {"tune": {"learning_rate": 2e-4, "batch_size": 48}}}}
    write_record(other, OFFLINE, record(OFFLINE, config={**record(OFFLINE)["config"], **settings}))
    found = compared(cfg, folder, other / "miniature")
    run = "preference/sdxl_dmd2/pso_offline/seed0/run.json"
    assert found["config"]["changes"] == [
        {"part": "settings", "key": "method.pso_offline.tune.learning_rate", "a": 1e-4, "b": 2e-4, "records": [run]}
    ]
    assert f"method.pso_offline.tune.learning_rate: 0.0001 -> 0.0002 ({run})" in " ".join(to_text(found).split())
    assert not found["differs"] and compare.differs(found, "anything")


def test_runs_of_another_training_seed_are_held_against_each_other(one, other):
    cfg, folder = one
    for row in (OFFLINE, ONLINE):
        run = paths.run_dir("miniature", "preference", row.model, row.method, 0, other)
        run.rename(run.parent / "seed1")
        changed = {**record(row)["config"], "seed": 1}
        changed |= {"dtype": "bfloat16"} if row is OFFLINE else {}
        (run.parent / "seed1/run.json").write_text(json.dumps(record(row, config=changed)))
    found = compared(cfg, folder, other / "miniature")
    changes = {change["key"]: (change["a"], change["b"], change["records"]) for change in found["config"]["changes"]}
    names = [f"preference/sdxl_dmd2/{row.method}/seed0|1/run.json" for row in (OFFLINE, ONLINE)]
    assert changes == {"seed": (0, 1, names), "dtype": (ABSENT, "bfloat16", names[:1])}
    assert found["config"]["records_compared"] == {"run.json": 2} and not found["config"]["records_only_in_a"]
    assert found["cells"]["counts"]["same"] == 12 and found["cells"]["by_rule"][PAIRED] == 12


def test_which_of_several_seeds_is_which_is_not_guessed():
    a = [f"style/m/x/seed{seed}/run.json" for seed in (0, 1)]
    assert matched(a, ["style/m/x/seed2/run.json"]) == {}
    assert matched(a, [a[0], "style/m/x/seed2/run.json"]) == {
        a[0]: (a[0], a[0]),
        "style/m/x/seed1|2/run.json": (a[1], "style/m/x/seed2/run.json"),
    }


def test_a_change_of_all_runs_is_told_once(one, other):
    cfg, folder = one
    for row in (OFFLINE, ONLINE):
        inputs = [{"repo": "tianweiy/DMD2", "file": "dmd2.bin", "sha256": "2" * 64}]
        write_record(other, row, record(row, versions={"torch": "2.14.0"}, inputs=inputs))
    found = compared(cfg, folder, other / "miniature")
    told = {(c["part"], c["key"]): (c["a"], c["b"], len(c["records"])) for c in found["config"]["changes"]}
    assert told == {
        ("inputs", "tianweiy/DMD2/dmd2.bin.sha256"): ("1" * 64, "2" * 64, 2),
        ("versions", "torch"): ("2.13.0", "2.14.0", 2),
    }
    assert "torch: 2.13.0 -> 2.14.0 (all 2 records)" in to_text(found)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ({"x": {"y": 1}}, {"x": {"y": 1}}, []),
        ({"x": {"y": 1}}, {"x": {"y": 2}}, [("x.y", 1, 2)]),
        ({"x": 1}, {"x": True}, [("x", 1, True)]),
        ({"x": [1, 2]}, {"x": [1, 3]}, [("x", [1, 2], [1, 3])]),
        ({"x": [{"y": 1}]}, {"x": []}, [("x.0.y", 1, ABSENT), ("x", ABSENT, [])]),
        ({"x": None}, {}, [("x", None, ABSENT), ("", ABSENT, {})]),
    ],
)
def test_nested_differences(a, b, found):
    assert differing(a, b) == found


# ---- refusals ----


def test_another_scorer_is_refused_by_field(one, other):
    cfg, folder = one
    spec = {"name": "pick_score", "sha256": "9" * 64}
    for row in EXISTING.values():
        for eval_set in EVAL_SETS:
            rewrite(cfg, other, row, eval_set, "pick_score", spec=spec)
    with pytest.raises(UserError) as refusal:
        compared(cfg, folder, finished(cfg, other))
    assert "6 of 12 cells cannot be compared" in str(refusal.value)
    named = "scorer of pick_score: sha256 is 0000000000000000... in A and 9999999999999999... in B (all rows of table1)"
    assert named in str(refusal.value) and "`python -m eval.score" in str(refusal.value)
    assert "clip_score" not in str(refusal.value)
    found = compared(cfg, folder, other / "miniature", skip=True)
    assert found["left_out"]["cells"] == 6 and found["cells"]["compared"] == 6
    assert {e["metric"] for e in found["cells"]["cells"]} == {"clip_score"}
    assert found["directions"]["left_out"] == 4 and found["claims"]["left_out"] == 1
    text = " ".join(to_text(found).split())
    assert "6 left out as not comparable" in text and named in text


def test_long_values_are_told_from_where_they_differ():
    grids = [list(range(999, 899, -10)), [*range(999, 909, -10), 0]]
    assert [shown(*pair) for pair in (grids, grids[::-1])] == ["...9, 919, 909]", "...9, 919, 0]"]
    assert shown("0" * 64, "9" * 64) == "0" * 16 + "..." and shown(None, "x" * 41) == "nothing"
    assert shown("x" * 30 + "a" + "y" * 30, "x" * 30 + "b" + "y" * 30) == f"...{'x' * 8}a{'y' * 7}..."


def test_other_code_of_a_scorer_can_be_allowed_and_nothing_else(one, other):
    cfg, folder = one
    for tree_of, code in ((folder.parent, "old"), (other, "new")):
        for row in EXISTING.values():
            rewrite(cfg, tree_of, row, "parti_prompts", "clip_score", spec={"transform": "x", "code": code})
    with pytest.raises(UserError, match="scorer of clip_score: code is old in A and new in B") as refusal:
        compared(cfg, folder, other / "miniature")
    assert "--despite-code" in str(refusal.value)
    found = compared(cfg, folder, other / "miniature", despite_code=True)
    assert found["cells"]["equal"] == 12 and [group["field"] for group in found["despite"]] == ["code"]
    assert "Compared although the code of the scorer is another: clip_score" in " ".join(to_text(found).split())
    spec = {"transform": "x", "code": "new"}
    rewrite(cfg, other, OFFLINE, "parti_prompts", "clip_score", lambda f: f.assign(score=f["score"] + 0.5), spec=spec)
    found = compared(cfg, folder, finished(cfg, other), despite_code=True)
    (cell,) = [e for e in found["cells"]["cells"] if not e["equal"]]
    assert (cell["label"], cell["verdict"], cell["rule"]) == (OFFLINE.label, "higher", PAIRED), "scores that differ too"
    for row in EXISTING.values():
        rewrite(cfg, other, row, "parti_prompts", "clip_score", spec={"transform": "y", "code": "new"})
    with pytest.raises(UserError, match="transform is x in A and y in B"):
        compared(cfg, folder, other / "miniature", despite_code=True)


CHANGED_IMAGES = {
    "eval seed": lambda f: f.assign(image_seed=f["image_seed"] + 7),
    "prompt ids": lambda f: f.assign(prompt_id="q" + f["prompt_id"]),
    "images per prompt": lambda f: f[f["image_seed"] == 0],
    "prompts": lambda f: f[f["prompt_id"] != "p000"],
    "images with a score": lambda f: f.iloc[1:],
}


@pytest.mark.parametrize("field", CHANGED_IMAGES)
def test_other_images_are_refused_by_field(one, other, field):
    cfg, folder = one
    rewrite(cfg, other, OFFLINE, "parti_prompts", "pick_score", CHANGED_IMAGES[field])
    with pytest.raises(UserError, match=f"protocol: parti_prompts: {field} is .* in A and .* in B") as refusal:
        compared(cfg, folder, other / "miniature")
    assert "1 of 12 cells" in str(refusal.value) and f"(table1: {OFFLINE.label})" in str(refusal.value)


@pytest.mark.parametrize("field", ["resolution", "guidance_scale", "sampler", "grid"])
def test_another_sampling_is_refused_by_field(one, other, field):
    cfg, folder = one
    content = record(ONLINE)
    if field == "grid":
        content["config"]["model"]["sdxl_dmd2"]["grids"]["4"] = [999, 700, 400, 100]
    else:
        content["config"]["model"]["sdxl_dmd2"][field] = "other"
    write_record(other, ONLINE, content)
    with pytest.raises(UserError, match=rf"protocol: {field} is .* in A and .* in B \(table1: {ONLINE.label}\)"):
        compared(cfg, folder, other / "miniature")


def test_numbers_of_another_stand_in_world_are_refused(one, tmp_path):
    cfg, folder = one
    small, elsewhere = make(tmp_path / "other", records=False, scale="smoke")
    trees = opened(folder, elsewhere)
    with pytest.raises(
        UserError, match="weights and data is those made at scale miniature in A and those made at scale s"
    ):
        compare.compare({"miniature": cfg, "smoke": small}, *trees)


def test_what_nothing_tells_is_said_not_to_be_checked(one, other):
    cfg, folder = one
    for path in (folder, other / "miniature"):
        shutil.rmtree(path / "preference")
    found = compared(cfg, folder, other / "miniature")
    assert found["unchecked"]["scorer"] == {"what": ["clip_score"], "cells": 6}, "claims.json tells pick_score's"
    assert {"grid", "resolution", "eval seed", "prompt ids"} <= set(found["unchecked"]["protocol"]["what"])
    assert found["unchecked"]["protocol"]["cells"] == 12
    assert "A or B does not tell the scorer, so not checked in 6 cells: clip_score." in " ".join(to_text(found).split())


def test_committed_files_tell_scorers_by_their_claims(one, other):
    cfg, folder = one
    path = other / "miniature/claims.json"
    content = json.loads(path.read_text())
    content[0]["scorer"]["spec"]["sha256"] = "9" * 64
    path.write_text(json.dumps(content))
    for tree_of in (folder, other / "miniature"):
        shutil.rmtree(tree_of / "preference")
    with pytest.raises(UserError, match="6 of 12 cells .*\n.*scorer of pick_score: sha256 is 0000"):
        compared(cfg, folder, other / "miniature")


OTHER = {"scorer": {"spec": {"name": "pick_score", "sha256": "9" * 64}}}
SDXL = {"left": "SDXL", "right": "SDXL"}  # a row without numbers
HALF = "0000000000000000... in some claims of B and 9999999999999999... in others"
WHOLE = "0000000000000000... in A and 9999999999999999... in B"


@pytest.mark.parametrize(
    ("mine", "more", "said", "labels"),
    [
        ({}, OTHER, HALF, "all rows of table1"),  # as its table has both, the third row's scorer is not known either
        ({}, {**OTHER, **SDXL}, HALF, f"table1: {OFFLINE.label}"),  # the others have claims of their own
        ({}, {**OTHER, **SDXL, "left": OFFLINE.label}, WHOLE, f"table1: {OFFLINE.label}"),
        ({"table": "table2"}, {**OTHER, "table": "table3"}, HALF, "all rows of table1"),
        ({}, {**OTHER, "table": "table2"}, None, None),  # the table's own claims tell its scorer
    ],
)
def test_a_tree_that_was_scored_again_in_part_is_refused(one, other, mine, more, said, labels):
    cfg, folder = one
    (claim,) = json.loads((folder / "claims.json").read_text())
    claim |= mine
    for tree_of, judged in ((folder, [claim]), (other / "miniature", [claim, {**claim, **more, "id": "again"}])):
        (tree_of / "claims.json").write_text(json.dumps(judged))
        shutil.rmtree(tree_of / "preference")
    if said is None:
        assert compared(cfg, folder, other / "miniature")["cells"]["equal"] == 12
        return
    with pytest.raises(UserError) as refusal:
        compared(cfg, folder, other / "miniature")
    assert f"scorer of pick_score: sha256 is {said} ({labels})" in str(refusal.value)
    assert ("judge the claims of B anew (`python -m eval.claims`)" in str(refusal.value)) == (said == HALF)
    found = compared(cfg, folder, other / "miniature", skip=True)
    out = 6 if "all" in labels else 2
    assert found["left_out"]["cells"] == out and found["cells"]["equal"] == 12 - out
    assert "pick_score" not in found["unchecked"]["scorer"]["what"]


# ---- against the paper ----


def test_outside_scale_paper_only_directions_and_claims_are_held_against_the_papers(one):
    cfg, folder = one
    found = compare.with_paper(cfg, read_tree(folder, "mine"), "A")
    assert found["cells"] is None and found["b"]["name"] == "the paper"
    told = json.loads((folder / "tables/table1.diff.json").read_text())["counts"]
    assert {k: v for k, v in found["directions"]["counts"].items() if k != "missing"} == {
        k: v for k, v in told.items() if not k.startswith("missing")
    }
    assert found["directions"]["counts"]["missing"] == 96 - 8
    (claim,) = found["claims"]["entries"]
    assert (claim["ours"], claim["paper"], claim["verdict"]) == ("holds", "holds", "agrees")
    text = " ".join(to_text(found | {"fail_on": "cells", "differs": True}).split())
    assert "No number of scale miniature is held against the paper's" in text
    assert "table2, 48 cells of the paper, is not in the tree" in text
    assert compare.differs(found, "verdicts") == (told["disagrees"] > 0)


def test_at_scale_paper_cells_are_held_against_the_papers(tmp_path):
    cfg, folder = make(tmp_path, {}, records=False, scale="paper")
    found = compare.with_paper(cfg, read_tree(folder, "mine"), "B")
    cells = json.loads((folder / "tables/table1.diff.json").read_text())["cell_counts"]
    assert [found["cells"]["counts"][v] for v in ("same", "higher", "lower")] == [
        cells[v] for v in ("same", "higher", "lower")
    ]
    assert compare.differs(found, "cells") == (cells["higher"] + cells["lower"] > 0)
    text = to_text(found | {"fail_on": "cells", "differs": True})
    assert "Cells that are not the paper's" in text and "does not say by which files" in text


def test_a_cell_of_another_edition_of_the_paper_is_told(one):
    cfg, folder = one
    path = folder / "tables/table1.diff.json"
    content = json.loads(path.read_text())
    content["cells"][0]["paper"] = "99.99"
    path.write_text(json.dumps(content))
    notes = compare.with_paper(cfg, read_tree(folder, "mine"), "A")["notes"]
    assert any("1 cells of table1 are not those of eval/reference/table1.csv" in note for note in notes)


# ---- text, page, JSON, command ----


class Page(HTMLParser):
    """Tags that are open, and addresses that a browser would load."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "data") and value]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_escapes(one, other):
    cfg, folder = one
    rewrite(cfg, other, OFFLINE, "pickapic_test", "pick_score", lambda f: f.assign(score=f["score"] + 0.01))
    write_record(other, OFFLINE, record(OFFLINE, versions={"torch": "<script>alert(1)</script>"}))
    found = compared(cfg, folder, finished(cfg, other))
    text = to_html(found)
    page = Page(text)
    assert page.open == [] and page.loads == [] and not page.tags & {"script", "link", "img", "iframe"}
    assert "&lt;script&gt;" in text and "url(" not in text and "prefers-color-scheme: dark" in text
    assert "+1.000" in text and ">higher</span>" in text
    assert text.count("<tr>") > 12, "all cells, not those alone that differ"
    assert Page(to_html(compare.with_paper(cfg, read_tree(folder, "mine"), "A"))).open == []


def command(*words) -> subprocess.CompletedProcess:
    root = Path(compare.__file__).resolve().parent.parent
    line = [sys.executable, "-m", "eval.compare", *map(str, words)]
    return subprocess.run(line, cwd=root, capture_output=True, text=True)


def asked(*words) -> dict:
    """The same in this process."""
    return compare.run(compare.arguments().parse_args([str(word) for word in words]))


def test_exit_codes_and_files(one, other, tmp_path):
    cfg, folder = one
    equal = command(folder, other)
    assert (equal.returncode, equal.stderr) == (0, "")
    rewrite(cfg, other, OFFLINE, "pickapic_test", "pick_score", lambda f: f.assign(score=f["score"] + 0.001))
    finished(cfg, other)
    out, data = tmp_path / "page.html", tmp_path / "found.json"
    changed = command(folder, other, "--out", out, "--json", data)
    assert changed.returncode == 1 and "1 higher" in changed.stdout and changed.stderr == ""
    found = json.loads(data.read_text())
    assert found["cells"]["counts"]["higher"] == 1 and found["differs"] is True
    assert data.read_text() == json.dumps(found, indent=2, sort_keys=True) + "\n"
    assert str(tmp_path) not in data.read_text() + out.read_text() + changed.stdout
    assert to_html(found) == out.read_text(), "the page is made of what the JSON has"
    assert [compare.differs(found, kind) for kind in compare.KINDS] == [False, False, True, True]
    rewrite(cfg, other, OFFLINE, "pickapic_test", "pick_score", spec={"name": "other"})
    refused = command(folder, other)
    assert refused.returncode == 2 and refused.stdout == "" and "eval.compare: 1 of 12 cells" in refused.stderr


def test_trees_of_which_all_is_left_out_are_not_said_to_agree(one, other):
    cfg, folder = one
    for row in EXISTING.values():
        for eval_set in EVAL_SETS:
            for metric in METRICS:
                rewrite(cfg, other, row, eval_set, metric, spec={"name": "another"})
    words = folder, finished(cfg, other), "--skip-incomparable", "--fail-on"
    for kind in ("verdicts", "cells"):
        with pytest.raises(UserError, match=f"nothing of what --fail-on {kind} names could be compared") as refusal:
            asked(*words, kind)
        for line in (
            "Directions: 88 compared (none measured in both), 8 left out",
            "Claims: none compared, 1 left out",
        ):
            assert line in str(refusal.value)
        assert ("Cells: none compared" in str(refusal.value)) == (kind == "cells")
        assert "Left out: scorer of clip_score: name is clip_score in A and another in B" in str(refusal.value)
    assert asked(*words, "anything")["differs"], "a scorer is of what it names"
    found = asked(*words, "nothing")
    assert not found["differs"] and found["left_out"]["cells"] == 12
    text = to_text(found)
    assert "Cells: none compared" in text and "--fail-on nothing: exit code 0, whatever was found" in text
    refused = command(*words, "cells")
    assert refused.returncode == 2 and refused.stdout == ""


def test_tables_alone_have_no_verdicts_to_agree_on(one, other):
    cfg, folder = one
    for tree_of in (folder, other / "miniature"):
        for name in ("tables/table1.diff.json", "claims.json"):
            (tree_of / name).unlink()
    with pytest.raises(
        UserError, match="(?s)--fail-on verdicts names.*Directions: not compared.*`python -m eval.claims`"
    ):
        asked(folder, other, "--fail-on", "verdicts")
    assert not asked(folder, other, "--fail-on", "cells")["differs"]
    path = folder / "tables/table1.csv"
    columns = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    pd.read_csv(path).assign(**dict.fromkeys(columns)).to_csv(path, index=False)
    shutil.copy(path, other / "miniature/tables/table1.csv")
    for kind in ("cells", "anything"):
        with pytest.raises(UserError, match="Cells: none compared; [0-9]+ more have a number in neither"):
            asked(folder, other, "--fail-on", kind)


def test_what_was_not_measured_is_not_said_to_agree_with_the_paper(one):
    cfg, folder = one
    path = folder / "tables/table1.diff.json"
    told = json.loads(path.read_text())
    for entry in told["directions"]:
        entry |= {"difference": None, "interval": None, "verdict": "missing: not built yet"}
    path.write_text(json.dumps(told))
    assert compare.num_compared(asked(folder, "paper"), "cells") == 1, "its claim"
    (folder / "claims.json").unlink()
    with pytest.raises(UserError, match="--fail-on cells names could be compared(?s:.*)Directions: 96 missing"):
        asked(folder, "paper")


def test_which_folder_is_meant(one, other, tmp_path):
    cfg, folder = one
    make(tmp_path / "one", records=False, scale="smoke")
    for words, said in [
        ((tmp_path / "none", folder), r"A is '.*none', which is no folder; expected the folder of a scale"),
        (
            (tmp_path / "one", folder),
            "A is .*, which holds miniature and smoke; give one of them, as --scale miniature",
        ),
        ((folder, folder / "tables"), r"B is .*tables', which has no tables/\*\.csv.*`snakemake"),
        (("paper", "paper"), "A and B are both the paper"),
        ((folder, other, "--tables", "table2"), "--tables names table2, which A .* has not; it has table1"),
    ]:
        with pytest.raises(UserError, match=said):
            asked(*words)
    assert asked(tmp_path / "one", other, "--scale", "miniature")["a"]["name"] == "one/miniature"
    assert asked(folder, "paper")["b"]["scale"] is None
    assert asked("paper", other)["a"]["scale"] is None


def test_a_table_of_an_old_form_is_a_sentence_and_a_copy_of_a_run_is_none(one, other):
    cfg, folder = one
    run = paths.run_dir("miniature", "preference", OFFLINE.model, OFFLINE.method, 0, other)
    shutil.copytree(run, run.parent / "seed0_old")
    assert compared(cfg, folder, other / "miniature")["cells"]["equal"] == 12
    path = folder / "tables/table1.csv"
    pd.read_csv(path).drop(columns="num_prompts").to_csv(path, index=False)
    with pytest.raises(UserError, match=r"table1\.csv lacks num_prompts; delete it and run `snakemake"):
        opened(folder, other / "miniature")


OLD_FORMS = [
    ("tables/table1.diff.json", lambda told: told.pop("cells"), "has no `cells`.*`python -m eval.diff --table table1`"),
    ("tables/table1.diff.json", lambda told: told["cells"][3].pop("ours"), r"has no `cells\.3\.ours`"),
    (
        "tables/table1.diff.json",
        lambda told: told["directions"][0].update(interval=[0.1]),
        r"`directions\.0\.interval`",
    ),
    ("claims.json", lambda told: told[0].pop("paper"), r"has no `0\.paper`.*`python -m eval\.claims` makes it anew"),
    ("claims.json", lambda told: told[0].update(estimate="0.1"), r"`0\.estimate` is '0\.1'; expected another form"),
    ("claims.json", lambda told: told[0].update(eval_sets="all"), r"`0\.eval_sets` is 'all'"),
]


@pytest.mark.parametrize(("name", "change", "said"), OLD_FORMS)
def test_json_of_another_form_is_a_sentence(one, name, change, said):
    _, folder = one
    told = json.loads((folder / name).read_text())
    change(told)
    (folder / name).write_text(json.dumps(told))
    with pytest.raises(UserError, match=rf"{name}.*{said}"):
        read_tree(folder, "mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_runs": np.nan}, f"num_runs of {ONLINE.label}, pickapic_test is nan, but the row has numbers"),
        ({"num_prompts": np.inf}, "num_prompts of .* is nan, .* expected a whole number from 1; delete it"),
        ({"num_images": 0}, "num_images of .* is 0"),
        ({"steps": 2.5}, "steps of .* is 2.5"),
        ({"pick_score_low": "x"}, "has text in pick_score_low; expected numbers"),
    ],
)
def test_a_table_that_no_row_can_be_read_of_is_a_sentence(one, change, said):
    _, folder = one
    path = folder / "tables/table1.csv"
    frame_of = pd.read_csv(path).astype(dict.fromkeys(change, object))
    frame_of.loc[frame_of["label"] == ONLINE.label, list(change)] = list(change.values())
    frame_of.to_csv(path, index=False)
    with pytest.raises(UserError, match=rf"table1\.csv.*{said}"):
        read_tree(folder, "mine")


def test_names_tell_trees_apart_and_nothing_more():
    assert names_of(Path("/a/b/results/smoke")) == ["results/smoke"]
    assert names_of(Path("/a/results/smoke"), Path("/b/results/smoke")) == ["a/results/smoke", "b/results/smoke"]
    assert names_of(Path("/a/results/smoke"), Path("/a/results/smoke")) == ["results/smoke", "results/smoke"]


def test_rows_that_are_concerned_are_named():
    group = {
        "what": "protocol",
        "field": "grid",
        "a": None,
        "b": [1],
        "within": None,
        "rows": {"table1": "all", "table2": ["X", "Y"]},
    }
    assert sentence(group) == "protocol: grid is nothing in A and [1] in B (all rows of table1; table2: X, Y)"
