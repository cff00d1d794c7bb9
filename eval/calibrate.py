"""The untuned rows of all tables against the paper: before anything is trained, is every number where it should be?

    python -m eval.calibrate [--task preference --model sdxl_dmd2]

Writes results/{scale}/calibrate.{md,json}; with --model the calibrate.json of that model and task alone, its rows on
the grid on which it is tuned, which its tuning runs wait for. It warns and never stops. No torch.
"""

import argparse
from pathlib import Path

import pandas as pd

from eval.diff import (
    DIRECTION_HEAD,
    NOT_COMPARABLE,
    Reader,
    base_label,
    blocks,
    compare_cell,
    counts,
    direction,
    direction_line,
    listed,
)
from eval.paper import DOUBTFUL, load_reference, reference_file
from eval.scores import find_row, metric_title
from eval.tables import digits, scale_sentence
from eval.untuned import OFF, RULE, WITHIN, cells, is_held, judge, sentence
from pso import paths
from pso.config import ConfigError, add_arguments, from_arguments
from pso.entries import Config
from pso.provenance import atomic, sentences, write_json
from pso.runs import jobs_asked_for

HEAD = ["Row", "Column", "Paper", "Ours", "95 % interval", "Difference", "Tolerance", "Verdict", "Plain"]
PLAIN = """\
*Plain*: the verdict of {table}.diff.md, without the paper's own uncertainty: *same*, *higher* or *lower*."""
NOT_HELD = """\
*not comparable*: only the published models, data and judges have the paper's numbers, so here the untuned rows tell
nothing about scorers and protocol; no difference is taken and the paper's numbers are left out. Of untuned rows that
have a base row the direction is given."""


def calibrate(config: Config, results: Path, task: str | None = None, model: str | None = None) -> dict:
    """The content of calibrate.json: every untuned cell of the paper's tables, or one model's and task's."""
    beside, ways = [], []
    for name, table in config.table_entries.items():
        if not reference_file(name).exists() or task not in (None, table.task):
            continue
        reader = Reader(config, results, table)
        for _, cell in cells(table, name).iterrows():
            row = find_row(table, cell["label"])
            if model is not None and (row.model, row.steps) != (model, config.models[model].tuned_steps):
                continue
            absent = None if name in config.tables else f"config.tables does not list {name}"
            beside.append(_cell(config, reader, name, cell, absent))
            if not is_held(config) and not absent:
                ways += _direction(config, reader, name, cell)
    found = {"scale": config.scale, **({"task": task, "model": model} if model else {}), "held": is_held(config)}
    possible = (WITHIN, OFF) if found["held"] else (NOT_COMPARABLE,)
    found |= {"counts": counts(beside, possible), "off": [e["sentence"] for e in beside if e["verdict"] == OFF]}
    return found | {"cells": beside, "directions": ways}


def _cell(config: Config, reader: Reader, name: str, cell: pd.Series, absent: str | None) -> dict:
    """One untuned cell, judged where it is measured and held against the paper's."""
    held = is_held(config)
    place = {"table": name, "eval_set": cell["eval_set"], "label": cell["label"], "metric": cell["metric"]}
    printed = {"paper": cell["printed"] if held else None, "doubtful": bool(cell["note"])}
    reason = absent or reader.missing(find_row(reader.table, cell["label"]), cell["metric"])
    if reason:
        return place | printed | {"ours": None, "interval": None, "verdict": f"not measured: {reason}"}
    found = compare_cell(config, reader, cell, held)
    measured = place | printed | {"ours": found["ours"], "interval": found["interval"]}
    if not held:
        return measured | {"verdict": NOT_COMPARABLE}
    ours = found["ours"], *found["interval"]
    return measured | judge(cell, *ours) | {"plain": found["verdict"], "sentence": sentence(config, cell, *ours)}


def _direction(config: Config, reader: Reader, name: str, cell: pd.Series) -> list[dict]:
    """Above or below the base row, of an untuned row that is no base itself."""
    reference = load_reference(name)
    base = base_label(reference, cell["label"])
    if base == cell["label"]:
        return []
    at = (reference["label"] == base) & (reference["eval_set"] == cell["eval_set"])
    (other,) = (row for _, row in reference[at & (reference["metric"] == cell["metric"])].iterrows())
    return [{"table": name, **direction(config, reader, cell, other)}]


def summary(found: dict) -> str:
    of = f" of {found['model']} for {found['task']}" if "model" in found else ""
    return f"calibrate at scale {found['scale']}, {len(found['cells'])} untuned cells{of}: {listed(_kinds(found))}"


def _kinds(found: dict) -> dict[str, int]:
    """How many cells have each verdict; what is not measured together, whatever the reason."""
    number = {verdict: count for verdict, count in found["counts"].items() if not verdict.startswith("not measured")}
    return number | {"not measured": len(found["cells"]) - sum(number.values())}


def told(found: dict) -> list[str]:
    """What the command prints."""
    return [summary(found), *(f"warning: off the paper's: {line}" for line in found["off"])]


# ---- as text ----


def to_markdown(config: Config, found: dict) -> str:
    parts = [f"# Untuned rows against the paper, scale {config.scale}", scale_sentence(config)]
    parts.append(f"**{summary(found)}.**")
    if found["off"]:
        parts += ["Off, so a scorer or the protocol is at fault, or the paper's cell is:"]
        parts.append("\n".join(f"- {line}" for line in found["off"]))
    parts += [RULE, PLAIN] if found["held"] else [NOT_HELD]
    for name in dict.fromkeys(entry["table"] for entry in found["cells"]):
        parts.append(f"## {name}")
        of_table = [entry for entry in found["cells"] if entry["table"] == name]
        head = HEAD if found["held"] else [HEAD[0], HEAD[1], *HEAD[3:5], "Verdict"]
        parts += blocks(config, of_table, _held_line if found["held"] else _line, head)
        if ways := [entry for entry in found["directions"] if entry["table"] == name]:
            parts += [f"## {name}, directions", *blocks(config, ways, direction_line, DIRECTION_HEAD)]
    if found["held"]:
        parts.append(f"{DOUBTFUL} A doubtful cell of the paper; the column `note` of eval/reference says why.")
    return "\n\n".join(parts) + "\n"


def _held_line(config: Config, entry: dict) -> list[str]:
    places = digits(len(entry["paper"].partition(".")[2]) + 1, entry["interval"])
    ours, low, high, tolerance = (f"{v:z.{places}f}" for v in (entry["ours"], *entry["interval"], entry["tolerance"]))
    paper = entry["paper"] + (f" {DOUBTFUL}" if entry["doubtful"] else "")
    verdict = f"**{OFF}**" if entry["verdict"] == OFF else entry["verdict"]
    row = [entry["label"], metric_title(config, entry["metric"]), paper, ours, f"[{low}, {high}]"]
    return [*row, f"{entry['difference']:+z.{places}f}", tolerance, verdict, entry["plain"]]


def _line(config: Config, entry: dict) -> list[str]:
    places = digits(config.metrics[entry["metric"]].decimals + 1, entry["interval"])
    ours, low, high = (f"{value:z.{places}f}" for value in (entry["ours"], *entry["interval"]))
    return [entry["label"], metric_title(config, entry["metric"]), ours, f"[{low}, {high}]", entry["verdict"]]


def write(config: Config, results: Path, task: str | None = None, model: str | None = None) -> dict:
    found = calibrate(config, results, task, model)
    if model is not None:
        write_json(paths.model_dir(config.scale, task, model, results) / "calibrate.json", found)
        return found
    folder = paths.scale_dir(config.scale, results)
    with atomic(folder / "calibrate.md") as part:
        part.write_text(to_markdown(config, found))
    write_json(folder / "calibrate.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="one model alone, on the grid on which it is tuned; default: every untuned row")
    parser.add_argument("--task", default="preference", help="of that model")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.calibrate"):
        config = from_arguments(args)
        if args.model is not None and args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        task = None if args.model is None else args.task
        if task is not None:
            jobs_asked_for(config, args.model, task, untuned=True)  # a sentence where there are none
        print("\n".join(told(write(config, args.results, task, args.model))))


if __name__ == "__main__":
    main()
