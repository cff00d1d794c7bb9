"""The paper's sentences with their verdicts, and the evidence of each. No torch."""

from collections import Counter

from eval.claims import (
    BOTH,
    DOUBTS,
    FAILS,
    FALSE_IN_PAPER,
    HOLDS,
    HOW,
    INCONCLUSIVE,
    RELATIONS,
    doubts_of,
    is_false,
    number,
    printed_cells,
    rows_trained_on,
)
from eval.scores import metric_title
from eval.sections.page import Context, render
from eval.sections.tables import minus
from eval.tables import unit

TITLE = "Claims"
WHY_NONE = "No claim has been judged yet; `snakemake --cores 2 claims` does it."
KINDS = {HOLDS: "agrees", FAILS: "disagrees", INCONCLUSIVE: "open"}
PLURAL = {HOLDS: "hold", FAILS: "fail", INCONCLUSIVE: "inconclusive"}


def section(context: Context) -> str | None:
    if not context.has("claims.json"):
        return None
    found = context.json("claims.json")
    groups: dict[str, list[dict]] = {}
    for entry in found:
        groups.setdefault(entry["group"], []).append(_shown(context, entry))
    return render(
        "claims.html",
        groups=groups,
        total=len(found),
        counts=verdict_counts(found),
        unmeasured=num_unmeasured(found),
        kinds=KINDS,
        plural=PLURAL,
        printed=Counter(entry["paper"]["verdict"] for entry in found),
        contradicted=[{"id": e["id"], "text": e["text"], "cells": printed_cells(e)} for e in found if is_false(e)],
        false_in_paper=FALSE_IN_PAPER,
        doubts=doubts_of(found),
        doubts_are=DOUBTS,
        how=HOW,
        relations=RELATIONS,
        both=BOTH,
    )


def verdict_counts(found: list[dict]) -> dict[str, int]:
    number_of = Counter(entry["verdict"] for entry in found)
    return {verdict: number_of[verdict] for verdict in KINDS}


def num_unmeasured(found: list[dict]) -> int:
    """Claims without an estimate; their verdict is inconclusive, too."""
    return sum(entry["estimate"] is None for entry in found)


def _shown(context: Context, entry: dict) -> dict:
    """A claim as the template writes it: texts."""
    config = context.config
    shown = {key: entry[key] for key in ("id", "text", "source", "verdict", "table", "left", "right", "relation")}
    shown |= {"kind": KINDS[entry["verdict"]], "why": entry["remark"] or entry["reason"]}
    shown |= {"metric": metric_title(config, entry["metric"]), "eval_sets": entry["eval_sets"]}
    shown |= {"paper": entry["paper"], "printed": printed_cells(entry) if entry["paper"]["cells"] else None}
    shown |= {"trained_on": rows_trained_on(config, entry), "measured": entry["estimate"] is not None}
    shown |= {"in_page": entry["table"] in config.tables}
    if entry["estimate"] is None:
        return shown
    low, high = (_text(config, entry, end) for end in entry["interval"])
    seeds = entry["estimate_by_training_seed"].items()
    return shown | {
        "estimate": _text(config, entry, entry["estimate"]),
        "interval": f"[{low}, {high}]",
        "bound": _text(config, entry, entry["bound"]),
        "p": f"{entry['p_value']:.4f}",
        "p_holm": f"{entry['p_value_holm']:.4f}",
        "n": entry["n"],
        "prompts": entry["prompts"],
        "win_rate": f"{entry['win_rate']:.1%} of {unit(config.table_entries[entry['table']])}",
        "seeds": entry["training_seeds"],
        "by_seed": {seed: _text(config, entry, value) for seed, value in seeds},
        "scorer": entry["scorer"]["digest"],
        "spec": {key: value for key, value in entry["scorer"]["spec"].items() if not isinstance(value, dict)},
        "dropped": entry["dropped"],
    }


def _text(config, entry: dict, value: float) -> str:
    return minus(number(config, entry, value))
