"""Whether two results folders hold the same: what an interrupted run left against an undisturbed one."""

import json
import re
from pathlib import Path

MADE_BEFORE = ("hub", "cache")  # shared by the folders that are compared
FREE = ("tune.log",)  # what was said, and when
COSTS = {"cost", "resumed_at"}  # of a record: seconds, memory, images made and kept; where a run went on
RECORDS = ("run.json", "images.json", "scores.json")
UNFINISHED = re.compile(r"\.part$|\.gone$|^\.?state$|\.tmp$")


def made(base: Path) -> list[Path]:
    """Relative paths of all files below results/{scale} that jobs made, what is hidden included."""
    found = (path.relative_to(base) for path in base.rglob("*") if path.is_file())
    return sorted(path for path in found if path.parts[0] not in (*MADE_BEFORE, "logs"))


def content(path: Path) -> bytes:
    """What has to be the same of a file: its bytes; of a record all but costs."""
    if path.name not in RECORDS:
        return path.read_bytes()
    return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in COSTS}).encode()


def differing(ours: Path, theirs: Path) -> list[str]:
    """Files below two results/{scale} that are not the same, or that one of them lacks."""
    here, there = ({p for p in made(base) if p.name not in FREE} for base in (ours, theirs))
    other = {p for p in here & there if content(ours / p) != content(theirs / p)}
    return sorted(map(str, (here ^ there) | other))


def unfinished(base: Path) -> list[str]:
    """Files and folders that an interrupted job left and nothing took away."""
    found = (path.relative_to(base) for path in base.rglob("*") if UNFINISHED.search(path.name))
    return sorted(str(path) for path in found if path.parts[0] not in MADE_BEFORE)
