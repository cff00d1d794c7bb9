"""Verdicts on made-up scores, and that text and JSON are the same."""

import json

import pytest
from synthetic import (
    EVAL_SETS,
    NAIVE,
    NUM_PROMPTS,
    NUM_SEEDS,
    ROWS,
    claim,
    config,
    frame,
    metric,
    scores_path,
    table,
    write_scores,
    write_tree,
)

from eval.claims import bound_of, judge, judge_all, remark, to_markdown, write
from eval.sections.claims import section
from eval.sections.page import Context
from eval.stats import Estimate
from pso.entries import UNTUNED
from pso.paths import run_dir, scores_file
from pso.provenance import UserError

CLAIMS = {
    "online_above": claim(),
    "naive_below": claim(left=NAIVE.label, relation="below", group="Figure 1(b)"),
    "naive_above": claim(left=NAIVE.label, group="Figure 1(b)"),
    "online_not_below": claim(metric="clip_score", relation="not_below", margin=0.001),
    "naive_not_below": claim(left=NAIVE.label, metric="clip_score", relation="not_below", margin=0.001),
    "online_keeps_sharpness": claim(metric="sharpness", relation="at_least_share", share=0.95),
    "naive_keeps_sharpness": claim(left=NAIVE.label, metric="sharpness", relation="at_least_share", share=0.98),
    "dpo_above": claim(left="SDXL-DPO"),
    "same": claim(left="SDXL"),
}
VERDICTS = {
    "online_above": "holds",
    "naive_below": "holds",
    "naive_above": "fails",
    "online_not_below": "holds",
    "naive_not_below": "fails",
    "online_keeps_sharpness": "holds",
    "naive_keeps_sharpness": "fails",
    "dpo_above": "inconclusive",
    "same": "inconclusive",
}


def judged(results, **changes) -> dict[str, dict]:
    cfg = config(**({"claims": CLAIMS} | changes))
    return {entry["id"]: entry for entry in judge_all(cfg, write_tree(cfg, results))}


def test_verdicts(tmp_path):
    found = judged(tmp_path)
    assert {name: entry["verdict"] for name, entry in found.items()} == VERDICTS
    assert found["online_above"]["estimate"] == pytest.approx(2.0, abs=0.3)  # 0.02, printed x 100
    assert found["online_keeps_sharpness"]["estimate"] == pytest.approx(1.02, abs=0.005)
    assert found["dpo_above"]["reason"] == "row SDXL-DPO: not built yet"
    assert found["dpo_above"]["estimate"] is None


@pytest.mark.parametrize(
    ("relation", "low", "high", "p", "verdict"),
    [
        ("above", 0.1, 0.3, 0.01, "holds"),
        ("above", 0.1, 0.3, 0.06, "inconclusive"),  # Holm's p decides too
        ("above", 0.0, 0.3, 0.01, "inconclusive"),
        ("above", -0.3, -0.1, 0.01, "fails"),
        ("below", -0.3, -0.1, 0.01, "holds"),
        ("below", -0.3, -0.1, 0.05, "inconclusive"),
        ("below", -0.3, 0.1, 0.01, "inconclusive"),
        ("below", 0.1, 0.3, 0.9, "inconclusive"),
        ("below", 0.1, 0.3, 0.01, "fails"),
        ("not_below", -0.01, 0.3, 0.9, "inconclusive"),
        ("not_below", -0.01, 0.3, 0.01, "holds"),
        ("not_below", -0.03, 0.3, 0.01, "inconclusive"),
        ("not_below", -0.3, -0.03, 0.01, "fails"),
        ("at_least_share", 0.96, 0.99, 0.01, "holds"),
        ("at_least_share", 0.94, 0.99, 0.01, "inconclusive"),
        ("at_least_share", 0.8, 0.94, 0.01, "fails"),
    ],
)
def test_rule(relation, low, high, p, verdict):
    entry = claim(relation=relation, margin=0.02, share=0.95 if relation == "at_least_share" else None)
    estimate = Estimate((low + high) / 2, low, high, 10, 10, p)
    bound = bound_of(config(metrics={"pick_score": metric("PickScore")}), entry)
    assert judge(entry, estimate, p, bound) == verdict


@pytest.mark.parametrize(
    ("relation", "low", "high", "verdict", "said"),
    [
        ("not_below", -0.01, 0.01, "holds", None),
        ("not_below", -0.01, -0.001, "holds", "a loss, but a tolerated one"),
        ("not_below", -0.03, -0.001, "inconclusive", "a loss; tolerated or not is open"),
        ("not_below", -0.3, -0.03, "fails", "a loss"),
        ("at_least_share", 0.96, 0.99, "holds", "a loss, but a tolerated one"),
        ("at_least_share", 0.96, 1.01, "holds", None),
        ("above", -0.3, -0.1, "fails", None),
    ],
)
def test_a_loss_is_called_a_loss(relation, low, high, verdict, said):
    entry = claim(relation=relation, margin=0.02, share=0.95 if relation == "at_least_share" else None)
    assert remark(entry, Estimate((low + high) / 2, low, high, 10, 10, 0.01), verdict) == said


def test_the_margin_is_in_units_of_the_score():
    entry = claim(relation="not_below", margin=0.02)
    assert bound_of(config(), entry) == -2.0  # PickScore is printed x 100


def test_eval_sets_are_pooled_and_their_prompts_stay_apart(tmp_path):
    entry = judged(tmp_path)["online_above"]
    assert (entry["n"], entry["prompts"]) == (2 * NUM_PROMPTS * NUM_SEEDS, 2 * NUM_PROMPTS)
    by_hand = [
        100 * (frame(ROWS[4], e, "pick_score")["score"] - frame(ROWS[2], e, "pick_score")["score"]).mean()
        for e in EVAL_SETS
    ]
    assert entry["estimate"] == pytest.approx(sum(by_hand) / 2)


def test_holm_counts_every_declared_claim(tmp_path):
    alone = judged(tmp_path, claims={"online_above": claim()})["online_above"]
    beside = judged(
        tmp_path, claims={"online_above": claim(), "dpo": claim(left="SDXL-DPO"), "same": claim(left="SDXL")}
    )
    assert alone["p_value_holm"] == alone["p_value"] == beside["online_above"]["p_value"]
    assert beside["online_above"]["p_value_holm"] == pytest.approx(3 * alone["p_value"])
    assert beside["dpo"]["p_value_holm"] is None


def test_training_seeds_are_told(tmp_path):
    cfg = config(seeds=[0, 1], claims=CLAIMS)
    found = {entry["id"]: entry for entry in judge_all(cfg, write_tree(cfg, tmp_path))}
    entry = found["online_above"]
    assert entry["training_seeds"] == {"left": [0, 1], "right": []}
    by_seed = entry["estimate_by_training_seed"]
    assert sum(by_seed.values()) / 2 == pytest.approx(entry["estimate"])
    assert entry["prompts"] == 2 * NUM_PROMPTS  # more runs are no more prompts
    assert entry["n"] == 2 * NUM_PROMPTS * NUM_SEEDS
    text = to_markdown(cfg, list(found.values()))
    assert "2 training seed(s) on the left, 0 on the right, seed 0: +" in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"right": NAIVE.label}, "; 2 training seed(s), seed 1: +"),
        ({"left": "SDXL", "right": NAIVE.label}, "; 0 training seed(s) on the left, 2 on the right, seed 1: +"),
    ],
)
def test_an_estimate_of_one_training_seed_is_of_that_seed_in_both_rows(tmp_path, changes, told):
    cfg = config(seeds=[1, 2], claims={"one": claim(**changes)})
    found = judge_all(cfg, write_tree(cfg, tmp_path))
    left, right = (next(r for r in [*ROWS, NAIVE] if r.label == found[0][side]) for side in ("left", "right"))
    for seed in (1, 2):
        gaps = [
            frame(left, e, "pick_score", 0 if left.method == UNTUNED else seed)["score"]
            - frame(right, e, "pick_score", seed)["score"]
            for e in EVAL_SETS
        ]
        by_hand = 100 * sum(gap.mean() for gap in gaps) / 2
        assert found[0]["estimate_by_training_seed"][str(seed)] == pytest.approx(by_hand, rel=1e-9)
    assert list(found[0]["estimate_by_training_seed"]) == ["1", "2"] and told in to_markdown(cfg, found)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, [ROWS[4].label]),
        ({"left": "SDXL-DMD2", "right": ROWS[4].label, "relation": "below"}, [ROWS[4].label]),
        ({"left": NAIVE.label, "right": ROWS[3].label}, [ROWS[3].label]),  # on a copy
        ({"right": ROWS[3].label}, [ROWS[4].label, ROWS[3].label]),
        ({"left": NAIVE.label}, []),
        ({"metric": "clip_score"}, []),
    ],
)
def test_a_claim_about_what_either_row_was_trained_on_is_no_evidence(tmp_path, changes, labels):
    methods = config().methods | {"pso_offline": config().methods["pso_offline"].model_copy(update={"reward": "lite"})}
    metrics = config().metrics | {"lite": metric("Lite", copy_of="pick_score")}
    cfg = config(methods=methods, metrics=metrics, claims={"one": claim(**changes)})
    (entry,) = write(cfg, write_tree(cfg, tmp_path))
    assert entry["is_training_reward"] == bool(labels)
    told = f"{' and '.join(labels)}: trained on PickScore or a copy of it, so"
    for text in ((tmp_path / "miniature/claims.md").read_text(), section(Context(cfg, tmp_path))):
        assert (told in text) == ("no independent evidence" in text) == bool(labels)


def test_text_and_json_are_the_same(tmp_path):
    cfg = config(claims=CLAIMS)
    written = write(cfg, write_tree(cfg, tmp_path))
    found = json.loads((tmp_path / "miniature/claims.json").read_text())
    text = (tmp_path / "miniature/claims.md").read_text()
    assert isinstance(found, list) and found == written
    assert [entry["id"] for entry in found] == list(CLAIMS)
    needed = {"id", "group", "text", "source", "left", "right", "metric", "relation", "n", "prompts", "estimate"}
    assert needed | {"interval", "p_value", "p_value_holm", "verdict"} <= set(found[0])
    assert "**9 claims: 4 holds, 3 fails, 2 inconclusive.**" in text
    assert "Scale miniature: a stand-in world" in text and "Holm's p < 0.05" in text
    assert "Online-PSO w/ SDXL-DMD2: trained on PickScore or a copy of it, so this is no independent evidence" in text
    for entry in found:
        assert f"`{entry['id']}`" in text
        if entry["estimate"] is None:
            assert f"not measured: {entry['reason']}" in text
        else:
            sign = "" if entry["relation"] == "at_least_share" else "+"
            numbers = (entry["estimate"], *entry["interval"])
            shown = [tuple(f"{value:{sign}.{d}f}" for value in numbers) for d in range(3, 9)]
            assert any(f"| {value} " in text and f"[{low}, {high}]" in text for value, low, high in shown)
            assert f"scorer {entry['scorer']['digest']}" in text


def test_missing_columns_and_tables_are_inconclusive(tmp_path):
    claims = {"reward": claim(metric="image_reward"), "sharp": claim(metric="sharpness")}
    metrics = {**config().metrics, "sharpness": metric("Sharpness", only_scales=["smoke"])}
    found = judged(tmp_path, claims=claims, metrics=metrics)
    assert found["reward"]["reason"] == "column image_reward: not built yet"
    assert found["sharp"]["reason"] == "column sharpness: exists only at scale smoke"
    assert {entry["verdict"] for entry in found.values()} == {"inconclusive"}
    elsewhere = judged(tmp_path, tables=[])
    assert {entry["reason"] for entry in elsewhere.values()} == {"config.tables does not list table1"}


def test_the_papers_own_cells_stand_beside_the_verdict(tmp_path):
    claims = {
        "true": claim(),
        "false": claim(text="Online-PSO raises the CLIP score.", metric="clip_score"),
        "unprinted": claim(text="Online-PSO stays sharp.", metric="sharpness"),
        "equal": claim(text="Equal.", left="SDXL-DMD2", right="SDXL", metric="clip_score", eval_sets=["parti_prompts"]),
    }
    cfg = config(claims=claims)
    found = {entry["id"]: entry for entry in judge_all(cfg, write_tree(cfg, tmp_path))}
    assert {name: entry["paper"]["verdict"] for name, entry in found.items()} == {
        "true": "holds", "false": "does not hold", "unprinted": "not printed", "equal": "equal",
    }  # fmt: skip
    assert found["false"]["verdict"] == "holds"  # ours is judged from our scores alone
    text = to_markdown(cfg, list(found.values()))
    assert "printed numbers: 1 holds, 1 does not hold, 1 not printed, 1 equal." in text
    for line in (li for li in text.splitlines() if li.startswith("| ")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        entry = next((e for e in found.values() if e["text"] == cells[0]), None)
        assert entry is None or cells[2] == entry["paper"]["verdict"]
    section = text.split("## False in the paper's own tables")[1].split("\n## ")[0]
    assert (
        "- Online-PSO raises the CLIP score. Online-PSO w/ SDXL-DMD2 against SDXL-DMD2: 0.3671 against 0.3679 on "
        in section
    )
    assert "0.3634 against 0.3607 on parti_prompts: holds. (`false`)" in section
    assert not any(f"`{name}`" in section for name in ("true", "unprinted", "equal"))
    assert "the text says 22.77" in section and "50 steps in the table, 25 in Section 3.1" in section


def test_nothing_false_is_said_too(tmp_path):
    cfg = config()
    text = to_markdown(cfg, judge_all(cfg, write_tree(cfg, tmp_path)))
    assert "None of them." in text.split("## False in the paper's own tables")[1].split("\n## ")[0]


def test_too_few_prompts_are_said(tmp_path):
    claims = {f"c{i}": claim(eval_sets=["parti_prompts"]) for i in range(250)}
    cfg = config(claims=claims, scale_entry=config().scale_entry.model_copy(update={"bootstrap_resamples": 20}))
    entry = judge_all(cfg, write_tree(cfg, tmp_path))[0]
    assert entry["p_value"] == pytest.approx(2e-4) and entry["interval"][0] > 0
    assert (entry["verdict"], entry["remark"]) == (
        "inconclusive",
        "30 prompts or subjects cannot decide one of 250 claims",
    )
    assert "**inconclusive** (30 prompts or subjects cannot decide one of 250 claims)" in to_markdown(cfg, [entry])


def test_subjects_are_what_decides_where_a_table_has_them(tmp_path):
    subjects = [f"s{i}" for i in range(10)]
    claims = {f"c{i}": claim(eval_sets=["parti_prompts"], left=ROWS[4].label) for i in range(85)}
    cfg = config(claims=claims, table_entries={"table1": table(task="concept", subjects=subjects)})
    for subject in subjects:
        for row in (ROWS[2], ROWS[4]):
            run = run_dir(cfg.scale, f"concept/{subject}", row.model, row.method, 0, tmp_path)
            path = scores_file(run, "parti_prompts", row.steps, "pick_score")
            write_scores(path, frame(row, "parti_prompts", "pick_score"), row, "parti_prompts", "pick_score")
    entry = write(cfg, tmp_path)[0]
    assert (entry["n"], entry["prompts"]) == (10 * NUM_PROMPTS * NUM_SEEDS, 10 * NUM_PROMPTS)
    assert entry["p_value"] == pytest.approx(2 / 2**10)  # all 10 subjects are above
    assert entry["remark"] == "10 prompts or subjects cannot decide one of 85 claims"
    assert "| 100.0% of subjects |" in (tmp_path / "miniature/claims.md").read_text()
    page = section(Context(cfg, tmp_path))
    assert "left above on 100.0% of subjects" in page and "% of prompts" not in page


def test_a_claim_without_numbers_tells_why_beside_its_verdict(tmp_path):
    cfg = config(claims={"dpo": claim(left="SDXL-DPO"), "reward": claim(metric="image_reward", relation="not_below")})
    text = to_markdown(cfg, judge_all(cfg, write_tree(cfg, tmp_path)))
    assert "| **inconclusive** (row SDXL-DPO: not built yet) " in text
    assert "| **inconclusive** (column image_reward: not built yet) " in text


def test_an_impossible_ratio_is_inconclusive(tmp_path):
    cfg = config(claims={"share": claim(metric="sharpness", relation="at_least_share", share=0.95)})
    write_tree(cfg, tmp_path)
    flat = frame(ROWS[2], "parti_prompts", "sharpness").assign(score=0.0)
    write_scores(
        scores_path(cfg, tmp_path, ROWS[2], "parti_prompts", "sharpness"), flat, ROWS[2], "parti_prompts", "sharpness"
    )
    (entry,) = judge_all(cfg, tmp_path)
    assert (entry["verdict"], entry["reason"]) == (
        "inconclusive", "a ratio needs scores above 0 on its right side; use a difference."
    )  # fmt: skip


def test_a_missing_file_is_an_error_and_writes_nothing(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    scores_path(cfg, tmp_path, ROWS[4], "parti_prompts", "pick_score").unlink()
    with pytest.raises(UserError, match="is not there; make it with"):
        write(cfg, tmp_path)
    assert not (tmp_path / "miniature/claims.json").exists()


def test_other_scorers_on_one_eval_set_are_refused(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    for row in (ROWS[2], ROWS[4]):
        path = scores_path(cfg, tmp_path, row, "parti_prompts", "pick_score")
        write_scores(
            path, frame(row, "parti_prompts", "pick_score"), row, "parti_prompts", "pick_score", spec={"dtype": "bf16"}
        )
    with pytest.raises(UserError, match="different scorers"):
        judge_all(cfg, tmp_path)
