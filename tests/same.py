"""Whether two results folders hold the same: what an interrupted run left against an undisturbed one."""

import json
import re
from pathlib import Path

SHARED = ("hub", "cache")  # by the folders that are compared
FREE = ("tune.log", "timeline.jsonl")  # what was said and when, the interruptions included
COSTS = ("cost", "resumed_at")  # of a record: seconds, memory, images made and kept; where a run went on
UNFINISHED = re.compile(r"\.part$|\.tmp$|\.lock$|^\.?state")


def made(base: Path, shared: tuple[str, ...] = SHARED) -> list[Path]:
    """Relative paths of all files below results/{scale} that jobs made, what is hidden included."""
    found = (path.relative_to(base) for path in base.rglob("*") if path.is_file())
    return sorted(path for path in found if path.parts[0] not in (*shared, "logs") and path.name not in FREE)


def content(path: Path) -> bytes:
    """What has to be the same of a file: its bytes; of a record all but costs."""
    found = path.read_bytes()
    if path.suffix == ".json" and isinstance(told := json.loads(found), dict):
        return json.dumps({k: v for k, v in told.items() if k not in COSTS}).encode()
    return found


def differing(ours: Path, theirs: Path, shared: tuple[str, ...] = SHARED) -> list[str]:
    """Files below two results/{scale} that are not the same, or that one of them lacks."""
    here, there = set(made(ours, shared)), set(made(theirs, shared))
    other = {p for p in here & there if content(ours / p) != content(theirs / p)}
    return sorted(map(str, (here ^ there) | other))


def unfinished(base: Path) -> list[str]:
    """Files and folders that an interrupted job left and nothing took away."""
    found = (path.relative_to(base) for path in base.rglob("*") if UNFINISHED.search(path.name))
    return sorted(str(path) for path in found if path.parts[0] != "hub")
