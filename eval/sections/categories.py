"""What tuning changed in each category of PartiPrompts: differences to the untuned row over its prompts. No torch."""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from eval.scores import metric_title, pair, table_entry
from eval.sections.judges import judged, marked
from eval.sections.page import Context, render
from eval.stats import prompt_means
from eval.tables import DASH, TRAINED_ON, digits
from eval.wins import mean_intervals
from pso.data import load_prompts
from pso.entries import Row
from pso.figures import judges, short_labels
from pso.hub import Hub, hub_dir
from pso.provenance import UserError

TITLE = "By category"
WHY_NONE = "No table asked for has a tuned row beside its untuned one on prompts that have categories (PartiPrompts)."
FORMAT = "parti_tsv"  # the one that has categories
FEW = 5  # prompts: of fewer an interval says little
FIELDS = {"category": "Category", "challenge": "Challenge"}
NAMELESS, UNKNOWN = "(none given)", "(not in the list)"


@dataclass(frozen=True)
class Column:
    """Prompts that are looked at together."""

    field: str
    name: str
    places: np.ndarray  # in the order of prompt ids

    @property
    def few(self) -> bool:
        return len(self.places) < FEW


def labels(context: Context, eval_set: str, prompt_ids: list[str]) -> pd.DataFrame:
    """Columns category and challenge of prompts, in their order."""
    entry = context.config.datasets[eval_set]
    hub = Hub(hub_dir(context.config.scale, context.results))
    known = {prompt.id: prompt for prompt in load_prompts(hub.files(entry.repo, entry.files), entry, eval_set)}
    lines = [[(getattr(known[one], f) or NAMELESS) if one in known else UNKNOWN for f in FIELDS] for one in prompt_ids]
    return pd.DataFrame(lines, columns=list(FIELDS))


def columns(of: pd.DataFrame) -> list[Column]:
    """All prompts, then each field's values; what has none comes last."""
    found = [Column("", "All", np.arange(len(of)))]
    for field, title in FIELDS.items():
        for name in sorted(of[field].unique(), key=lambda name: (name in (NAMELESS, UNKNOWN), name)):
            found.append(Column(title, name, np.flatnonzero(of[field] == name)))
    return found


def differences(
    context: Context, name: str, eval_set: str, rows: list[Row], metrics: list[str]
) -> tuple[list[str], dict[tuple[str, str], np.ndarray]]:
    """Prompt ids in order; (metric, label of a row) -> each prompt's mean difference to the untuned row."""
    table = table_entry(context.config, name)
    prompt_ids, found = [], {}
    for metric, row in itertools.product(metrics, rows):
        both = (context.scores(one, eval_set, metric, table.tasks) for one in (row, table.untuned_of(row)))
        pairs = pair(*both)
        left, right = prompt_means(pairs["prompt_id"], pairs["left"], pairs["right"])
        ids = sorted(pairs["prompt_id"].unique())
        if ids != (prompt_ids := prompt_ids or ids):
            raise UserError(
                f"{metric} of {row.label!r} on {eval_set} is of {len(ids)} prompts, other scores of {name} are of "
                f"{len(prompt_ids)}, not all the same; score the missing images, nothing is compared without them."
            )
        found[metric, row.label] = left - right
    return prompt_ids, found


def _cell(mean: float, low: float, high: float, least: int, few: bool) -> dict:
    known = low <= high  # an interval of a single prompt is none
    places = digits(least, [low, high]) if known else least
    excludes = known and not few and (low > 0 or high < 0)  # that of a few values is hardly wider than they are
    return {
        "mean": f"{mean:+z.{places}f}",
        "interval": f"{low:+z.{places}f} to {high:+z.{places}f}" if known else DASH,
        "excludes": excludes,
        "side": "above" if mean > 0 else "below",
        "shade": 25 if excludes else 0,
    }


def intervals(context: Context, values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[3, lines] of [lines, prompts]: mean over the prompts at `places` and its 95 % interval, NaN of a single one."""
    scale, chosen = context.config.scale_entry, values[:, places]
    if len(places) < 2:
        return np.stack([chosen.mean(1), *np.full((2, len(chosen)), np.nan)])
    return np.stack(mean_intervals(chosen, [np.arange(len(places))], scale.bootstrap_resamples, scale.eval_seed))


def block(context: Context, name: str, eval_set: str, rows: list[Row]) -> dict:
    """One table on one eval set."""
    config, table = context.config, table_entry(context.config, name)
    metrics = judged(config, table)
    first = judges(metrics)
    prompt_ids, values = differences(context, name, eval_set, rows, metrics)
    of = labels(context, eval_set, prompt_ids)
    every = columns(of)
    found = [intervals(context, np.stack(list(values.values())), column.places) for column in every]
    at = {key: number for number, key in enumerate(values)}
    shown = {}
    for metric in metrics:
        lines = []
        for row, label in zip(rows, short_labels(rows), strict=True):
            place, least = at[metric, row.label], config.metrics[metric].decimals + 1
            cells = [_cell(*one[:, place], least, column.few) for one, column in zip(found, every, strict=True)]
            lines.append({"head": marked(config, row, metric, label), "cells": cells})
        shown[metric] = {"title": metric_title(config, metric), "lines": lines}
    return {
        "name": name,
        "eval_set": eval_set,
        "bases": sorted({table.untuned_of(row).label for row in rows}),
        "all": every[0],
        "fields": [(field, [column for column in every if column.field == field]) for field in FIELDS.values()],
        "few": any(column.few for column in every),
        "unknown": int((of["category"] == UNKNOWN).sum()),
        "first": [shown[metric] for metric in first],
        "others": [shown[metric] for metric in metrics if metric not in first],
    }


def section(context: Context) -> Markup | None:
    config, found = context.config, []
    for name in config.tables:
        table = table_entry(config, name)
        rows = [row for row in table.shown_rows if table.untuned_of(row) is not None]
        if rows and judged(config, table) and not table.subjects:
            sets = [eval_set for eval_set in table.eval_sets if config.datasets[eval_set].format == FORMAT]
            found += [block(context, name, eval_set, rows) for eval_set in sets]
    if not found:
        return None
    any_few = any(one["few"] for one in found)
    told = {"few": FEW, "any_few": any_few, "trained_on": TRAINED_ON, "num_runs": len(config.seeds)}
    return render("categories.html", blocks=found, **told)
