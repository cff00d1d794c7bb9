"""What changed between two trees beside their numbers: settings, code, inputs, versions, machine, counts. No torch.

A record is a run.json, images.json, scores.json or one of the stand-in hub. A change is a dotted key with its value in
A and in B; records that changed alike stand together. A run is held against the same run, or against that of another
training seed where each tree has one alone. Costs, times and last losses differ by nature and are left out.
"""

import re
from collections import Counter
from typing import Any

import pandas as pd

from eval.compare_trees import Tree

ABSENT = "(not there)"
PARTS = {
    "scale": "Scale",
    "rows": "Rows of the tables",
    "settings": "Settings",
    "code": "Code",
    "inputs": "Inputs",
    "versions": "Versions",
    "hardware": "Hardware",
    "numerics": "Numerics",
    "counts": "Counts",
}
OF_RECORD = {  # part -> what of a record stands in it: field -> prefix of its keys
    "settings": {"config": ""},
    "code": {"code": "", "modules": "modules"},
    "versions": {"versions": ""},
    "hardware": {"hardware": "", "processes": "processes"},
    "numerics": {"numerics": "", "memory": "memory"},
    "counts": {"data": "data", "steps": "steps"},
}


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list of plain values is one value."""
    if isinstance(content, dict) and content:
        items = content.items()
    elif isinstance(content, list) and any(isinstance(item, (dict, list)) for item in content):
        items = enumerate(content)
    else:
        return {prefix: content}
    found = {}
    for key, value in items:
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def differing(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Dotted key, value in a, value in b, of everything nested that differs."""
    left, right = flatten(a), flatten(b)
    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in dict.fromkeys([*left, *right])]
    return [(key, one, other) for key, one, other in pairs if one != other or type(one) is not type(other)]


def kind_of(path: str) -> str:
    """`run.json` of a run's record."""
    return "of the hub" if path.startswith("hub/") else path.rpartition("/")[2]


def _parts(record: dict) -> dict[str, dict]:
    """A record's content by part, nested."""
    found = {}
    for part, fields in OF_RECORD.items():
        present = {prefix: record[field] for field, prefix in fields.items() if field in record}
        plain = present.pop("", {})
        found[part] = {**plain, **present}
    found["inputs"] = {}
    for entry in record.get("inputs", []):
        place = "/".join(str(entry[key]) for key in ("repo", "file") if entry.get(key))
        found["inputs"][place] = {key: value for key, value in entry.items() if key not in ("repo", "file")}
    return found


def changes(a: Tree, b: Tree) -> dict:
    """The section `config` of the comparison."""
    found: dict[tuple, list[str]] = {}
    both = matched(list(a.records), list(b.records))
    for path, (one_path, other_path) in both.items():
        left, right = _parts(a.records[one_path]), _parts(b.records[other_path])
        for part in left:
            for key, one, other in differing(left[part], right[part]):
                found.setdefault((part, key, repr(one), repr(other)), [one, other, []])[2].append(path)
    listed = _of_tables(a, b)
    for (part, key, *_), (one, other, records) in found.items():
        listed.append({"part": part, "key": key, "a": one, "b": other, "records": records})
    order, seen = list(PARTS), [{pair[side] for pair in both.values()} for side in (0, 1)]
    listed.sort(key=lambda change: (order.index(change["part"]), -len(change["records"]), change["key"]))
    return {
        "changes": listed,
        "records_compared": dict(Counter(map(kind_of, both))),
        "records_only_in_a": [path for path in a.records if path not in seen[0]] if both else [],
        "records_only_in_b": [path for path in b.records if path not in seen[1]] if both else [],
        "missing": _missing(a, b, bool(both)),
    }


def matched(a: list[str], b: list[str]) -> dict[str, tuple[str, str]]:
    """Name of a record -> its path in A and in B; `seed0|1` in the name where the two are of other training seeds."""
    found = {path: (path, path) for path in a if path in b}
    left, right = ({}, {})
    for rest, paths, others in ((left, a, b), (right, b, a)):
        for path in paths:
            if path not in others:
                rest.setdefault(re.sub(r"/seed\d+/", "/seed*/", path), []).append(path)
    for key in left:
        if len(left[key]) == len(right.get(key, [])) == 1:
            (one,), (other,) = left[key], right[key]
            seeds = "|".join(re.search(r"/seed(\d+)/", path)[1] for path in (one, other))
            found[key.replace("/seed*/", f"/seed{seeds}/")] = one, other
    return found


def _of_tables(a: Tree, b: Tree) -> list[dict]:
    """What the tables themselves tell: the scale, which runs a row is, over how many training seeds."""
    listed = []
    for key in ("scale", "caption"):
        one, other = getattr(a, key), getattr(b, key)
        if one != other:
            listed.append({"part": "scale", "key": key, "a": one, "b": other, "records": []})
    for table in [table for table in a.tables if table in b.tables]:
        left, right = (_rows(tree.tables[table]) for tree in (a, b))
        shared = [label for label in left if label in right]
        rows = differing({label: left[label] for label in shared}, {label: right[label] for label in shared})
        listed += [
            {"part": "rows", "key": f"{table}.{key}", "a": one, "b": other, "records": []} for key, one, other in rows
        ]
    return listed


def _rows(frame: pd.DataFrame) -> dict[str, dict]:
    rows = frame.drop_duplicates("label").set_index("label")[["model", "method", "steps", "num_runs"]]
    plain = rows.astype(object).where(rows.notna(), None)
    return {str(label): {key: _plain(value) for key, value in row.items()} for label, row in plain.iterrows()}


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _missing(a: Tree, b: Tree, any_in_both: bool) -> list[str]:
    """Sentences on what could not be looked at."""
    none = [f"{side} ({tree.name})" for side, tree in (("A", a), ("B", b)) if not tree.records]
    if none:
        return [
            f"{' and '.join(none)} {'has' if len(none) == 1 else 'have'} no run.json or other record (committed files "
            "only), so settings, code, inputs, versions and hardware could not be compared."
        ]
    if not any_in_both:
        return ["A and B have no record of the same run, so settings, code, inputs and versions could not be compared."]
    return []
