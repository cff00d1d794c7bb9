"""Variants of one piece of work: each is compared with the plain one first, then they take turns, then there is a row.

A variant that gives something else is a row without a time, and so is one that this device refuses. MFU is the share
of the matrix product's rate that `python -m pso.bench ceiling` measured on the same device; without it there is none.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from pso.provenance import hardware
from pso.timing import abab, peak, ratio, summary

SAME_DEVICE = ("machine", "cpus", "threads", "gpus")  # of pso.provenance.hardware
REASON = 200  # letters of what torch says


@dataclass(frozen=True)
class Variant:
    """`call` makes `pictures` of them by `flops` FLOPs; `difference` says how far it is from the plain variant, of
    which at most `limit` is allowed (None: it is another function, and is said to be)."""

    name: str
    call: Callable[[], object]
    pictures: int
    flops: int
    difference: Callable[[], float]
    limit: float | None


# ---- the device's rate ----


@dataclass(frozen=True)
class Rate:
    """FLOP/s of a matrix product, or why there is none."""

    flops: float | None
    reason: str = ""


def measured_rate(folder: Path, device: torch.device) -> Rate:
    """From ceiling.json in the results' folder."""
    path = folder / "ceiling.json"
    again = "run `python -m pso.bench ceiling` first"
    try:
        told = json.loads(path.read_text())
        found = told["matmul"]["tflops"] * 1e12
        kind, there = told["device"], {key: told["hardware"].get(key) for key in SAME_DEVICE}
    except FileNotFoundError:
        return Rate(None, f"no ceiling; {again}")
    except (OSError, ValueError, KeyError, TypeError):
        return Rate(None, f"the ceiling cannot be read; {again}")
    here = hardware()
    if kind != device.type or there != {key: here.get(key) for key in SAME_DEVICE}:
        return Rate(None, f"the ceiling is another device's; {again}")
    return Rate(found)


# ---- rows ----


def rows(variants: list[Variant], rounds: int, device: torch.device, rate: Rate) -> list[dict]:
    """One for each variant, in their order. The first is the plain one; ratios are to it, by picture."""
    found = [_checked(variant) for variant in variants]
    timed = [variant for variant, row in zip(variants, found, strict=True) if "invalid" not in row]
    seconds = abab({variant.name: variant.call for variant in timed}, rounds, device)
    first = timed[0] if timed else None
    for variant, row in zip(variants, found, strict=True):
        if variant.name in seconds:
            row |= _figures(variant, seconds, first, rate)
            with peak(device) as most:
                variant.call()
            row |= {"peak_gib": most.gib, "peak_more_gib": most.more_gib}
    return found


def _checked(variant: Variant) -> dict:
    """What is known before any clock runs."""
    row = {"variant": variant.name, "pictures": variant.pictures, "flops": variant.flops}
    try:
        row["difference"] = variant.difference()
    except torch.OutOfMemoryError:
        return row | {"invalid": "memory ran out"}
    except (RuntimeError, ValueError) as error:  # refusals of a device, a type or a kernel
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return row | {"invalid": f"refused: {reason[:REASON]}"}
    row["limit"] = variant.limit
    if variant.limit is not None and not row["difference"] <= variant.limit:
        row["invalid"] = f"differs by {row['difference']:.3g}, more than {variant.limit:.3g}"
        if not math.isfinite(row["difference"]):
            row["difference"] = None  # JSON has no word for it
    return row


def _figures(variant: Variant, seconds: dict[str, list[float]], first: Variant, rate: Rate) -> dict:
    own = seconds[variant.name]
    told = summary(own)
    faster = ratio(seconds[first.name], own) * variant.pictures / first.pictures
    return {
        "seconds": [round(s, 6) for s in own],
        "median_s": round(told["median"], 6),
        "mad_s": round(told["mad"], 6),
        "rounds": told["n"],
        "pictures_per_s": round(variant.pictures / told["median"], 3),
        "ratio": round(faster, 3),
        "ratio_to": first.name,
        "mfu": None if rate.flops is None else round(variant.flops / told["median"] / rate.flops, 4),
    }


def table(found: list[dict], rate_reason: str, difference: str = "difference") -> str:
    """`difference`: its heading, with the unit."""
    shown = []
    for row in found:
        line = {"variant": row["variant"], difference: _number(row.get("difference"))}
        if "invalid" in row:
            shown.append(line | {"time": f"invalid: {row['invalid']}"})
            continue
        line["time"] = f"{1000 * row['median_s']:.4g} ± {1000 * row['mad_s']:.2g} ms"
        line |= {"pictures/s": f"{row['pictures_per_s']:.4g}", "ratio": f"{row['ratio']:.3g}"}
        line["MFU"] = rate_reason if row["mfu"] is None else f"{row['mfu']:.1%}"
        line["GiB beyond weights"] = _number(row["peak_more_gib"])
        shown.append(line)
    frame = pd.DataFrame(shown).fillna("–")
    return frame.to_markdown(index=False, disable_numparse=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def machine(told: dict) -> str:
    """The line below a table."""
    here = told["hardware"]
    cpu = f"{here['threads']} thread{'s' * (here['threads'] > 1)} of {here['cpus']} CPUs"
    where = ", ".join(here["gpus"]) if told["device"] == "cuda" else cpu
    note = f" {told['note']}" if told["note"] else ""
    versions = ", ".join(f"{name} {told['versions'][name]}" for name in ("torch", "diffusers"))
    return f"On {where}.{note}\n\n`{told['command']}`; {versions}."


def command(benchmark: str, asked: dict) -> str:
    """As it can be given again."""
    words = [f"python -m pso.bench {benchmark}"]
    for key, value in asked.items():
        if value is True:
            words.append(f"--{key}")
        elif value not in (None, False, ""):
            words.append(f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)
