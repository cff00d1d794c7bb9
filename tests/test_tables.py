"""The paper's tables from made-up scores: numbers, order, marks, reasons, LaTeX."""

import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
from synthetic import EVAL_SETS, NAIVE, ROWS, config, frame, metric, scores_path, table, write_scores, write_tree

from eval.tables import build, digits, escape_latex, main, to_latex, to_markdown, write
from pso.config import load
from pso.entries import UNTUNED, Checkpoint, Row
from pso.provenance import UserError
from pso.trained_on import same_judge, trained_on


def blocks(markdown: str) -> list[list[list[str]]]:
    """Per eval set the cells of every line of its table, head first."""
    found = []
    for part in markdown.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("|:")]
        found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    return found


def test_csv_holds_means_in_printed_units(tmp_path):
    cfg = config(seeds=[0, 1])
    write(cfg, write_tree(cfg, tmp_path), "table1")
    found = pd.read_csv(tmp_path / "miniature/tables/table1.csv")
    assert list(found["eval_set"].unique()) == list(EVAL_SETS)
    assert list(found["label"][:6]) == [row.label for row in [*ROWS, NAIVE]]
    assert {"sharpness", "sharpness_low", "sharpness_high", "status"} <= set(found)
    for line in found[found["status"].isna()].to_dict("records"):
        row = next(row for row in [*ROWS, NAIVE] if row.label == line["label"])
        seeds = [0] if row.method == UNTUNED else [0, 1]
        by_hand = pd.concat([frame(row, line["eval_set"], "pick_score", seed) for seed in seeds])
        assert line["pick_score"] == pytest.approx(100 * by_hand["score"].mean())
        assert line["pick_score_low"] < line["pick_score"] < line["pick_score_high"]
        assert (line["num_prompts"], line["num_images"], line["num_runs"]) == (30, 60 * len(seeds), len(seeds))
        assert pd.isna(line["image_reward"])


def test_markdown_is_as_declared(tmp_path):
    cfg = config()
    text = to_markdown(cfg, "table1", build(cfg, write_tree(cfg, tmp_path), "table1"))
    assert len(blocks(text)) == 2
    for head, *lines in blocks(text):
        assert head == ["Method", "Steps", "PickScore", "CLIP", "image reward", "† Sharpness", "Note"]
        labels = [line[0] for line in lines]
        assert labels == [*(row.label for row in ROWS), "*not in the paper:*", f"† {NAIVE.label}"]
        by_label = {line[0]: line[1:] for line in lines}
        assert by_label["SDXL-DPO"] == ["50", "–", "–", "–", "–", "not built yet"]
        best = by_label["Online-PSO w/ SDXL-DMD2"]
        assert best[1].startswith("**") and best[1].endswith("‡**") and best[2].startswith("**")
        assert sum("**" in line[2] for line in lines) == 1
        assert "‡" not in "".join(by_label["SDXL-DMD2"])
    assert "Scale miniature: a stand-in world." in text
    assert "PickScore was the training reward of Online-PSO w/ SDXL-DMD2 (‡)." in text
    assert "– in image reward: not built yet." in text


def constant_tree(cfg, results, values: dict[str, float]):
    """Every image of a row has the same score: the value of its method and model."""
    entry = cfg.table_entries["table1"]
    for row in entry.all_rows:
        for eval_set in entry.eval_sets if row.missing is None else ():
            for name in ("pick_score", "clip_score", "sharpness"):
                scores = frame(row, eval_set, name).assign(score=values[row.label])
                write_scores(scores_path(cfg, results, row, eval_set, name), scores, row, eval_set, name)
    return results


def test_best_is_as_printed_and_follows_the_direction(tmp_path):
    values = [0.22001, 0.22002, 0.21, 0.2, 0.19]
    rows = [row for row in ROWS if row.missing is None]
    labels = dict(zip([row.label for row in [*rows, NAIVE]], values, strict=True))
    metrics = {**config().metrics, "sharpness": metric("Sharpness", decimals=3, higher_is_better=False)}
    cfg = config(metrics=metrics)
    text = to_markdown(cfg, "table1", build(cfg, constant_tree(cfg, tmp_path, labels), "table1"))
    for _, *lines in blocks(text):
        assert [line[0] for line in lines if "**" in line[2]] == ["SDXL", "SDXL-DMD2"]  # 22.00, a tie as printed
        assert [line[0] for line in lines if "**" in line[5]] == [f"† {NAIVE.label}"]  # lower is better


# ---- what a row was trained on ----


def test_a_row_is_marked_on_every_metric_that_judges_as_its_reward(tmp_path):
    weights = Checkpoint(repo="someone/PickScore")
    metrics = config().metrics | {
        "pick_score": metric("PickScore", decimals=2, scale=100.0, checkpoint=weights),
        "lite": metric("Lite", checkpoint=weights),
    }
    methods = config().methods | {"pso_offline": config().methods["pso_offline"].model_copy(update={"reward": "lite"})}
    cfg = config(metrics=metrics, methods=methods)
    text = to_markdown(cfg, "table1", build(cfg, write_tree(cfg, tmp_path), "table1"))
    for _, *lines in blocks(text):
        marked = {line[0]: [i for i, cell in enumerate(line) if "‡" in cell] for line in lines}
        assert {label: cells for label, cells in marked.items() if cells} == {ROWS[3].label: [2], ROWS[4].label: [2]}
    assert f"Lite was the training reward of {ROWS[3].label} (‡ in PickScore: the same judge or a copy of it)." in text
    assert f"- PickScore was the training reward of {ROWS[4].label} (‡)." in text


@pytest.mark.parametrize("scale", ["miniature", "paper"])
def test_which_of_the_shipped_metrics_are_one_judge(scale):
    cfg = load({"scale": scale})
    judges = [
        {"pick_score", "spm_lite", "spm_distilled", "spm_released"},
        {"clip_score", "clip_score_aa", "clip_score_pil", "clip_t_h14"},  # a picture's and a text's cosine by ViT-H-14
    ]
    for one, other in combinations(cfg.metrics, 2):
        assert same_judge(cfg, one, other) == any({one, other} <= judge for judge in judges), (one, other)
    for method in ("pso_online", "spo", "spo_transplant", "spo_adapted"):
        assert trained_on(cfg, method, "pick_score") and not trained_on(cfg, method, "clip_score")
    assert not trained_on(cfg, "pso_offline", "pick_score") and not trained_on(cfg, UNTUNED, "pick_score")


CLIP = Checkpoint(repo="someone/clip")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"settings": {"transform": "other"}, "module": "eval.metrics.other"}, True),
        ({"checkpoint": CLIP.model_copy(update={"revision": "abc1234"})}, False),
        ({"checkpoint": CLIP.model_copy(update={"revision": None})}, True),
        ({"checkpoint": CLIP.model_copy(update={"file": "other.pt"})}, False),
        ({"head": Checkpoint(repo="someone/aesthetics")}, False),  # a backbone is no judge
        ({"compared_with": "pictures"}, False),
        ({"checkpoint": None}, False),
        ({"checkpoint": Checkpoint(repo="else/where"), "copy_of": "clip"}, True),
    ],
)
def test_the_same_files_asked_the_same_are_one_judge(changes, same):
    clip = metric("CLIP", checkpoint=CLIP.model_copy(update={"revision": "1234abc"}))
    cfg = config(metrics={"clip": clip, "other": clip.model_copy(update=changes)})
    assert same_judge(cfg, "clip", "other") == same_judge(cfg, "other", "clip") == same
    assert not same_judge(cfg, "clip", "yet_to_come") and same_judge(cfg, "yet_to_come", "yet_to_come")


@pytest.mark.parametrize("compared_with", ["untuned", "siblings"])
def test_nothing_is_best_of_a_column_that_tells_how_far_from_the_untuned_model(tmp_path, compared_with):
    cfg = config(metrics={**config().metrics, "sharpness": metric("Drift", decimals=3, compared_with=compared_with)})
    text = to_markdown(cfg, "table1", build(cfg, write_tree(cfg, tmp_path), "table1"))
    for _, *lines in blocks(text):
        assert any("**" in line[5] for line in lines) == (compared_with == "siblings")


@pytest.mark.parametrize(("name", "places"), [("table1", 2), ("table4", 4), ("validation", 3)])
def test_decimals_are_the_papers_for_each_table(tmp_path, name, places):
    metrics = {**config().metrics, "pick_score": metric("PickScore", decimals=3, scale=100.0)}
    cfg = config(metrics=metrics)
    built = build(cfg, write_tree(cfg, tmp_path), "table1")
    cfg = config(metrics=metrics, table_entries={name: table()})
    value = built.loc[(built["label"] == "SDXL") & (built["eval_set"] == "pickapic_test"), "pick_score"].item()
    line = next(li for li in to_markdown(cfg, name, built).splitlines() if li.startswith("| SDXL "))
    assert line.split("|")[3].strip() == f"{value:.{places}f}"
    assert f"SDXL & 50 & {value:.{places}f} &" in to_latex(cfg, name, built)


def test_dropped_images_are_shown(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    for row in [row for row in [*ROWS, NAIVE] if row.missing is None]:
        path = scores_path(cfg, tmp_path, row, "parti_prompts", "sharpness")
        scores = frame(row, "parti_prompts", "sharpness").iloc[2:]
        write_scores(path, scores, row, "parti_prompts", "sharpness", num_images=60, dropped={"unreadable": 2})
    text = to_markdown(cfg, "table1", build(cfg, tmp_path, "table1"))
    assert "- Images without a score, SDXL-DMD2 on parti_prompts: sharpness: 2 unreadable." in text


def test_rows_on_other_images_are_no_table(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    row = ROWS[2]
    scores = frame(row, "pickapic_test", "clip_score").assign(prompt_id=lambda f: "other-" + f["prompt_id"])
    write_scores(
        scores_path(cfg, tmp_path, row, "pickapic_test", "clip_score"), scores, row, "pickapic_test", "clip_score"
    )
    with pytest.raises(UserError, match="60 images only in the first, 60 only in the second"):
        write(cfg, tmp_path, "table1")
    assert not (tmp_path / "miniature/tables").exists()


def test_a_missing_file_stops_the_table(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    scores_path(cfg, tmp_path, NAIVE, "parti_prompts", "sharpness").unlink()
    with pytest.raises(UserError, match="sharpness.parquet is not there"):
        write(cfg, tmp_path, "table1")


def test_a_table_without_any_number():
    rows = [Row(label="PSO & more", steps=4, missing="100 % not built")]
    cfg = config(table_entries={"table3": table(rows=rows, extra_rows=[], extra_metrics=[])})
    built = build(cfg, Path("nowhere"), "table3")
    assert blocks(to_markdown(cfg, "table3", built))[0][1] == ["PSO & more", "4", "–", "–", "–", "100 % not built"]
    assert r"PSO \& more & 4 & -- & -- & -- & 100 \% not built \\" in to_latex(cfg, "table3", built)


def test_unknown_table():
    with pytest.raises(UserError, match="--table is 'tabel1', .* did you mean table1?"):
        build(config(), Path("nowhere"), "tabel1")


def latex(results) -> str:
    nasty = Row(label="A_B & 50% #1 {x} ~ ^ \\ $", model="sdxl_dmd2", method="pso_offline", steps=4)
    metrics = {**config().metrics, "clip_score": metric("CLIP_score & 100%")}
    cfg = config(metrics=metrics, table_entries={"table1": table(rows=[*ROWS[:3], nasty], caption="50 % & more_")})
    return to_latex(cfg, "table1", build(cfg, write_tree(cfg, results), "table1"))


def test_latex_has_equal_rows_and_no_raw_signs(tmp_path):
    text = latex(tmp_path)
    for tabular in text.split(r"\begin{tabular}")[1:]:
        width = len(tabular.split("}")[0].strip("{"))
        cells = [line.replace(r"\&", "").count("&") + 1 for line in tabular.splitlines() if line.endswith(r"\\")]
        assert set(cells) <= {width, 1}  # 1: the line that names the eval set
    assert r"A\_B \& 50\% \#1 \{x\} " in text
    assert not set("†‡–") & set(text)
    assert text.count(r"\cmidrule") == 4  # above the extra rows: 2 eval sets, 2 panels


def test_digits_show_the_width_of_an_interval():
    assert digits(3, [1.0, 2.0]) == 3
    assert digits(1, [-0.00034, -0.00012]) == 5
    assert digits(3, [1.0, 1.0]) == 3
    assert digits(3, [0.0, 1e-30]) == 8
    assert [digits(3, ends) for ends in ([math.nan, 1.0], [0.0, math.inf], [math.nan] * 2)] == [3, 3, 3]


def test_escape_latex():
    assert escape_latex(r"a_b & 5% ~^\ ") == r"a\_b \& 5\% \textasciitilde{}\textasciicircum{}\textbackslash{} "


def test_a_long_table_has_a_float_for_each_eval_set(tmp_path):
    rows = [*ROWS, *(Row(label=f"row {i}", steps=4, missing="not built yet") for i in range(20))]
    cfg = config(table_entries={"table1": table(rows=rows)})
    text = to_latex(cfg, "table1", build(cfg, write_tree(cfg, tmp_path), "table1"))
    first, second, extra = text.split(r"\end{table}")[:3]
    assert r"pickapic\_test" in first and r"parti\_prompts" not in first and r"\label{tab:table1}" in first
    assert r"parti\_prompts" in second and r"\caption{(continued)}" in second
    assert r"\addtocounter{table}{-1}" in second and "Sharpness" in extra
    assert text.count(r"\label") == 1


def test_a_negative_number_has_a_minus(tmp_path):
    cfg = config()
    built = build(cfg, write_tree(cfg, tmp_path), "table1").assign(clip_score=lambda f: f["clip_score"] - 1)
    text = to_latex(cfg, "table1", built)
    assert "& $-$0." in text and r"\textbf{$-$0." in text and not re.search(r"(& |{)-\d\.", text)
    assert "SDXL-DMD2" in text  # a hyphen stays one


def test_the_command_says_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.tables", "--table", "table1", "--results", str(tmp_path)])
    with pytest.raises(
        SystemExit, match="eval.tables: .*pick_score.parquet is not there; make it with `python -m eval"
    ):
        main()


def test_no_torch():
    code = "import sys; from eval import claims, diff, figures, scores, stats, tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
