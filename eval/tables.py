"""The paper's tables from scores: csv (numbers with intervals), md and tex (as printed). No torch.

Rows and order are those of tables.yaml. A row or column without numbers stands with its reason.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from eval.paper import printed_decimals
from eval.run_notes import run_notes
from eval.scores import (
    MANY_SUBJECTS,
    Scores,
    check_same_scorer,
    metric_title,
    pair,
    read_scores,
    table_entry,
    units,
)
from eval.stats import mean_interval
from eval.untuned import off, warning
from pso import paths
from pso.config import add_arguments, from_arguments
from pso.entries import Config, Row, TableEntry
from pso.provenance import atomic, sentences
from pso.runs import metric_missing
from pso.trained_on import same_judge, trained_on

COUNTS = ["num_prompts", "num_images", "num_runs"]
DASH = "–"
EXTRA, TRAINED_ON = "†", "‡"
LATEX_SPECIAL = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "\N{NO-BREAK SPACE}": "~"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
PAGE_COLUMNS = 5  # metrics of a LaTeX table that fit a page's width
PAGE_LINES = 40  # rows of a LaTeX table that fit a page beside its caption
LATEX_SIGNS = {DASH: "--", EXTRA: r"$\dagger$", TRAINED_ON: r"$\ddagger$"}


def all_metrics(table: TableEntry) -> list[str]:
    return [*table.metrics, *table.extra_metrics]


# ---- numbers ----


def build(config: Config, results: Path, name: str) -> pd.DataFrame:
    """One line per eval set and row: value and interval of every metric, counts, why it is missing."""
    table = table_entry(config, name)
    lines = []
    for eval_set in table.eval_sets:
        scores = _block_scores(config, results, table, eval_set)
        for row in table.all_rows:
            lines.append(_line(config, table, eval_set, row, {m: s[row.label] for m, s in scores.items()}))
    return pd.DataFrame(lines).astype(dict.fromkeys(COUNTS, "Int64"))


def _block_scores(config: Config, results: Path, table: TableEntry, eval_set: str) -> dict[str, dict]:
    """metric -> label -> Scores, or None where the row or the column is missing."""
    found: dict[str, dict[str, Scores | None]] = {}
    for metric in all_metrics(table):
        found[metric] = {row.label: None for row in table.all_rows}
        if metric_missing(config, table, metric):
            continue
        for row in table.all_rows:
            if row.missing is None:
                found[metric][row.label] = read_scores(config, results, row, eval_set, metric, table.tasks)
        present = [s for s in found[metric].values() if s is not None]
        check_same_scorer(present)
        for scores in present[1:]:
            pair(present[0], scores)  # refuses rows that were scored on other images
    return found


def _line(config: Config, table: TableEntry, eval_set: str, row: Row, scores: dict[str, Scores | None]) -> dict:
    line = {"eval_set": eval_set, "label": row.label, "model": row.model, "method": row.method, "steps": row.steps}
    scale, counts, dropped = config.scale_entry, {}, []
    for metric in all_metrics(table):
        line |= {metric: None, f"{metric}_low": None, f"{metric}_high": None}
        found = scores[metric]
        if found is None:
            continue
        frame = found.frame
        cell = mean_interval(frame["score"], resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **units(frame))
        line |= {metric: cell.value, f"{metric}_low": cell.low, f"{metric}_high": cell.high}
        num_prompts = frame["prompt_id"].nunique()
        counts = dict(zip(COUNTS, (num_prompts, cell.n_images, len(found.run_seeds)), strict=True))
        dropped += [f"{metric}: {count} {reason}" for reason, count in found.dropped.items() if count]
    return line | dict.fromkeys(COUNTS) | counts | {"dropped": "; ".join(dropped), "status": row.missing or ""}


# ---- as printed ----


def decimals(config: Config, name: str) -> dict[str, int]:
    """Metric -> digits after the point: as the paper's table prints it, else as its own entry says."""
    return {metric: entry.decimals for metric, entry in config.metrics.items()} | printed_decimals(name)


def printed(value: float, places: int) -> str:
    return DASH if pd.isna(value) else f"{value:z.{places}f}"


def digits(least: int, interval: list[float]) -> int:
    """Decimals that show an interval's width with two figures, so that no clear difference reads 0."""
    width = interval[1] - interval[0]
    return max(least, min(1 - math.floor(math.log10(width)), 8)) if 0 < width < math.inf else least


def block(config: Config, name: str, lines: pd.DataFrame, metrics: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One eval set's cells as text, and which of them are the best of their column."""
    table, places = table_entry(config, name), decimals(config, name)
    extra = {row.label for row in table.extra_rows}
    cells = pd.DataFrame({"Method": [f"{EXTRA} {la}" if la in extra else la for la in lines["label"]]})
    cells["Steps"] = lines["steps"].astype(str).to_list()
    best = pd.DataFrame(False, index=cells.index, columns=cells.columns)
    for metric in metrics:
        texts = [printed(value, places.get(metric, 0)) for value in lines[metric]]  # 0: a column without numbers
        marks = [trained_on(config, method, metric) for method in lines["method"]]
        cells[metric] = [t + TRAINED_ON if mark and t != DASH else t for t, mark in zip(texts, marks, strict=True)]
        values = pd.to_numeric(pd.Series(texts), errors="coerce")  # as printed, so that equal text is a tie
        best[metric] = values == best_of(config, metric, values)
    if lines["status"].any():
        cells["Note"], best["Note"] = lines["status"].to_list(), False
    return cells, best


def best_of(config: Config, metric: str, values: pd.Series) -> float:
    """The best value of a column; NaN, which equals nothing, where it only tells how far from the untuned model."""
    entry = config.metrics.get(metric)
    if entry is not None and entry.compared_with == "untuned":
        return math.nan
    return values.max() if entry is None or entry.higher_is_better else values.min()


def titles(config: Config, table: TableEntry, columns: list[str]) -> list[str]:
    """Column heads of a block; what is not in the paper is marked."""
    metrics = {m: metric_title(config, m) for m in table.metrics}
    metrics |= {m: f"{EXTRA} {metric_title(config, m)}" for m in table.extra_metrics}
    return [metrics.get(column, column) for column in columns]


def scale_sentence(config: Config) -> str:
    return f"Scale {config.scale}: {config.scale_entry.caption}"


def notes(config: Config, table: TableEntry, frame: pd.DataFrame, of_runs: Sequence[str] = ()) -> list[str]:
    """What a reader has to know besides the caption: one sentence each. of_runs: eval.run_notes."""
    told = [scale_sentence(config)]
    told += reward_notes(config, table)
    told.append("Bold: the best of a column within one eval set, as printed.")
    told += subject_notes(table)
    runs = frame["num_runs"].max()
    if pd.notna(runs) and runs > 1:
        told.append(f"Tuned rows are means over {int(runs)} training seeds.")
    if table.extra_rows or table.extra_metrics:
        told.append(f"{EXTRA} Not in the paper's table.")
    reasons: dict[str, list[str]] = {}
    for metric in all_metrics(table):
        if reason := metric_missing(config, table, metric):
            reasons.setdefault(reason, []).append(metric_title(config, metric))
    told += [f"{DASH} in {', '.join(columns)}: {reason}." for reason, columns in reasons.items()]
    for line in frame[frame["dropped"] != ""].itertuples():
        told.append(f"Images without a score, {line.label} on {line.eval_set}: {line.dropped}.")
    return [*told, *of_runs]


def reward_notes(config: Config, table: TableEntry) -> list[str]:
    """What rows were trained on, and which columns are marked for it."""
    rewards: dict[str, list[str]] = {}
    for row in table.shown_rows:
        method = config.methods.get(row.method)
        if method is not None and method.reward is not None:
            rewards.setdefault(method.reward, []).append(row.label)
    told = []
    for reward, labels in rewards.items():
        columns = [metric for metric in all_metrics(table) if same_judge(config, reward, metric)]
        marks = [TRAINED_ON] if reward in columns else []
        if others := [metric_title(config, metric) for metric in columns if metric != reward]:
            marks.append(f"{TRAINED_ON} in {', '.join(others)}: the same judge or a copy of it")
        mark = f" ({'; '.join(marks)})" if marks else ""
        told.append(f"{metric_title(config, reward)} was the training reward of {', '.join(labels)}{mark}.")
    return told


def subject_notes(table: TableEntry) -> list[str]:
    """How a table with subjects averages, and what its prompts were to the scorers."""
    if not table.subjects:
        return []
    return [
        f"Means over {len(table.subjects)} subjects of the means over their images; an image's likeness is its mean "
        "over the subject's real pictures, which were also trained on.",
        "The text that CLIP-T reads is the prompt without the identifier [V].",
    ]


def resampled(table: TableEntry) -> str:
    """What the intervals are a bootstrap over."""
    if not table.subjects:
        return "prompts"
    many = len(table.subjects) >= MANY_SUBJECTS
    return "subjects" if many else f"prompts within subjects, because there are fewer than {MANY_SUBJECTS}"


def unit(table: TableEntry) -> str:
    """What one row can be above another on."""
    return "subjects" if resampled(table) == "subjects" else "prompts"


def off_cells(config: Config, name: str, frame: pd.DataFrame) -> list[str]:
    """The untuned cells that are off the paper's, named."""
    measured = {}
    for line in frame[frame["status"] == ""].to_dict("records"):
        for metric in all_metrics(table_entry(config, name)):
            if pd.notna(line[metric]):
                found = (line[metric], line[f"{metric}_low"], line[f"{metric}_high"])
                measured[line["eval_set"], line["label"], metric] = found
    return off(config, name, measured)


def to_markdown(config: Config, name: str, frame: pd.DataFrame, of_runs: Sequence[str] = ()) -> str:
    table = table_entry(config, name)
    parts = [f"# {name}, scale {config.scale}", table.caption]
    if told := warning(config, off_cells(config, name, frame)):
        parts.append(f"**{told}**")
    for eval_set, lines in frame.groupby("eval_set", sort=False):
        cells, best = block(config, name, lines, all_metrics(table))
        text = cells.mask(best, "**" + cells + "**")
        if table.extra_rows:  # Markdown has no rule inside a table
            rule = pd.DataFrame([["*not in the paper:*"] + [""] * (text.shape[1] - 1)], columns=text.columns)
            text = pd.concat([text.iloc[: len(table.rows)], rule, text.iloc[len(table.rows) :]])
        align = ["right" if column in ["Steps", *all_metrics(table)] else "left" for column in text]
        text.columns = titles(config, table, list(text))
        parts += [
            f"## {heading(eval_set, lines)}",
            text.to_markdown(index=False, disable_numparse=True, colalign=align),
        ]
    parts.append("\n".join(f"- {note}" for note in notes(config, table, frame, of_runs)))
    over = resampled(table)
    parts.append(f"95 % intervals (bootstrap over {over}) are in {name}.csv; they do not cover the training seed.")
    return "\n\n".join(parts) + "\n"


def heading(eval_set: str, lines: pd.DataFrame) -> str:
    prompts = lines["num_prompts"].max()
    return eval_set if pd.isna(prompts) else f"{eval_set} ({int(prompts)} prompts)"


def escape_latex(text: str) -> str:
    return text.translate(LATEX_SPECIAL)


def as_latex(text: str) -> str:
    """A sentence for a document: special characters escaped, signs as commands."""
    text = escape_latex(text)
    for sign, command in LATEX_SIGNS.items():
        text = text.replace(sign, command)
    return text


def to_latex(config: Config, name: str, frame: pd.DataFrame, of_runs: Sequence[str] = ()) -> str:
    """Table environments of at most a page each; the document needs booktabs and nothing else."""
    table = table_entry(config, name)
    panels = [(table.metrics, frame)]
    # floats of their own: all columns side by side are wider than a page
    starts = range(0, len(table.extra_metrics), PAGE_COLUMNS)
    panels += [(table.extra_metrics[i : i + PAGE_COLUMNS], frame[frame["status"] == ""]) for i in starts]
    bodies = [_tabular(config, name, part, metrics) for metrics, lines in panels for part in _pages(lines)]
    caption = escape_latex(" ".join([table.caption, *notes(config, table, frame, of_runs)]))
    heads = [f"\\caption{{{caption}}}\n\\label{{{table.label}}}"]
    heads += ["\\addtocounter{table}{-1}\n\\caption{(continued)}"] * (len(bodies) - 1)
    # makebox centres a tabular that is wider than the text
    floats = [
        f"\\begin{{table}}[p]\n\\centering\\scriptsize\n{head}\n\\par\\medskip\n"
        f"\\makebox[\\textwidth][c]{{%\n{body}}}\n\\end{{table}}\n"
        for head, body in zip(heads, bodies, strict=True)
    ]
    latex = f"% {name}, scale {config.scale}; needs \\usepackage{{booktabs}}\n" + "".join(floats)
    for sign, command in LATEX_SIGNS.items():
        latex = latex.replace(sign, command)
    return latex


def _pages(lines: pd.DataFrame) -> list[pd.DataFrame]:
    """All eval sets together, or each on a page of its own where they are too long for one."""
    if len(lines) <= PAGE_LINES:
        return [lines]
    return [part for _, part in lines.groupby("eval_set", sort=False)]


def _tabular(config: Config, name: str, frame: pd.DataFrame, metrics: list[str]) -> str:
    table = table_entry(config, name)
    groups = list(frame.groupby("eval_set", sort=False))
    blocks = [block(config, name, lines, metrics) for _, lines in groups]
    cells = pd.concat([cells for cells, _ in blocks], ignore_index=True).fillna("")
    best = pd.concat([best for _, best in blocks], ignore_index=True)
    heads = [escape_latex(title) for title in titles(config, table, list(cells))]
    styler = cells.style.hide(axis="index").format(escape="latex").relabel_index(heads, axis=1)
    styler = styler.apply(lambda _: best.replace({True: "textbf: --rwrap;", False: ""}), axis=None)
    numbers = "r" * (1 + len(metrics)) + ("l" if "Note" in cells else "")
    latex = styler.to_latex(hrules=True, column_format="l" + numbers)
    latex = re.sub(r"(?<=[ {])-(?=\d)", "$-$", latex).splitlines()  # a minus, not a hyphen
    top = latex.index(r"\midrule")
    body = iter(latex[top + 1 : top + 1 + len(cells)])
    merged = latex[:top]
    for eval_set, lines in groups:
        title = rf"\textit{{{escape_latex(heading(eval_set, lines))}}}"
        merged += [r"\midrule", rf"\multicolumn{{{cells.shape[1]}}}{{l}}{{{title}}} \\"]
        num_paper = int((~lines["label"].isin([row.label for row in table.extra_rows])).sum())
        for place in range(len(lines)):
            merged += [rf"\cmidrule{{1-{cells.shape[1]}}}"] if place == num_paper else []
            merged.append(next(body))
    return "\n".join([*merged, *latex[top + 1 + len(cells) :]])


def write(config: Config, results: Path, name: str) -> list[str]:
    """The files; what to say about it: where they lie, and a warning where untuned rows are off."""
    frame = build(config, results, name)
    of_runs = run_notes(config, results, table_entry(config, name))
    folder = paths.scale_dir(config.scale, results) / "tables"
    texts = {
        "csv": frame.to_csv(index=False),
        "md": to_markdown(config, name, frame, of_runs),
        "tex": to_latex(config, name, frame, of_runs),
    }
    for ending, text in texts.items():
        with atomic(folder / f"{name}.{ending}") as part:
            part.write_text(text)
    told = warning(config, off_cells(config, name, frame))
    return [*(str(folder / f"{name}.{ending}") for ending in texts), *([told] if told else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description="write results/{scale}/tables/{table}.csv, .md and .tex")
    parser.add_argument("--table", required=True, help="an entry of tables.yaml, as table1")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.tables"):
        for line in write(from_arguments(args), args.results, args.table):
            print(line)


if __name__ == "__main__":
    main()
