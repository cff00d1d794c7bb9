"""One thread beside the main one: what is made ahead of its use, and what is finished behind. Torch-free.

Order is that of the calls, errors come out in the main thread, and nothing is left running at the end.
"""

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Item, Made]):
    """make(item), the next one begun while the caller works on this one: at most two are there at once."""

    def __init__(self, make: Callable[[Item], Made]):
        self.make, self.pool = make, ThreadPoolExecutor(1)
        self.begun: tuple[Item, Future[Made]] | None = None

    def take(self, item: Item, following: Item | None = None) -> Made:
        """make(item), which is made now unless it was announced; `following` is begun. An error comes out where its
        item is taken, and one that is taken again is made again."""
        begun, self.begun = self.begun, None
        if begun is not None and begun[0] != item:
            wait([begun[1]])  # never two at a time
            begun = None
        found = self.make(item) if begun is None else begun[1].result()
        if following is not None:
            self.begun = following, self.pool.submit(self.make, following)
        return found

    def __enter__(self) -> "Ahead[Item, Made]":
        return self

    def __exit__(self, *_) -> None:
        self.begun = None
        self.pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that are made in order behind the caller, of which at most `bound` wait. After one that failed no other is
    made; its error comes out at a later call or at the end."""

    def __init__(self, bound: int = 2):
        self.bound, self.pool, self.last = bound, ThreadPoolExecutor(1), None
        self.waiting: deque[Future] = deque()

    def __call__(self, action: Callable, *arguments) -> Future:
        while len(self.waiting) >= self.bound:
            self.waiting.popleft().result()
        self.last = self.pool.submit(_after, self.last, action, arguments)
        self.waiting.append(self.last)
        return self.last

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)


def _after(before: Future | None, action: Callable, arguments: tuple):
    if before is not None:
        before.result()  # done, or its error
    return action(*arguments)
