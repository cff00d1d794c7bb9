"""A table against the paper: a paragraph, directions, cells. No torch.

Direction: is a row above or below its base row (the untuned row of the distilled model)? The paper's
comes from its printed numbers, ours from the paired difference and its 95 % interval.
Cell: the paper's number beside ours; only at scale `paper` is their difference taken.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from eval.paper import DOUBTFUL, load_reference
from eval.prose import paragraph
from eval.scores import ScoreFiles, Scores, find_row, metric_title, pair, table_entry, units
from eval.stats import mean_interval, paired_difference, prompt_means
from eval.tables import DASH, digits, scale_sentence
from eval.untuned import off, warning
from pso import paths
from pso.config import add_arguments, from_arguments
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.provenance import UserError, atomic, sentences, write_json
from pso.runs import metric_missing

TEACHER = "sdxl"  # the undistilled model: its rows are no base
VERDICTS = ("agrees", "disagrees", "inconclusive")
CELL_VERDICTS = ("same", "higher", "lower")
NOT_COMPARABLE = "not comparable"
STALE = 1e-9  # how far, relatively, a mean may be from the same in another file: it is rounded nowhere
NOT_MEASURED = ("missing", "not measured")  # how the verdict on what has no number begins
DIRECTION_HEAD = ["Row", "Base", "Column", "Paper", "Ours", "95 % interval", "Verdict"]
RULE = """\
Base of a row: the untuned row of the distilled model (of the same model and steps where the table has several).
*agrees*: the 95 % interval of our paired difference to the base (bootstrap over prompts) lies on the paper's side of 0;
*disagrees*: on the other side; *inconclusive*: it holds 0, or the paper prints equal numbers.
Of a table with subjects a mean is that of the subjects' means, and the bootstrap is over subjects where there are at
least 10, else over prompts within them.
The intervals are not corrected for their number (claims.md is), and the paper prints neither intervals nor seeds: a
small difference of its own may be noise."""
CELL_RULE = """\
*same*: |ours - paper| <= 2 SE + half a unit of the last printed digit, with SE the standard error of our mean over
prompts; else *higher* or *lower*. The interval is that of our mean."""
NO_CELL_RULE = """\
*not comparable*: only scale `paper` has the paper's models, training and judges, so no difference is taken here. The
paper's number stands beside ours to be found, not to be compared. The interval is that of our mean."""


def base_label(reference: pd.DataFrame, label: str) -> str:
    """The row that `label` is compared with."""
    rows = reference.drop_duplicates("label").set_index("label")
    own = rows.loc[label]
    bases = rows[(rows["method"] == UNTUNED) & (rows["model"] != TEACHER)]
    fit = 2 * (bases["steps"] == own["steps"]) + (bases["model"] == own["model"])
    return str(fit.idxmax())  # the first of equals


class Reader:
    """Scores of a table's rows, each file read once."""

    def __init__(self, config: Config, results: Path, table: TableEntry) -> None:
        self.config, self.table, self.files = config, table, ScoreFiles(config, results)

    def missing(self, row: Row, metric: str) -> str | None:
        return row.missing or metric_missing(self.config, self.table, metric)

    def __call__(self, row: Row, eval_set: str, metric: str) -> Scores:
        return self.files(row, eval_set, metric, self.table.tasks)


def _sign(difference: float) -> str:
    return "above" if difference > 0 else "below" if difference < 0 else "equal"


def direction(config: Config, reader: Reader, cell: pd.Series, base: pd.Series) -> dict:
    """The paper's direction of one cell, ours, and the verdict."""
    row, base_row = find_row(reader.table, cell["label"]), find_row(reader.table, base["label"])
    found = {"eval_set": cell["eval_set"], "label": row.label, "base": base_row.label, "metric": cell["metric"]}
    found |= {"paper": _sign(cell["value"] - base["value"]), "difference": None, "interval": None, "prompts": None}
    found["doubtful"] = bool(cell["note"] or base["note"])
    reason = reader.missing(row, cell["metric"]) or reader.missing(base_row, cell["metric"])
    if reason:
        return found | {"verdict": f"missing: {reason}"}
    left, right = (reader(r, cell["eval_set"], cell["metric"]) for r in (row, base_row))
    pairs = pair(left, right)
    scale = config.scale_entry
    ours = paired_difference(
        pairs["left"], pairs["right"], resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **units(pairs)
    )
    side = "above" if ours.low > 0 else "below" if ours.high < 0 else None
    clear = side is not None and found["paper"] != "equal"
    verdict = ("agrees" if side == found["paper"] else "disagrees") if clear else "inconclusive"
    measured = {"difference": ours.value, "interval": [ours.low, ours.high], "prompts": pairs["prompt_id"].nunique()}
    return found | measured | {"verdict": verdict}


def compare_cell(config: Config, reader: Reader, cell: pd.Series, held: bool | None = None) -> dict:
    """One of our cells beside the paper's; held: whether to take the difference, else as `comparable` says."""
    row = find_row(reader.table, cell["label"])
    found = {"eval_set": cell["eval_set"], "label": row.label, "metric": cell["metric"], "paper": cell["printed"]}
    found |= dict.fromkeys(("ours", "interval", "difference", "tolerance")) | {"doubtful": bool(cell["note"])}
    reason = reader.missing(row, cell["metric"])
    if reason:
        return found | {"verdict": f"missing: {reason}"}
    frame, scale = reader(row, cell["eval_set"], cell["metric"]).frame, config.scale_entry
    ours = mean_interval(frame["score"], resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **units(frame))
    found |= {"ours": ours.value, "interval": [ours.low, ours.high]}
    if not (comparable(config) if held is None else held):
        return found | {"verdict": NOT_COMPARABLE}
    # with subjects these are what a mean counts: 30 in the paper
    means = prompt_means(frame["prompt_id" if frame["subject"].isna().all() else "subject"], frame["score"])[0]
    standard_error = means.std(ddof=1) / np.sqrt(len(means))
    tolerance = float(2 * standard_error + 0.5 * 10.0 ** -int(cell["decimals"]))
    difference = ours.value - cell["value"]
    verdict = "same" if abs(difference) <= tolerance else "higher" if difference > 0 else "lower"
    return found | {"difference": difference, "tolerance": tolerance, "verdict": verdict}


def comparable(config: Config) -> bool:
    """Whether a number of this scale may be held against the paper's."""
    return config.scale == "paper"


def diff(config: Config, results: Path, name: str) -> dict:
    """The content of {table}.diff.json."""
    table, reference = table_entry(config, name), load_reference(name)
    unlisted = sorted(set(reference["label"]) - {row.label for row in table.rows})
    if unlisted:
        raise UserError(
            f"tables.{name}.rows lacks {', '.join(unlisted)} of the paper's table; give the row a `missing`."
        )
    reader = Reader(config, results, table)
    cells = reference.set_index(["eval_set", "label", "metric"], drop=False)
    directions, beside = [], []
    for _, cell in cells.iterrows():
        base = base_label(reference, cell["label"])
        if base != cell["label"]:
            directions.append(direction(config, reader, cell, cells.loc[(cell["eval_set"], base, cell["metric"])]))
        beside.append(compare_cell(config, reader, cell))
    found = {"table": name, "scale": config.scale, "comparable": comparable(config)}
    found |= {"counts": counts(directions, VERDICTS), "directions": directions}
    possible = CELL_VERDICTS if comparable(config) else (NOT_COMPARABLE,)
    found |= {"cell_counts": counts(beside, possible), "cells": beside}
    measured = {(e["eval_set"], e["label"], e["metric"]): (e["ours"], *e["interval"]) for e in beside if e["interval"]}
    named = off(config, name, measured)
    return found | ({"untuned_off": named} if named else {})


def counts(entries: list[dict], verdicts: tuple[str, ...]) -> dict[str, int]:
    """How often each verdict was given, the possible ones first."""
    number = Counter(entry["verdict"] for entry in entries)
    return {verdict: number[verdict] for verdict in [*verdicts, *sorted(set(number) - set(verdicts))]}


def stale(told: dict, frame: pd.DataFrame) -> list[str]:
    """The cells where a {table}.diff.json says another mean of ours than its {table}.csv: it is older than the table.

    Not those of rows that the paper does not have. Empty if none.
    """
    lines = {(line["eval_set"], line["label"]): line for line in frame.to_dict("records")}
    found = []
    for cell in told["cells"]:
        value = lines.get((cell["eval_set"], cell["label"]), {}).get(cell["metric"])
        known = [number for number in (cell["ours"], value) if pd.notna(number)]
        if len(known) == 1 or (known and not math.isclose(*known, rel_tol=STALE)):
            found.append(f"{cell['label']}, {cell['eval_set']}, {cell['metric']}")
    return found


def summary(found: dict) -> str:
    directions = f"{len(found['directions'])} directions: {listed(found['counts'])}"
    cells = f"{len(found['cells'])} cells: {listed(found['cell_counts'])}"
    return f"{found['table']} at scale {found['scale']}, {directions}; {cells}"


def listed(number: dict[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in number.items())


# ---- as text ----


def to_markdown(config: Config, found: dict) -> str:
    name = found["table"]
    parts = [
        f"# {name} against the paper, scale {config.scale}",
        scale_sentence(config),
        *([f"**{told}**"] if (told := warning(config, found.get("untuned_off", []))) else []),
        paragraph(found, {metric: metric_title(config, metric) for metric in table_entry(config, name).metrics}),
        f"**{summary(found)}.**",
    ]
    parts += ["## Directions", RULE, *blocks(config, found["directions"], direction_line, DIRECTION_HEAD)]
    head = ["Row", "Column", "Paper", "Ours", "95 % interval", "Difference", "Tolerance", "Verdict"]
    rule = CELL_RULE if found["comparable"] else NO_CELL_RULE
    parts += ["## Cells", rule, *blocks(config, found["cells"], _cell_line, head)]
    parts.append(f"{DOUBTFUL} A doubtful cell of the paper; the column `note` of eval/reference/{name}.csv says why.")
    return "\n\n".join(parts) + "\n"


def blocks(config: Config, entries: list[dict], line: Callable, head: list[str]) -> list[str]:
    """Per eval set a table of what was measured and a list of what was not."""
    parts = []
    for eval_set in dict.fromkeys(entry["eval_set"] for entry in entries):
        block = [entry for entry in entries if entry["eval_set"] == eval_set]
        measured = [entry for entry in block if not entry["verdict"].startswith(NOT_MEASURED)]
        parts.append(f"### {eval_set}")
        if measured:
            lines = pd.DataFrame([line(config, entry) for entry in measured], columns=head)
            parts.append(lines.to_markdown(index=False, disable_numparse=True))
        if len(measured) < len(block):
            parts.append(_missing_list(config, [entry for entry in block if entry not in measured]))
    return parts


def _missing_list(config: Config, entries: list[dict]) -> str:
    """`verdict (columns): rows`, rows with the same columns together."""
    columns: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        columns.setdefault((entry["label"], entry["verdict"]), []).append(metric_title(config, entry["metric"]))
    rows: dict[str, list[str]] = {}
    for (label, verdict), titles in columns.items():
        rows.setdefault(f"{verdict} ({', '.join(titles)})", []).append(label)
    return "\n".join(f"- {what}: {', '.join(labels)}" for what, labels in rows.items())


def direction_line(config: Config, entry: dict) -> list[str]:
    metric, interval = entry["metric"], entry["interval"]
    places = digits(config.metrics[metric].decimals + 1, interval)
    ours, low, high = (f"{value:+z.{places}f}" for value in (entry["difference"], *interval))
    paper = entry["paper"] + (f" {DOUBTFUL}" if entry["doubtful"] else "")
    row = [entry["label"], entry["base"], metric_title(config, metric)]
    return [*row, paper, ours, f"[{low}, {high}]", entry["verdict"]]


def _cell_line(config: Config, entry: dict) -> list[str]:
    metric = entry["metric"]
    places = digits(len(entry["paper"].partition(".")[2]) + 1, entry["interval"])
    ours, low, high = (f"{value:z.{places}f}" for value in (entry["ours"], *entry["interval"]))
    gap = [DASH, DASH]
    if entry["difference"] is not None:
        gap = [f"{entry['difference']:+z.{places}f}", f"{entry['tolerance']:z.{places}f}"]
    paper = entry["paper"] + (f" {DOUBTFUL}" if entry["doubtful"] else "")
    return [entry["label"], metric_title(config, metric), paper, ours, f"[{low}, {high}]", *gap, entry["verdict"]]


def write(config: Config, results: Path, name: str) -> dict:
    found = diff(config, results, name)
    folder = paths.scale_dir(config.scale, results) / "tables"
    with atomic(folder / f"{name}.diff.md") as part:
        part.write_text(to_markdown(config, found))
    write_json(folder / f"{name}.diff.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="write results/{scale}/tables/{table}.diff.md and .diff.json")
    parser.add_argument("--table", required=True, help="an entry of tables.yaml, as table1")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.diff"):
        config = from_arguments(args)
        found = write(config, args.results, args.table)
        print(summary(found))
        if told := warning(config, found.get("untuned_off", [])):
            print(told)


if __name__ == "__main__":
    main()
