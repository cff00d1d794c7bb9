"""The tables as the paper prints them: in each cell ours with its interval, the paper's number, and the verdict.

Where numbers of the scale may not be held against the paper's, the verdict is that of the cell's direction: whether the
row lies on the paper's side of its base row. No torch.
"""

from collections import Counter

import pandas as pd

from eval.diff import stale
from eval.paper import load_reference
from eval.prose import paragraph
from eval.run_notes import run_notes
from eval.scores import metric_title, table_entry
from eval.sections.page import Context, render
from eval.tables import (
    TRAINED_ON,
    all_metrics,
    block,
    decimals,
    digits,
    heading,
    notes,
    off_cells,
    resampled,
)
from eval.untuned import warning
from pso.entries import Config, TableEntry
from pso.paths import reference_file

TITLE = "Tables"
KINDS = {"agrees": "agrees", "disagrees": "disagrees", "inconclusive": "open", "same": "agrees"}
KINDS |= {"higher": "disagrees", "lower": "disagrees"}  # verdict of a direction or a cell -> its mark
WORDS = {"inconclusive": "open"}


def section(context: Context) -> str:
    shown = [_table(context, name) for name in context.config.tables]
    return render("tables.html", tables=shown, comparable=any(table.get("comparable") for table in shown))


def kind_of(verdict: str) -> str | None:
    """The mark of a verdict; None where nothing was measured or compared."""
    return KINDS.get(verdict)


def word_of(verdict: str) -> str:
    return WORDS.get(verdict, verdict)


def agreement(found: dict) -> dict[str, int]:
    """Directions of a table by mark, and how many were not measured."""
    number = Counter(kind_of(entry["verdict"]) or "missing" for entry in found["directions"])
    return {kind: number[kind] for kind in ("agrees", "disagrees", "open", "missing")}


def _table(context: Context, name: str) -> dict:
    config, table = context.config, table_entry(context.config, name)
    told = {"name": name, "caption": table.caption, "blocks": []}
    if not context.has(f"tables/{name}.csv"):
        return told | {"why": context.not_there(f"tables/{name}.csv")}
    frame = context.table(name)
    if other := _other(table, frame):
        return told | {
            "why": f"results/{config.scale}/tables/{name}.csv {other}, so it is of other settings; "
            "`snakemake --cores 2` makes it again."
        }
    frame = frame.astype({"dropped": object, "status": object}).fillna({"dropped": "", "status": ""})
    found, unheld = _held(context, name, frame)
    beside = Beside(name, found)
    panels = [("", table.metrics), ("Columns that are not in the paper", table.extra_metrics)]
    told["panels"] = [
        {
            "title": title,
            "heads": [{"title": metric_title(config, m), "extra": m in table.extra_metrics} for m in metrics],
            "blocks": [
                _block(config, name, lines, metrics, beside) for _, lines in frame.groupby("eval_set", sort=False)
            ],
        }
        for title, metrics in panels
        if metrics
    ]
    told |= {
        "warning": warning(config, off_cells(config, name, frame)),
        "notes": notes(config, table, frame, run_notes(config, context.results, table)),
        "doubts": list(beside.doubts),
        "over": resampled(table),
        "in_paper": reference_file(name).exists(),
        "comparable": False,
        "held": found is not None,
        "unheld": unheld,
    }
    if found is None:
        return told
    titles = {metric: metric_title(config, metric) for metric in table.metrics}
    told |= {"comparable": found["comparable"], "agreement": agreement(found), "cells": len(found["cells"])}
    told |= {"cell_counts": found["cell_counts"], "words": paragraph(found, titles)}
    return told | {"differences": _differences(context, found)}


def _held(context: Context, name: str, frame: pd.DataFrame) -> tuple[dict | None, str | None]:
    """What the table's diff says of it, or why there is nothing."""
    file, found = f"tables/{name}.diff.json", context.diff(name)
    if found is None:
        return None, context.not_there(file)
    if old := stale(found, frame):
        why = f"is older than the table ({len(old)} cells differ, as {old[0]}); `snakemake --cores 2` makes it again."
        return None, f"results/{context.config.scale}/{file} {why}"
    return found, None


def _other(table: TableEntry, frame: pd.DataFrame) -> str | None:
    """What is not in a table's file, or otherwise, although it would be if the file were of these settings."""
    columns = [metric for metric in all_metrics(table) if metric not in frame]
    labels = [row.label for row in table.all_rows if row.label not in set(frame["label"])]
    sets = [name for name in table.eval_sets if name not in set(frame["eval_set"])]
    if lacking := [*columns, *labels, *sets]:
        return f"lacks {', '.join(lacking)}"
    parts = ["model", "method", "steps"]
    there = frame.drop_duplicates("label").set_index("label")[parts].to_dict("index")
    changed = [
        f"{row.label} as {there[row.label][part]} and not {getattr(row, part)}"
        for row in table.shown_rows
        for part in parts
        if there[row.label][part] != getattr(row, part)
    ]
    return f"has {', '.join(changed)}" if changed else None


class Beside:
    """What stands beside our numbers, by (eval set, label, metric): the paper's, and how the two compare."""

    def __init__(self, name: str, found: dict | None) -> None:
        cells = load_reference(name).to_dict("records") if reference_file(name).exists() else []
        self.paper = _by_place(cells)
        noted = dict.fromkeys(cell["note"] for cell in cells if cell["note"])
        self.doubts = {note: number for number, note in enumerate(noted, start=1)}
        self.held, self.directed = (_by_place(found[key] if found else []) for key in ("cells", "directions"))


def _by_place(entries: list[dict]) -> dict[tuple[str, str, str], dict]:
    return {(entry["eval_set"], entry["label"], entry["metric"]): entry for entry in entries}


def _block(config: Config, name: str, lines: pd.DataFrame, metrics: list[str], beside: Beside) -> dict:
    """One eval set's rows."""
    extra = {row.label for row in table_entry(config, name).extra_rows}
    texts, best = block(config, name, lines, metrics)
    places, rows = decimals(config, name), []
    for place, line in enumerate(lines.to_dict("records")):
        cells = [
            _cell(places, line, metric, beside)
            | printed_as(texts[metric].iloc[place])
            | {"best": bool(best[metric].iloc[place])}
            for metric in metrics
        ]
        row = {"label": line["label"], "steps": line["steps"], "missing": line["status"], "cells": cells}
        rows.append(row | {"extra": line["label"] in extra})
    return {"eval_set": lines["eval_set"].iloc[0], "heading": heading(lines["eval_set"].iloc[0], lines), "rows": rows}


def printed_as(text: str) -> dict:
    """A cell's text of eval.tables, its mark apart."""
    return {"text": minus(text.removesuffix(TRAINED_ON)), "trained_on": text.endswith(TRAINED_ON)}


def _cell(places: dict[str, int], line: dict, metric: str, beside: Beside) -> dict:
    """What stands below a number; places: digits after the point, by metric."""
    place = line["eval_set"], line["label"], metric
    cell = {"interval": None, "verdicts": [], "paper": None, "doubt": None}
    if pd.notna(line[metric]):
        ends = [line[f"{metric}_low"], line[f"{metric}_high"]]
        cell["interval"] = interval(ends, digits(places.get(metric, 0), ends))
    if printed := beside.paper.get(place):
        cell |= {"paper": printed["printed"], "doubt": beside.doubts.get(printed["note"])}
    for entry in (beside.held.get(place), beside.directed.get(place)):
        if entry is not None and (kind := kind_of(entry["verdict"])):
            side = entry["paper"] if entry is beside.directed.get(place) else None
            cell["verdicts"].append({"kind": kind, "word": word_of(entry["verdict"]), "paper": side})
    return cell


def minus(text: str) -> str:
    return text.replace("-", "−")


def interval(ends: list[float], places: int, sign: str = "") -> str:
    low, high = (f"{end:{sign}z.{places}f}" for end in ends)
    return minus(f"[{low}, {high}]")


def _differences(context: Context, found: dict) -> list[dict]:
    """Every measured difference of a row to its base row, by eval set."""
    config, blocks = context.config, {}
    for entry in found["directions"]:
        if (kind := kind_of(entry["verdict"])) is None:
            continue
        places = digits(config.metrics[entry["metric"]].decimals + 1, entry["interval"])
        blocks.setdefault(entry["eval_set"], []).append(
            {
                **{key: entry[key] for key in ("label", "base", "paper", "doubtful", "prompts")},
                "metric": metric_title(config, entry["metric"]),
                "difference": minus(f"{entry['difference']:+z.{places}f}"),
                "interval": interval(entry["interval"], places, "+"),
                "kind": kind,
                "word": word_of(entry["verdict"]),
            }
        )
    return [{"eval_set": name, "lines": lines} for name, lines in blocks.items()]
