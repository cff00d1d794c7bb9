"""What the paper prints: its cells (eval/reference), and whether they bear out its own sentences. No torch."""

from decimal import Decimal

import pandas as pd

from pso.entries import ClaimEntry
from pso.paths import REFERENCE, reference_file
from pso.provenance import UserError

DOUBTFUL = "(?)"  # a cell with a note
HOLDS, FAILS, EQUAL, NOT_PRINTED = "holds", "does not hold", "equal", "not printed"


def load_reference(table: str) -> pd.DataFrame:
    """The paper's cells of one table; `printed` is the text, `value` its number."""
    path = reference_file(table)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in REFERENCE.glob("*.csv")))
        raise UserError(f"--table is {table!r}, which the paper does not have; expected one of {known}.")
    frame = pd.read_csv(path, dtype={"value": str}, keep_default_na=False)
    return frame.rename(columns={"value": "printed"}).assign(value=lambda f: f["printed"].astype(float))


def printed_decimals(table: str) -> dict[str, int]:
    """Metric -> digits after the point, as this table of the paper prints them; none for a table of our own."""
    if not reference_file(table).exists():
        return {}
    return {metric: int(most) for metric, most in load_reference(table).groupby("metric")["decimals"].max().items()}


def bears_out(claim: ClaimEntry, bound: float) -> dict:
    """Whether the printed numbers say what the claim says, on every one of its eval sets.

    `bound` as eval.claims has it. Directions only: the paper prints no intervals, so a claim that holds
    here may still be noise.
    """
    cells = []
    if reference_file(claim.table).exists():
        printed = load_reference(claim.table).set_index(["eval_set", "label", "metric"])["printed"]
        for eval_set in claim.eval_sets:
            places = [(eval_set, label, claim.metric) for label in (claim.left, claim.right)]
            if all(place in printed.index for place in places):
                left, right = (printed[place] for place in places)
                verdict = _verdict(claim, Decimal(left), Decimal(right), Decimal(str(bound)))
                cells.append({"eval_set": eval_set, "left": left, "right": right, "verdict": verdict})
    said = {cell["verdict"] for cell in cells}
    verdict = next((worst for worst in (FAILS, EQUAL) if worst in said), HOLDS)
    return {"verdict": verdict if len(cells) == len(claim.eval_sets) else NOT_PRINTED, "cells": cells}


def _verdict(claim: ClaimEntry, left: Decimal, right: Decimal, bound: Decimal) -> str:
    if claim.relation == "at_least_share":
        return HOLDS if left >= bound * right else FAILS
    if claim.relation == "not_below":
        return HOLDS if left - right >= bound else FAILS
    if left == right:
        return EQUAL
    return HOLDS if (left > right) == (claim.relation == "above") else FAILS


def doubts(tables: list[str]) -> list[str]:
    """One line for each note on the paper's cells, with the cells that it is about."""
    lines = []
    for table in tables:
        cells = load_reference(table)
        for note, about in cells[cells["note"] != ""].groupby("note", sort=False):
            first = about.iloc[0]
            where = f"{len(about)} cells"
            if len(about) == 1:
                where = f"{first['label']}, {first['eval_set']}, {first['metric']} {first['printed']}"
            lines.append(f"{table}, {where}: {note}.")
    return lines
