"""A tree against what the paper prints. No torch.

Only at scale `paper` are cells held against the paper's, by the rule of eval/diff.py; at any other scale only
directions (who is above whom) and claims are, as models, data and judges are others.
Differences are ours - the paper's.
"""

from eval.claims import FAILS, HOLDS
from eval.compare_trees import Tree
from eval.diff import CELL_RULE, CELL_VERDICTS, RULE, VERDICTS, counts
from eval.paper import FAILS as PAPER_FAILS
from eval.paper import HOLDS as PAPER_HOLDS
from eval.paper import NOT_PRINTED, load_reference
from pso.paths import REFERENCE
from pso.provenance import UserError

AGREES, DISAGREES, OPEN = "agrees", "disagrees", "open"
CLAIM_VERDICTS = (DISAGREES, AGREES, OPEN, NOT_PRINTED)
CLAIM_RULE = """\
A claim agrees if it holds here and in the paper's own printed cells, or fails in both; it disagrees if it holds in one
and fails in the other; it is open if it is inconclusive here or the paper prints equal numbers."""
NO_CELLS = """\
No number of scale {scale} is held against the paper's: models, training data and judges are others. What is compared is
who is above whom. Cells are compared at scale paper alone."""
UNKNOWN_SCORERS = """\
The paper does not say by which files and preprocessing its numbers were scored, so that could not be checked."""
ORDER = ("disagrees", "agrees", "inconclusive")


def against_paper(tree: Tree, side: str) -> dict:
    """The sections of a comparison with the paper."""
    old = [tree.why_no_directions(table, side) for table in tree.stale]
    if not tree.diffs:
        raise UserError(
            " ".join(old)
            or f"{side} ({tree.name}) has no tables/*.diff.json; `python -m eval.diff --table table1` makes one, "
            "`snakemake --cores 2` all."
        )
    held = all(diff["comparable"] for diff in tree.diffs.values())
    directions = [{"table": name, **e} for name, diff in tree.diffs.items() for e in diff["directions"]]
    for entry in directions:
        entry["kind"] = entry["verdict"] if entry["verdict"] in VERDICTS else "missing"
    directions.sort(key=lambda e: [*ORDER, "missing"].index(e["kind"]))
    found = {
        "held": held,
        "notes": [UNKNOWN_SCORERS if held else NO_CELLS.format(scale=tree.scale), *old, *_absent(tree)],
        "directions": {
            "counts": counts(_short(directions), VERDICTS),
            "measured": sum(entry["kind"] in VERDICTS for entry in directions),
            "rule": RULE,
            "entries": directions,
        },
        "claims": _claims(tree),
        "cells": None,
    }
    if held:
        cells = [{"table": name, **e} for name, diff in tree.diffs.items() for e in diff["cells"]]
        found["cells"] = _cells(cells)
    return found


def _short(entries: list[dict]) -> list[dict]:
    return [{"verdict": entry["kind"]} for entry in entries]


def _claims(tree: Tree) -> dict:
    entries = []
    for claim in (tree.claims or {}).values():
        paper = claim["paper"]["verdict"]
        told = {key: claim[key] for key in ("id", "group", "text", "table", "metric", "left", "right", "relation")}
        told |= {"ours": claim["verdict"], "paper": paper, "estimate": claim["estimate"], "interval": claim["interval"]}
        entries.append(told | {"verdict": _agreement(claim["verdict"], paper), "cells": claim["paper"]["cells"]})
    entries.sort(key=lambda entry: CLAIM_VERDICTS.index(entry["verdict"]))
    missing = [] if tree.claims is not None else ["no claims.json; `python -m eval.claims` makes it."]
    measured = sum(entry["estimate"] is not None and entry["verdict"] != NOT_PRINTED for entry in entries)
    found = {"counts": counts(entries, CLAIM_VERDICTS), "measured": measured, "rule": CLAIM_RULE}
    return found | {"entries": entries, "missing": missing}


def _agreement(ours: str, paper: str) -> str:
    if paper == NOT_PRINTED:
        return NOT_PRINTED
    sides = {HOLDS: PAPER_HOLDS, FAILS: PAPER_FAILS}
    if ours not in sides or paper not in sides.values():
        return OPEN
    return AGREES if sides[ours] == paper else DISAGREES


def _cells(cells: list[dict]) -> dict:
    order = ["higher", "lower", "same"]
    cells.sort(key=lambda cell: order.index(cell["verdict"]) if cell["verdict"] in order else len(order))
    named = [{"verdict": c["verdict"] if c["verdict"] in CELL_VERDICTS else "missing"} for c in cells]
    return {"counts": counts(named, CELL_VERDICTS), "rule": CELL_RULE, "entries": cells}


def _absent(tree: Tree) -> list[str]:
    """What the paper prints and the tree does not have, and cells that are read otherwise now."""
    found = []
    for name in sorted(path.stem for path in REFERENCE.glob("*.csv")):
        printed = _printed(name)
        if name in tree.stale:
            continue
        if name not in tree.diffs:
            found.append(f"{name}, {len(printed)} cells of the paper, is not in the tree, or was not asked for.")
            continue
        told = {(c["eval_set"], c["label"], c["metric"]): c["paper"] for c in tree.diffs[name]["cells"]}
        if other := [place for place, text in printed.items() if told.get(place) != text]:
            found.append(
                f"{len(other)} cells of {name} are not those of eval/reference/{name}.csv, the first "
                f"{', '.join(other[0])}; `python -m eval.diff --table {name}` reads them anew."
            )
    return found


def _printed(name: str) -> dict[tuple[str, str, str], str]:
    reference = load_reference(name)
    places = zip(reference["eval_set"], reference["label"], reference["metric"], strict=True)
    return dict(zip(places, reference["printed"], strict=True))
