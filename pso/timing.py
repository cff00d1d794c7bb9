"""Seconds of calls that take turns, and what is said of them: medians, spread, ratios within a round.

On a GPU by its own events, on a CPU by the clock. A round holds every variant once (ABAB), so what changes slowly on a
machine changes all of them; a ratio is taken within a round.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

WARMUPS = 3


class Timer:
    """`with Timer(device) as timer: ...` leaves `timer.seconds`. What was queued before is waited for first."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.seconds = 0.0

    def __enter__(self) -> "Timer":
        sync(self.device)
        if self.device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record(torch.cuda.current_stream(self.device))
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.events[1].record(torch.cuda.current_stream(self.device))
            sync(self.device)
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        else:
            self.seconds = time.perf_counter() - self.began


def sync(device: torch.device | str) -> None:
    """Wait for what a GPU was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def abab(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str,
    warmups: int = WARMUPS,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; they take turns, also while they warm up."""
    for _ in range(warmups):
        for call in variants.values():
            call()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            with Timer(device) as timer:
                call()
            found[name].append(timer.seconds)
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    """The median, and the median distance from it."""
    middle = median(seconds)
    return {"median": middle, "mad": median(abs(s - middle) for s in seconds), "n": len(seconds)}


def ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b: how many times as fast b is as a."""
    return median(one / other for one, other in zip(a, b, strict=True))


class Peak:
    """`gib`: most memory that tensors took on a GPU inside the block; `more_gib`: beyond what they took when it began.
    None on a CPU, where only a fresh process tells."""

    gib: float | None = None
    more_gib: float | None = None


@contextlib.contextmanager
def peak(device: torch.device | str) -> Iterator[Peak]:
    found, cuda = Peak(), torch.device(device).type == "cuda"
    if cuda:
        sync(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield found
    if cuda:
        sync(device)
        most = torch.cuda.max_memory_allocated(device)
        found.gib, found.more_gib = round(most / 2**30, 3), round((most - before) / 2**30, 3)


def clocks(device: torch.device | str) -> dict[str, float] | None:
    """A GPU's clock (MHz) and power (W) now, read and never set; None where nobody tells."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        clock, power = (float(value) for value in told.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return {"mhz": clock, "watts": power}
