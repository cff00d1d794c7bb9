"""timeline.jsonl: when a run began, where it was, and how it ended, over all its restarts. Torch-free.

Only for whoever watches (pso/progress.py): no result depends on it, and no two runs write the same one. A run that is
killed writes no last line, so a session ends where its last line is.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import psutil

from pso.provenance import UserError

NAME = "timeline.jsonl"  # beside train.jsonl
EVENTS = ("began", "at", "stopped", "ended")
EVERY_S = 10.0  # between lines of a run that goes on


class Timeline:
    """Lines of one session of a run are added to those of the sessions before it."""

    def __init__(self, path: Path):
        self.path, self.written = Path(path), -EVERY_S

    def began(self, update: int, planned: int, processes: int, gpus: int) -> None:
        """At update `update`, which is not 0 after a restart; the session counts from the start of this process."""
        started = round(psutil.Process().create_time(), 1)
        self._write("began", update, planned=planned, processes=processes, gpus=gpus, started=started)

    def at(self, update: int) -> None:
        """After an update, as often as anyone would look."""
        if time.monotonic() - self.written >= EVERY_S:
            self._write("at", update)

    def stopped(self, update: int, why: str) -> None:
        """Before its end, with what is kept, by a signal or by an error of which it knows."""
        self._write("stopped", update, why=why)

    def ended(self, update: int) -> None:
        """With its results written."""
        self._write("ended", update)

    def _write(self, event: str, update: int, **more) -> None:
        self.written = time.monotonic()
        append(self.path, {"event": event, "time": round(time.time(), 1), "update": update, **more})


def append(path: Path, entry: dict) -> None:
    """One line at the end of a file, whole or not at all; what a kill tore off before it stays a line of its own."""
    size = None
    try:
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            line = (b"" if file.read(1) in (b"", b"\n") else b"\n") + json.dumps(entry).encode() + b"\n"
            while line:  # on a full disk only its beginning may fit
                line = line[file.write(line) :]
    except OSError as error:
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise UserError(
            f"could not write {path}: {error.strerror or error}; its earlier lines are kept. "
            "Make room, then run the same command again."
        ) from error


def read(path: Path) -> list[dict]:
    """Its lines, also while it is written; what is no whole line of ours is left out. No file, no lines."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [entry for entry in map(parsed, lines) if entry is not None and _ours(entry)]


def parsed(line: bytes) -> dict | None:
    """A line of a .jsonl file; None for one that is torn."""
    try:
        entry = json.loads(line)
    except ValueError:  # JSONDecodeError, UnicodeDecodeError
        return None
    return entry if isinstance(entry, dict) else None


def _ours(entry: dict) -> bool:
    numbers = [entry.get("time"), entry.get("update")]
    if entry.get("event") == "began":
        numbers += [entry.get(name) for name in ("planned", "processes", "gpus", "started")]
    return entry.get("event") in EVENTS and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
