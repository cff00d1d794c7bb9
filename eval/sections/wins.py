"""On how many prompts one row scores above another, for the rows that stand beside each other in a table. No torch."""

import pandas as pd
from markupsafe import Markup

from eval.scores import metric_title, table_entry
from eval.sections.judges import judged, marked
from eval.sections.page import Context, render
from eval.tables import TRAINED_ON, resampled, unit
from eval.wins import win_rates
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.figures import judges, short_labels

TITLE = "Win rates"
WHY_NONE = "No table asked for has two rows that could be held against each other."
SHADE = 0.4  # of the colour at 0 % and at 100 %, none at 50 %: text stays legible on it


def groups(table: TableEntry) -> list[list[Row]]:
    """Rows with the same number of steps, tuned models apart; before them the table's first row if it takes more."""
    found, rows = [], table.shown_rows
    for steps in dict.fromkeys(row.steps for row in rows):
        here = [row for row in rows if row.steps == steps]
        tuned = list(dict.fromkeys(row.model for row in here if row.method != UNTUNED))
        for model in tuned or [None]:
            mine = [row for row in here if model in (None, row.model) or row.model not in tuned]
            found.append([*rows[:1], *mine] if rows[0].steps > steps else mine)
    return [group for group in found if len(group) > 1]


def _cell(line: pd.Series) -> dict:
    rate, low, high = (100 * line[name] for name in ("win_rate", "low", "high"))
    return {
        "rate": f"{rate:.0f}",
        "interval": f"{low:.0f} to {high:.0f}",
        "excludes": low > 50 or high < 50,
        "side": "above" if rate > 50 else "below",
        "shade": round(abs(rate - 50) * 2 * SHADE),
    }


def _matrix(config: Config, rows: list[Row], metric: str, rates: pd.DataFrame) -> dict:
    heads = [marked(config, row, metric, label) for row, label in zip(rows, short_labels(rows), strict=True)]
    lines = []
    for row, head in zip(rows, heads, strict=True):
        cells = [None if one is row else _cell(rates.loc[(row.label, one.label)]) for one in rows]
        lines.append({"head": head, "cells": cells})
    steps = sorted({row.steps for row in rows}, reverse=True)
    told = f"{' and '.join(map(str, steps))} step{'' if steps == [1] else 's'}"
    return {"steps": told, "heads": heads, "lines": lines}


def _metric(context: Context, name: str, metric: str) -> dict:
    """Every eval set's matrices for one metric."""
    table, found = table_entry(context.config, name), []
    for eval_set in table.eval_sets:
        rates = win_rates(context.config, context.results, name, metric, eval_set, context.scores)
        rates = rates.set_index(["left", "right"])
        matrices = [_matrix(context.config, rows, metric, rates) for rows in groups(table)]
        found += [one | {"eval_set": eval_set, "prompts": int(rates["prompts"].iloc[0])} for one in matrices]
    return {"title": metric_title(context.config, metric), "matrices": found}


def section(context: Context) -> Markup | None:
    found = []
    for name in context.config.tables:
        table = table_entry(context.config, name)
        if not groups(table) or not (metrics := judged(context.config, table)):
            continue
        first = judges(metrics)
        found.append(
            {
                "name": name,
                "caption": table.caption,
                "unit": unit(table),
                "resampled": resampled(table),
                "first": [_metric(context, name, metric) for metric in first],
                "others": [_metric(context, name, metric) for metric in metrics if metric not in first],
            }
        )
    if not found:
        return None
    return render("wins.html", tables=found, trained_on=TRAINED_ON, num_runs=len(context.config.seeds))
