"""The cells of two trees' tables side by side. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from eval.compare_same import CODE, Obstacle, Told, obstacles, told_of, unchecked
from eval.compare_trees import Tree
from eval.diff import STALE
from eval.scores import MANY_SUBJECTS, Scores, pair, units
from eval.stats import Undefined, mean, mean_interval, paired_difference
from pso.entries import Config

SAME, HIGHER, LOWER, ONLY_A, ONLY_B = "same", "higher", "lower", "only in A", "only in B"
VERDICTS = (HIGHER, LOWER, ONLY_A, ONLY_B, SAME)
PAIRED, INTERVALS = "paired", "intervals"
RULES = {
    PAIRED: "Both trees have scores of the same prompts and noise: higher and lower if the 95 % interval of B - A lies "
    "above or below 0; same if it holds 0. It is a bootstrap of the paired differences over prompts, or over subjects "
    f"where a table has at least {MANY_SUBJECTS}.",
    INTERVALS: "A tree without scores of single images tells only its means and their 95 % intervals: higher and lower "
    "if the two intervals do not meet, else same. As the same prompts are in both, this sees large differences only.",
    "all": "Not corrected for the number of cells: of those that differ by chance alone up to one in twenty is called "
    "higher or lower. The training seed is not in the intervals.",
}

Key = tuple[str, str, str, str]  # table, eval_set, label, metric


@dataclass
class Side:
    """One tree's part of a cell."""

    value: float
    interval: tuple[float, float] | None
    told: Told
    scores: Scores | None
    why: str | None  # there are no scores


class Cells:
    """Every cell of two trees, read once."""

    def __init__(self, configs: dict[str, Config], a: Tree, b: Tree, despite_code: bool = False) -> None:
        self.configs, self.a, self.b, self.despite_code = configs, a, b, despite_code
        self.rows: dict[str, list[str]] = {}  # of each table, with a number in both trees
        self.entries: list[dict] = []
        self.hindered: list[tuple[Key, Obstacle]] = []
        self.despite: list[tuple[Key, Obstacle]] = []  # compared all the same
        self.unchecked: dict[str, dict[str, set[Key]]] = {"scorer": {}, "protocol": {}}
        self.stale: list[str] = []
        self.in_neither = 0
        for key, left, right in self._places():
            self._add(key, left, right)

    @property
    def left_out(self) -> set[Key]:
        return {key for key, _ in self.hindered}

    @property
    def total(self) -> int:
        return len(self.entries) + len(self.left_out)

    def _places(self) -> Iterator[tuple[Key, pd.Series | None, pd.Series | None]]:
        """Each cell with its line in either table, in the order of the tables."""
        for table in dict.fromkeys([*self.a.tables, *self.b.tables]):
            lines, columns = [], []
            for tree in (self.a, self.b):
                frame = tree.tables.get(table)
                lines.append({} if frame is None else {(li["eval_set"], li["label"]): li for _, li in frame.iterrows()})
                columns += [] if frame is None else tree.metrics(table)
            for place in dict.fromkeys([*lines[0], *lines[1]]):
                for metric in dict.fromkeys(columns):
                    yield (table, *place, metric), lines[0].get(place), lines[1].get(place)

    def _add(self, key: Key, left: pd.Series | None, right: pd.Series | None) -> None:
        a, b = self._side(self.a, key, left), self._side(self.b, key, right)
        if a is None and b is None:
            self.in_neither += 1
            return
        if a is not None and b is not None:
            self.rows.setdefault(key[0], []).append(key[2])
            found = [(key, obstacle) for obstacle in obstacles(key[3], a.told, b.told)]
            if self.despite_code and all(obstacle.field == CODE for _, obstacle in found):
                self.despite += found
            elif found:
                self.hindered += found
                return
            for kind, what in unchecked(key[3], key[1], a.told, b.told):
                self.unchecked[kind].setdefault(what, set()).add(key)
        entry = dict(zip(("table", "eval_set", "label", "metric"), key, strict=True))
        for name, side, line in (("a", a, left), ("b", b, right)):
            ends = None if side is None or side.interval is None else list(side.interval)
            entry[name] = None if side is None else {"value": side.value, "interval": ends}
            entry[f"{name}_missing"] = None if side is not None else _why_missing(line)
        self.entries.append(entry | self._verdict(key, a, b))

    def _side(self, tree: Tree, key: Key, line: pd.Series | None) -> Side | None:
        table, _, _, metric = key
        if line is None or metric not in line or pd.isna(line[metric]):
            return None
        config = self.configs[tree.scale]
        scores, why = tree.scores(config, table, line, metric)
        value, interval = float(line[metric]), None
        low, high = (float(line.get(f"{metric}_{end}", math.nan)) for end in ("low", "high"))
        if math.isfinite(low) and math.isfinite(high):
            interval = low, high
        if scores is not None:
            value, interval = self._of_scores(tree, key, scores, value, interval)
        return Side(value, interval, told_of(config, tree, table, line, metric, scores), scores, why)

    def _of_scores(self, tree: Tree, key: Key, scores: Scores, value: float, interval: tuple | None) -> tuple:
        """The table's numbers; where they are not those of the scores, the scores' own, and a remark."""
        frame, over = scores.frame, units(scores.frame)
        try:
            found = mean(frame["score"], **over)
        except Undefined:  # the table was made of them all the same, so it says what it can
            return value, interval
        if abs(found - value) <= STALE * max(1.0, abs(found)):
            return value, interval
        side = "A" if tree is self.a else "B"
        table, eval_set, label, metric = key
        self.stale.append(
            f"{side}: tables/{table}.csv has {value:.6g} for {label}, {eval_set}, {metric}, its scores give "
            f"{found:.6g}; the scores count. `python -m eval.tables --table {table}` makes the table anew."
        )
        scale = self.configs[tree.scale].scale_entry
        own = mean_interval(frame["score"], resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **over)
        return own.value, (own.low, own.high)

    def _verdict(self, key: Key, a: Side | None, b: Side | None) -> dict:
        """How the two differ; the verdict is None where nothing tells how sure a number is."""
        found = {"difference": None, "interval": None, "rule": None, "why_not_paired": None, "equal": False}
        if a is None or b is None:
            return found | {"verdict": ONLY_B if a is None else ONLY_A}
        found["difference"] = b.value - a.value
        if a.scores is not None and b.scores is not None:
            try:
                return found | self._paired(a.scores, b.scores)
            except Undefined as error:
                why = str(error)
        else:
            sides = {"A": a.why, "B": b.why}
            why = "; ".join(f"{side}: {reason}" for side, reason in sides.items() if reason)
        found |= {"rule": INTERVALS, "why_not_paired": why}
        found["equal"] = (a.value, a.interval) == (b.value, b.interval)
        if a.interval is None or b.interval is None:
            return found | {"verdict": None}
        meet = a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]
        return found | {"verdict": SAME if meet else HIGHER if found["difference"] > 0 else LOWER}

    def _paired(self, left: Scores, right: Scores) -> dict:
        if left.frame.equals(right.frame):
            return {"difference": 0.0, "interval": [0.0, 0.0], "rule": PAIRED, "equal": True, "verdict": SAME}
        pairs = pair(replace(left, spec=right.spec), right)  # `_add` has compared the scorers
        scale = self.configs[self.a.scale].scale_entry
        found = paired_difference(
            pairs["right"], pairs["left"], resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **units(pairs)
        )
        verdict = HIGHER if found.low > 0 else LOWER if found.high < 0 else SAME
        return {
            "difference": found.value,
            "interval": [found.low, found.high],
            "rule": PAIRED,
            "equal": False,
            "verdict": verdict,
        }


def _why_missing(line: pd.Series | None) -> str:
    if line is None:
        return "no such row"
    return str(line["status"]) if pd.notna(line.get("status")) else "no such number"


def section(cells: Cells) -> dict:
    """The section `cells` of the comparison."""
    counts = {verdict: sum(e["verdict"] == verdict for e in cells.entries) for verdict in VERDICTS}
    rules = {e["rule"] for e in cells.entries} - {None}
    return {
        "counts": counts,
        "equal": sum(e["equal"] for e in cells.entries),
        "compared": len(cells.entries),
        "not_judged": sum(e["verdict"] is None for e in cells.entries),
        "in_neither": cells.in_neither,
        "by_rule": {rule: sum(e["rule"] == rule for e in cells.entries) for rule in (PAIRED, INTERVALS)},
        "rules": [RULES[rule] for rule in RULES if rule in rules or rule == "all"],
        "cells": cells.entries,
    }
