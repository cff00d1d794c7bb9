"""Whether a number of one tree may be held against the other's: the same scorer, and the same protocol. No torch.

Scorer: the spec that lies in the metadata of every scores file, else in scores.json, else in claims.json: in claims of
the row, else of its table, else of the metric. Two specs of one cell (a tree scored again in part) are refused as well.
Protocol: which pictures of which prompts, from which noise, and how a model is sampled; its weights and method are none
of it. What a tree does not tell cannot be checked, and is listed as such.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os.path import commonprefix
from typing import Any

import pandas as pd

from eval.compare_config import flatten
from eval.compare_trees import Tree
from eval.scores import IMAGE, Scores
from pso.entries import Config
from pso.provenance import UserError, digest

SAMPLING = ("resolution", "guidance_scale", "guidance_embedding", "sampler")
FETCHED = "the published ones"
SCORED = "images with a score"
SKIP, DESPITE_CODE = "--skip-incomparable", "--despite-code"
LONGEST, SHOWN = 40, 16  # letters of a value that is told whole; of a longer one
CODE = "code"  # of a scorer: a hash that any change of its code changes, one that changes no score too


@dataclass(frozen=True)
class Told:
    """What a tree says of one cell."""

    specs: list[dict]  # of its scorer: none if the tree does not tell, several if it contradicts itself
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Obstacle:
    """A field that keeps one cell from being compared."""

    what: str  # `scorer of pick_score`, or `protocol`
    field: str
    a: Any
    b: Any
    within: str | None = None  # A or B, where a and b are two values of that tree


def told_of(config: Config, tree: Tree, table: str, line: pd.Series, metric: str, scores: Scores | None) -> Told:
    task = config.table_entries[table].tasks[0] if table in config.table_entries else "preference"
    return Told(_specs(tree, table, line, task, metric, scores), _protocol(config, tree, line, task, scores))


def _specs(tree: Tree, table: str, line: pd.Series, task: str, metric: str, scores: Scores | None) -> list[dict]:
    if scores is not None:
        return [scores.spec]
    if spec := tree.record(line, task, "scores").get("specs", {}).get(metric):
        return [spec]
    of_metric = [claim for claim in tree.scored_claims if claim["metric"] == metric]
    of_table = [claim for claim in of_metric if claim["table"] == table]
    of_row = [claim for claim in of_table if line["label"] in (claim["left"], claim["right"])]
    specs = [claim["scorer"]["spec"] for claim in of_row or of_table or of_metric]
    return list({digest(spec): spec for spec in specs}.values())


def _protocol(config: Config, tree: Tree, line: pd.Series, task: str, scores: Scores | None) -> dict[str, Any]:
    eval_set = line["eval_set"]
    fetched = config.scale_entry.hub == "fetched"
    found: dict[str, Any] = {"weights and data": FETCHED if fetched else f"those made at scale {tree.scale}"}
    found["steps"] = int(line["steps"])
    if scores is not None:
        images = scores.frame.drop_duplicates(IMAGE)
        seeds, prompts = images["image_seed"], sorted(images["prompt_id"].astype(str).unique())
        found |= {f"{eval_set}: prompts": len(prompts), f"{eval_set}: images per prompt": int(seeds.nunique())}
        found |= {f"{eval_set}: eval seed": int(seeds.min()), f"{eval_set}: prompt ids": digest(prompts)}
        images = sorted(map(list, images[IMAGE].astype(str).to_numpy()))
        found[f"{eval_set}: {SCORED}"] = f"{len(images)} ({digest(images)})"
    else:
        prompts = int(line["num_prompts"])
        images = math.ceil(line["num_images"] / (prompts * line["num_runs"]))  # some may have no score
        found |= {f"{eval_set}: prompts": prompts, f"{eval_set}: images per prompt": images}
    return found | _sampling(tree, line, task)


def _sampling(tree: Tree, line: pd.Series, task: str) -> dict[str, Any]:
    """How a row's model is sampled, by the record of its images or of its run."""
    runs = f"{task}/{line['model']}/{line['method']}/"
    records = [tree.record(line, task, "images"), *(r for path, r in tree.records.items() if path.startswith(runs))]
    for record in records:
        if entry := record.get("config", {}).get("model", {}).get(line["model"]):
            told = {field: entry[field] for field in SAMPLING if field in entry}
            return told | ({"grid": entry["grids"].get(str(line["steps"]))} if "grids" in entry else {})
    return {}


def obstacles(metric: str, a: Told, b: Told) -> list[Obstacle]:
    """Every field of scorer and protocol that both tell and tell differently, or of which one tree tells two values."""
    found, what = [], f"scorer of {metric}"
    sides = {"A": [flatten(spec) for spec in a.specs], "B": [flatten(spec) for spec in b.specs]}
    for key in sorted({key for specs in sides.values() for spec in specs for key in spec}):
        values = {side: _distinct([spec.get(key) for spec in specs]) for side, specs in sides.items()}
        split = {side: told for side, told in values.items() if len(told) > 1}
        found += [Obstacle(what, key, *told[:2], within=side) for side, told in split.items()]
        if not split and all(values.values()) and values["A"] != values["B"]:
            found.append(Obstacle(what, key, *values["A"], *values["B"]))
    differing = [field for field, value in a.protocol.items() if field in b.protocol and value != b.protocol[field]]
    if len(differing) > 1:  # other prompts or noises are other images: said once
        differing = [field for field in differing if not field.endswith(SCORED)]
    return found + [Obstacle("protocol", field, a.protocol[field], b.protocol[field]) for field in differing]


def _distinct(values: list) -> list:
    """Each once; they may be lists."""
    return [value for place, value in enumerate(values) if value not in values[:place]]


def unchecked(metric: str, eval_set: str, a: Told, b: Told) -> list[tuple[str, str]]:
    """What one of the trees, or both, does not tell: ("scorer", metric) or ("protocol", field)."""
    fields = {"eval seed": f"{eval_set}: eval seed", "prompt ids": f"{eval_set}: prompt ids"}
    fields |= {field: field for field in (*SAMPLING, "grid")}
    found = [("scorer", metric)] if not a.specs or not b.specs else []
    return found + [("protocol", n) for n, at in fields.items() if at not in a.protocol or at not in b.protocol]


# ---- in words ----


def grouped(found: Iterable[tuple[tuple, Obstacle]], rows: dict[str, list[str]]) -> list[dict]:
    """The cells (table, eval_set, label, metric) that one field concerns, together; rows: all those of each table."""
    groups: dict[tuple, dict] = {}
    for cell, obstacle in found:
        key = (obstacle.what, obstacle.field, repr(obstacle.a), repr(obstacle.b), obstacle.within)
        groups.setdefault(key, {**asdict(obstacle), "cells": []})["cells"].append(list(cell))
    for group in groups.values():
        of_table: dict[str, list[str]] = {}
        for table, _, label, _ in group["cells"]:
            of_table.setdefault(table, []).append(label)
        named = {table: list(dict.fromkeys(labels)) for table, labels in of_table.items()}
        group["rows"] = {table: "all" if set(named[table]) == set(rows[table]) else named[table] for table in named}
    return list(groups.values())


def sentence(group: dict) -> str:
    """`scorer of pick_score: transform is a in A and b in B (all rows of table1; table2: SDXL-Turbo-4step)`."""
    whole = [table for table, labels in group["rows"].items() if labels == "all"]
    places = [f"all rows of {', '.join(whole)}"] if whole else []
    places += [f"{table}: {', '.join(labels)}" for table, labels in group["rows"].items() if labels != "all"]
    one, other = shown(group["a"], group["b"]), shown(group["b"], group["a"])
    values = f"{one} in A and {other} in B"
    if within := group["within"]:
        values = f"{one} in some claims of {within} and {other} in others"
    return f"{group['what']}: {group['field']} is {values} ({'; '.join(places)})"


def shown(value: Any, other: Any) -> str:
    """A value in short; of a long one the part where it begins to differ from the other."""
    text = "nothing" if value is None else str(value)
    if len(text) <= LONGEST:
        return text
    alike = len(commonprefix([text, str(other)]))
    start = alike - SHOWN // 2 if alike >= SHOWN else 0
    return f"{'...' if start else ''}{text[start : start + SHOWN]}{'...' if start + SHOWN < len(text) else ''}"


def refusal(groups: list[dict], num_cells: int, total: int) -> UserError:
    """Every field that differs, and what to do."""
    remedies = []
    if any(group["what"] != "protocol" for group in groups):
        remedies.append("score both with the same scorer (`python -m eval.score --model MODEL --results RESULTS`)")
    if within := sorted({group["within"] for group in groups} - {None}):
        remedies.append(f"judge the claims of {' and '.join(within)} anew (`python -m eval.claims`)")
    if any(group["what"] == "protocol" for group in groups):
        remedies.append("make both with the same settings (workflow/config)")
    code = any(group["field"] == CODE for group in groups)
    despite = f", {DESPITE_CODE} compares what was scored by another version of the same scorer" if code else ""
    fields = "\n".join(f"  - {sentence(group)}" for group in groups)
    return UserError(
        f"{num_cells} of {total} cells cannot be compared, because A and B do not measure them alike:\n{fields}\n"
        f"To compare them, {' and '.join(remedies)}; {SKIP} compares the rest and lists what it leaves out{despite}."
    )
