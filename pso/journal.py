"""train.jsonl: one line per update and per probe, and a progress line on the console now and then. Torch-free."""

import json
import logging
import math
import time
from pathlib import Path

from pso.provenance import atomic
from pso.timeline import append

log = logging.getLogger("tune")
PROGRESS_S = 10.0  # seconds between progress lines
SHOWN = ("loss", "margin", "implicit_accuracy", "clip_fraction", "reward_target")


class Journal:
    """Begins with what an interrupted run logged up to update `start`; what came after it is made again."""

    def __init__(self, path: Path, start: int, planned: int):
        self.path, self.start, self.planned, self.last = path, start, planned, {}
        lines = [(_update_of(line), line) for line in _lines(path)]
        self.reached = max((update for update, _ in lines if update < math.inf), default=0)  # by earlier sessions
        kept = [line for update, line in lines if start and update <= start]
        with atomic(path) as part:
            part.write_text("".join(f"{line}\n" for line in kept))
        self.began = self.printed = time.monotonic()

    def write(self, entry: dict) -> None:
        """One line, whole or not at all."""
        append(self.path, entry)

    def update(self, done: int, values: dict) -> None:
        self.last = values
        self.write({"event": "update", "update": done, **values})
        now = time.monotonic()
        if now - self.printed < PROGRESS_S and done != self.planned:
            return
        self.printed = now
        each = (now - self.began) / (done - self.start)
        minutes, seconds = divmod(round(each * (self.planned - done)), 60)
        numbers = "  ".join(f"{k} {values[k]:.4g}" for k in SHOWN if k in values)
        log.info("update %d/%d  %s  %.2f s each  left %d:%02d", done, self.planned, numbers, each, minutes, seconds)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _update_of(line: str) -> float:
    """The update of a line; infinity for one that cannot be read, because a kill cut it off."""
    try:
        return json.loads(line)["update"]
    except (ValueError, TypeError, KeyError):
        return math.inf
