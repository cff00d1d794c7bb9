"""Verdicts of two trees side by side: directions ({table}.diff.json) and claims (claims.json). No torch.

A tree judged each of them by itself, so its verdicts can be compared where its numbers could not be paired.
"""

from collections.abc import Callable

from eval.compare_cells import ONLY_A, ONLY_B, Key
from eval.compare_trees import Tree
from pso.paths import reference_file

MISSING = "missing"
OPPOSITES = ({"agrees", "disagrees"}, {"holds", "fails"})
DECLARED = ("table", "left", "right", "metric", "eval_sets", "relation", "bound")  # what a claim says


def directions(a: Tree, b: Tree, left_out: set[Key]) -> dict:
    """The section `directions`: those whose verdict changed."""
    old = {*a.stale, *b.stale}  # of these neither tree's are compared: one is not known, and that is no difference
    found = {"a": _directions(a, old), "b": _directions(b, old)}

    def is_out(entry: dict) -> bool:
        places = [
            (entry["table"], entry["eval_set"], label, entry["metric"]) for label in (entry["label"], entry["base"])
        ]
        return any(place in left_out for place in places)

    def told(entry: dict) -> dict:
        return {"verdict": _verdict(entry), "estimate": entry["difference"], "interval": entry["interval"],
                "paper": entry["paper"]}  # fmt: skip

    def about(entry: dict) -> dict:
        return {key: entry[key] for key in ("table", "eval_set", "label", "base", "metric")}

    missing = [
        why
        for side, tree in (("A", a), ("B", b))
        for table in tree.tables
        if reference_file(table).exists() and (why := tree.why_no_directions(table, side))
    ]
    return _section(found["a"], found["b"], is_out, about, told) | {"missing": missing}


def claims(a: Tree, b: Tree, left_out: set[Key]) -> dict:
    """The section `claims`: those whose verdict, or whose declaration, changed."""

    def is_out(entry: dict) -> bool:
        rows = [(entry["table"], eval_set, label, entry["metric"])
                for eval_set in entry["eval_sets"] for label in (entry["left"], entry["right"])]  # fmt: skip
        return any(row in left_out for row in rows)

    def told(entry: dict) -> dict:
        return {"verdict": entry["verdict"], "estimate": entry["estimate"], "interval": entry["interval"],
                "declared": {key: entry[key] for key in DECLARED}}  # fmt: skip

    def about(entry: dict) -> dict:
        return {key: entry[key] for key in ("id", "group", "text", "table", "metric", "left", "right", "relation")}

    missing = [
        f"{side} ({tree.name}) has no claims.json, so its claims are not judged; `python -m eval.claims` makes it."
        for side, tree in (("A", a), ("B", b))
        if tree.claims is None
    ]
    found = _section(a.claims or {}, b.claims or {}, is_out, about, told)
    return found | {"missing": missing, "judged": {"a": a.judged, "b": b.judged}}


def _directions(tree: Tree, without: set[str]) -> dict[tuple, dict]:
    return {
        (name, entry["eval_set"], entry["label"], entry["metric"]): {"table": name, **entry}
        for name, diff in tree.diffs.items()
        if name not in without
        for entry in diff["directions"]
    }


def _verdict(entry: dict) -> str:
    """Without the reason of what is missing: it is told where the cell is."""
    return MISSING if entry["verdict"].startswith(MISSING) else entry["verdict"]


def _section(a: dict, b: dict, is_out: Callable, about: Callable, told: Callable) -> dict:
    if not a or not b:  # one side knows none at all: said once, not as many changes
        only_in = "A" if a else "B" if b else None
        return {
            "compared": 0,
            "measured": 0,
            "same": 0,
            "left_out": 0,
            "transitions": {},
            "changed": [],
            "only_in": only_in,
        }
    changed, same, left_out, measured = [], 0, 0, 0
    for key in dict.fromkeys([*a, *b]):
        either = [side[key] for side in (a, b) if key in side]
        if any(is_out(entry) and told(entry)["estimate"] is not None for entry in either):
            left_out += 1
            continue
        one, other = (told(side[key]) if key in side else None for side in (a, b))
        measured += all(side is not None and side["estimate"] is not None for side in (one, other))
        if one is not None and other is not None and _alike(one, other):
            same += 1
            continue
        changed.append(about(either[0]) | {"a": one, "b": other, "change": _change(one, other)})
    changed.sort(key=lambda entry: -_weight(entry))
    transitions: dict[str, int] = {}
    for entry in changed:
        transitions[entry["change"]] = transitions.get(entry["change"], 0) + 1
    found = {"compared": same + len(changed), "measured": measured, "same": same, "left_out": left_out}
    return found | {"transitions": transitions, "changed": changed, "only_in": None}


def _alike(one: dict, other: dict) -> bool:
    said = ("verdict", "paper", "declared")
    return all(one.get(key) == other.get(key) for key in said)


def _change(one: dict | None, other: dict | None) -> str:
    """`agrees -> disagrees`."""
    if one is None or other is None:
        return ONLY_B if one is None else ONLY_A
    if one["verdict"] == other["verdict"]:
        return (
            f"{one['verdict']}, declared otherwise" if "declared" in one else f"{one['verdict']}, paper read otherwise"
        )
    return f"{one['verdict']} -> {other['verdict']}"


def _weight(entry: dict) -> int:
    """A verdict turned round first, then one gained or lost, then what only one tree has."""
    if entry["a"] is None or entry["b"] is None:
        return 0
    pair = {entry["a"]["verdict"], entry["b"]["verdict"]}
    return 3 if pair in OPPOSITES else 2 if len(pair) > 1 and MISSING not in pair else 1
