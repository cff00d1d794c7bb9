"""The next batch of a source, made in a thread while the update before it runs.

Only of sources that say that a batch is a function of its update's number alone (`pure`), so that it is the same to the
bit whenever it is made: all their noise is drawn by key, none of it from a shared stream.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pso.background import Ahead
from pso.evidence import Batch


class Prefetched:
    """A source, asked for one update after the other up to the last of `updates`. What else it has is the source's."""

    def __init__(self, source: Any, updates: int):
        self.source, self.updates = source, updates
        self.ahead: Ahead[int, Batch] = Ahead(source.batch)

    def batch(self, update: int) -> Batch:
        return self.ahead.take(update, update + 1 if update + 1 < self.updates else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def can_be(source: Any) -> bool:
    """Whether its class says so itself: one that is derived from it may do something else."""
    return vars(type(source)).get("pure") is True and not hasattr(source, "state")


@contextlib.contextmanager
def prefetched(source: Any, device: torch.device, updates: int) -> Iterator[Any]:
    """The source, prefetched where the device has no cores of its own to lose: not on a CPU."""
    if device.type == "cpu" or not can_be(source):
        yield source
        return
    found = Prefetched(source, updates)
    with found.ahead:
        yield found
