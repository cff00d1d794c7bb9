"""Our training step against each peer's, as released and tuned, in turns in one process.

    python -m pso.bench peers --resolution 512

For each pair of the same function (gradients compared in float64 first; where they differ, nothing is timed): ours,
ours once more for the noise, the peer as released, the peer tuned, and again. Ratios within a round, their medians. On
a GPU the networks have SDXL's size and random weights, drawn there; their shares of the measured matrix product are
told where that was measured before (ceiling.json).
"""

import argparse
import gc
import logging
import os

import pandas as pd
import torch

from pso import timing
from pso.bench_model import RESOLUTION, SIZES
from pso.bench_step import add_speed, asked_device, asked_speed, ceiling, row, size_of, timed_once
from pso.bench_updates import COMPARISONS, TOLERANCE, Pair, Size, difference
from pso.counting import counted
from pso.entries import Speed

log = logging.getLogger("bench")
VARIANTS = ("ours", "ours again", "as released", "tuned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, choices=SIZES, default=RESOLUTION, help="px; 128 is a small model")
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--timesteps", type=int, default=3, help="trained steps of a pair")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_speed(parser)


def compared(
    name: str, size: Size, device: torch.device, dtype: torch.dtype, rounds: int, speed: Speed | None = None
) -> dict:
    """The rows of one comparison; without any where the gradients differ."""
    apart = difference(name, ancestral=size.resolution == 512)
    found = {"difference": apart, "peer": COMPARISONS[name].peer.__name__, "entry": COMPARISONS[name].entry}
    if not apart <= TOLERANCE:
        return found | {"invalid": True}
    pair = Pair(name, size, device, dtype, speed)
    with timing.Timer(device) as first:  # compiles, where the scale's `speed` says so
        pair.our_update()
    found |= {"speed": pair.policy.speed.model_dump(), "first_update_s": round(first.seconds, 2)}
    released, tuned = pair.released(), pair.tuned(timed_once(pair))
    calls = {
        "ours": pair.our_update,
        "ours again": pair.our_update,
        "as released": lambda: pair.their_update(released),
        "tuned": lambda: pair.their_update(tuned),
    }
    seconds = timing.abab(calls, rounds, device)
    forms, measured = {"as released": released, "tuned": tuned}, ceiling(device)
    found["rows"] = {variant: row(pair, taken, measured, forms.get(variant)) for variant, taken in seconds.items()}
    found["seconds"] = {variant: [round(s, 5) for s in taken] for variant, taken in seconds.items()}
    found["ratio"] = {variant: round(timing.ratio(seconds[variant], seconds["ours"]), 3) for variant in VARIANTS[1:]}
    found["micro_batch_pairs"] = {"as released": released.pairs, "tuned": tuned.pairs}
    return found | {"counts": counts(pair, calls, device), "peak_gpu_gib": memory(calls, device)}


def counts(pair: Pair, calls: dict, device: torch.device) -> dict:
    """What one update does, in numbers that do not depend on the machine."""
    found = {}
    for variant in ("ours", "as released", "tuned"):
        with counted(pair.pipeline if variant == "ours" else pair.peer.pipeline) as counted_one:
            calls[variant]()
        found[variant] = vars(counted_one) | {"unet_calls": counted_one.unet_calls}
    return found


def memory(calls: dict, device: torch.device) -> dict | None:
    """Most memory of a GPU during an update, both models included."""
    if device.type != "cuda":
        return None
    found = {}
    for variant in ("ours", "as released", "tuned"):
        with timing.peak(device) as most:
            calls[variant]()
        found[variant] = most.gib
    return found


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> dict:
    device, dtype = asked_device(args)
    size, load_before, clocks = size_of(args), os.getloadavg()[0], timing.clocks(device)
    found = {}
    for name in args.only:
        found[name] = compared(name, size, device, dtype, args.rounds, asked_speed(args))
        log.info("%s: %s", name, found[name].get("ratio", "invalid"))
        free(device)
    asked = (
        f"--resolution {args.resolution} --pairs {args.pairs} --timesteps {args.timesteps} --rounds {args.rounds} "
        f"--only {' '.join(args.only)} --device {args.device}"
    )
    return {
        "command": f"python -m pso.bench peers {asked}" + (f" --speed '{args.speed}'" if args.speed != "{}" else ""),
        "resolution": args.resolution,
        "pairs": args.pairs,
        "steps": args.timesteps,
        "rounds": args.rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "comparisons": found,
        "clocks_before_and_after": [clocks, timing.clocks(device)],
        "load_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


COLUMNS = {
    "median_s": "seconds of an update",
    "mad_s": "spread",
    "rows_per_s": "pictures at one time/s",
    "tflop": "TFLOP done",
    "mfu": "MFU",
    "predicted_s": "predicted seconds at the ceiling",
}


def table(comparisons: dict) -> str:
    """A line for each variant of each comparison."""
    lines = []
    for name, found in comparisons.items():
        if found.get("invalid"):
            lines.append({"comparison": name, "variant": f"invalid: gradients differ by {found['difference']:.1e}"})
            continue
        for variant, one in found["rows"].items():
            ratio = found["ratio"].get(variant)
            own = {"comparison": name, "variant": variant, "ours is so many times as fast": ratio or ""}
            lines.append(own | {said: one[key] for key, said in COLUMNS.items() if one[key] is not None})
    return pd.DataFrame(lines).fillna("").to_markdown(index=False, disable_numparse=True)


COUNTED = {
    "unet_calls": "UNet calls",
    "flops": "GFLOP",
    "pictures_encoded": "VAE encodes",
    "prompts_encoded": "captions encoded",
    "host_syncs": "host syncs",
    "saved_bytes": "MB kept for backward",
    "operations": "ATen operations",
}
UNITS = {"flops": 1e9, "saved_bytes": 1e6}


def counts_table(comparisons: dict) -> str:
    lines = []
    for name, found in comparisons.items():
        for variant, counted_one in found.get("counts", {}).items():
            numbers = {
                said: round(counted_one[key] / UNITS[key], 1) if key in UNITS else counted_one[key]
                for key, said in COUNTED.items()
            }
            lines.append({"comparison": name, "variant": variant} | numbers)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def text(told: dict) -> str:
    gpus = ", ".join(told["hardware"].get("gpus", [])) or f"{told['hardware']['threads']} threads of a CPU"
    parts = [
        "# Training steps of ours and of others",
        f"Updates of {told['pairs']} pairs and {told['steps']} trained steps at {told['resolution']} px, {gpus}, "
        f"{told['dtype']}, random weights. Each comparison is of the same function: gradients agree to {TOLERANCE:.0e} "
        "in float64. `ours again` is the noise. As released: its own micro-batch, gradient checkpointing and VAE; "
        "tuned: the same code without checkpointing at its best micro-batch. Variants take turns; ratios are medians "
        "over rounds.",
        table(told["comparisons"]),
        "What one update does, counted:",
        counts_table(told["comparisons"]),
        "Load average before and after: " + " and ".join(map(str, told["load_before_and_after"])) + ".",
        f"`{told['command']}`; torch {told['versions']['torch']}, diffusers {told['versions']['diffusers']}, "
        f"peft {told['versions']['peft']}.",
    ]
    return "\n\n".join(parts) + "\n"
