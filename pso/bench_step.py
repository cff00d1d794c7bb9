"""Speed of one training step, ours or a peer's, on random weights.

    python -m pso.bench step --impl ours --method online --resolution 512
    python -m pso.bench step --impl released-pso --method online --resolution 512 --as-released

A row: median, spread, pictures at one time per second, and on a GPU what share of the measured matrix product that is
(results/benchmarks/ceiling.json; without it no share is told).
Ours runs its networks as the scales do (`speed` in scales.yaml: on a GPU the scale of published weights); --speed tries
others.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from pso import flops, timing
from pso.bench_model import RESOLUTION, SIZES, published_speed
from pso.bench_rows import measured_rate
from pso.bench_updates import TOLERANCE, Form, Pair, Size, difference
from pso.config import check
from pso.entries import Speed
from pso.paths import RESULTS
from pso.provenance import UserError

IMPLEMENTATIONS = ("ours", "released-pso", "diffusers-dpo", "spo", "mapo")
EXAMPLE = """'{"compile": true}'"""
FOLDER = RESULTS / "benchmarks"
# FLOPs of the small model, as tests/test_counts.py counts them; again: what checkpoints form once more
SMALL = {
    "theta": 492_316_672 + 462_756_864,
    "again": 343_652_352,
    "pre": 484_364_288,
    "picture": 280_395_776,
    "caption": 10_607_104,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="ours")
    parser.add_argument("--method", choices=("offline", "online"), default="online", help="of ours and released-pso")
    parser.add_argument("--resolution", type=int, choices=SIZES, default=RESOLUTION, help="px; 128 is a small model")
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--timesteps", type=int, default=3, help="trained steps of a pair")
    parser.add_argument("--micro-batch", default="auto", help="rows of a call of ours, pairs of a peer's; or auto")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--as-released", action="store_true", help="a peer's own micro-batch and checkpointing")
    form.add_argument("--tuned", action="store_true", help="a peer's best micro-batch, no checkpointing (default)")
    parser.add_argument("--rounds", type=int, default=5)
    add_speed(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speed", default="{}", help=f"of ours, what differs from the scale's, as JSON: {EXAMPLE}")


def asked_speed(args: argparse.Namespace) -> Speed:
    """How ours runs its networks."""
    try:
        asked = json.loads(args.speed)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise UserError(f"--speed is {args.speed!r}; expected settings as JSON, such as {EXAMPLE}.")
    return check(Speed, published_speed(torch.device(args.device)).model_dump() | asked, "--speed")


def asked_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and type of the frozen weights."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {args.device}, but torch sees no GPU; give --device cpu --resolution 128.")
    if device.type == "cpu" and args.resolution != RESOLUTION:
        raise UserError(
            f"--resolution is {args.resolution} with --device cpu; expected {RESOLUTION}, the size for CPUs."
        )
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # else a small number may cost a hundred times a usual one
        return device, torch.float32
    return device, torch.bfloat16


def size_of(args: argparse.Namespace, rows: int | None = None) -> Size:
    for name in ("pairs", "timesteps", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected a number of at least 1.")
    return Size(args.resolution, args.pairs, args.timesteps, rows)


def ceiling(device: torch.device, folder: Path = FOLDER) -> float | None:
    """FLOP/s of the matrix product measured on this GPU; None where nobody measured."""
    return measured_rate(folder, device).flops if device.type == "cuda" else None


def of_calls(resolution: int, rank: int, gradient_checkpointing: bool) -> dict[str, int]:
    """FLOPs of theta on a row, forward and backward, of pre, of a picture's and of a caption's encoding."""
    if resolution == RESOLUTION:
        again = SMALL["again"] if gradient_checkpointing else 0
        return SMALL | {"theta": SMALL["theta"] + again}
    forward, backward = flops.lora(resolution, rank, gradient_checkpointing)
    return {
        "theta": forward.total + backward.total,
        "pre": flops.unet(resolution).total,
        "picture": flops.encode(resolution).total,
        "caption": flops.prompt().total,
    }


def needed(pair: Pair) -> int:
    """FLOPs that an update cannot do without: of rows through theta and pre."""
    of = of_calls(pair.size.resolution, pair.size.rank, gradient_checkpointing=False)
    return pair.rows * (of["theta"] + of["pre"] * pair.module.NEEDS_PRE)


def done(pair: Pair, form: Form | None) -> int:
    """FLOPs of an update of a peer in a form, with what it forms again and encodes; of ours with none."""
    if form is None:
        return needed(pair)
    of = of_calls(pair.size.resolution, pair.size.rank, form.gradient_checkpointing)
    found = pair.rows * (of["theta"] + of["pre"] * pair.module.NEEDS_PRE)
    if pair.compared.from_pictures:
        captions = pair.size.pairs if pair.compared.peer.encodes_captions else 0
        found += 2 * pair.size.pairs * of["picture"] + captions * of["caption"]
    return found


def row(pair: Pair, seconds: list[float], measured: float | None, form: Form | None = None) -> dict:
    """What is told of a variant's seconds. MFU is of the needed work alone; predicted is all that is done at the
    ceiling."""
    told = timing.summary(seconds)
    rate = needed(pair) / told["median"]
    return {
        "median_s": round(told["median"], 5),
        "mad_s": round(told["mad"], 5),
        "n": told["n"],
        "rows_per_s": round(pair.rows / told["median"], 2),
        "tflop_per_s": round(rate / 1e12, 4),
        "tflop": round(done(pair, form) / 1e12, 4),
        "mfu": None if measured is None else round(rate / measured, 4),
        "predicted_s": None if measured is None else round(done(pair, form) / measured, 5),
    }


def timed_once(pair: Pair):
    """Seconds of one call, after the one that came before it."""

    def seconds(call) -> float:
        with timing.Timer(pair.device) as timer:
            call()
        return timer.seconds

    return seconds


def form_of(args: argparse.Namespace, pair: Pair) -> Form:
    if args.as_released:
        return pair.released()
    if args.micro_batch == "auto":
        return pair.tuned(timed_once(pair))
    return Form(whole_number(args.micro_batch), gradient_checkpointing=False)


def whole_number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--micro-batch is {text!r}; expected auto or a number of at least 1.")
    return int(text)


def comparison(args: argparse.Namespace) -> str:
    return args.method if args.impl in ("ours", "released-pso") else args.impl


def run(args: argparse.Namespace) -> dict:
    device, dtype = asked_device(args)
    name, ours = comparison(args), args.impl == "ours"
    asked, speed = None if args.micro_batch == "auto" else whole_number(args.micro_batch), asked_speed(args)
    apart = difference(name, ancestral=args.resolution == 512)
    figures = {"implementation": args.impl, "method": name, "difference": apart}
    if not apart <= TOLERANCE:
        return figures | {"invalid": True, "command": command(args)}
    pair = Pair(name, size_of(args, asked if ours else None), device, dtype, speed)
    form = None if ours else form_of(args, pair)
    call = pair.our_update if ours else (lambda: pair.their_update(form))
    with timing.peak(device) as most:
        seconds = timing.abab({args.impl: call}, args.rounds, device)[args.impl]
    told = (
        {"speed": speed.model_dump()}
        if form is None
        else {"micro_batch_pairs": form.pairs, "checkpointing": form.gradient_checkpointing}
    )
    return {
        **figures,
        **told,
        "command": command(args),
        "peak_gpu_gib": most.gib,
        "clocks": timing.clocks(device),
        "seconds": [round(s, 5) for s in seconds],
        **row(pair, seconds, ceiling(device), form),
    }


def command(args: argparse.Namespace) -> str:
    asked = (
        f"--impl {args.impl} --method {args.method} --resolution {args.resolution} --pairs {args.pairs} "
        f"--timesteps {args.timesteps} --micro-batch {args.micro_batch} --rounds {args.rounds} --device {args.device}"
    )
    more = f" --speed '{args.speed}'" if args.speed != "{}" else ""
    more += " --as-released" if args.as_released else " --tuned" if args.tuned else ""
    return f"python -m pso.bench step {asked}{more}"


def text(told: dict) -> str:
    head = f"# One training step: {told['implementation']}, {told['method']}"
    checked = f"Its gradient in float64 is {told['difference']:.1e} from the other's, relative."
    ran = f"`{told['command']}`; torch {told['versions']['torch']}, diffusers {told['versions']['diffusers']}."
    if told.get("invalid"):
        return "\n\n".join([head, f"Invalid, not timed. {checked}", ran]) + "\n"
    shown = ("median_s", "mad_s", "n", "rows_per_s", "tflop", "tflop_per_s", "mfu", "predicted_s", "peak_gpu_gib")
    lines = [(name, str(told[name])) for name in shown if told[name] is not None]
    table = pd.DataFrame(lines, columns=["figure", "value"])
    return "\n\n".join([head, checked, table.to_markdown(index=False, disable_numparse=True), ran]) + "\n"
