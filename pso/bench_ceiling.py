"""What this device does at best: a matrix product, a copy, and attention at SDXL's shapes by each of torch's kernels.

    python -m pso.bench ceiling [--device cuda] [--size full]

All on random numbers: zeros cost less power, so a GPU's clock would be higher than any network's. A call works
through several different inputs. Attention is of heads of 64: 4096 and 1024 tokens with themselves, and with the 77
of a text, at 1024 px; on a CPU a sixteenth of them. Each kernel is compared with float32 first.
"""

import argparse
import warnings
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from pso.bench_networks import add_arguments as add_common
from pso.bench_networks import check_arguments, short
from pso.bench_rows import REASON, command, machine
from pso.timing import abab, clocks, summary

INPUTS = 4
MATRIX = {"cuda": 8192, "cpu": 2048, "tiny": 256}
COPIED = {"cuda": 2**32, "cpu": 2**28, "tiny": 2**22}  # bytes
REPEATS = {"cuda": 20, "cpu": 1, "tiny": 1}  # of the product and the copy in one timed call
HEAD = 64
SHAPES = {  # heads, queries, keys
    "self 4096": (10, 4096, 4096),
    "self 1024": (20, 1024, 1024),
    "cross 4096": (10, 4096, 77),
    "cross 1024": (20, 1024, 77),
}
SMALLER = 16  # on a CPU there are as many fewer queries, and keys of a picture
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
EMPTY = ("not used because", "runtime disabled")  # warnings that say nothing of the kernel asked for
FORWARD, BACKWARD = 2, 5  # products; the backward pass of fused kernels forms the scores once more
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number, against float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(size="full")
    parser.add_argument("--batch", type=int, default=4, help="pictures in a call of attention")


def run(args: argparse.Namespace) -> dict:
    device = check_arguments(args, "batch")
    scale = "tiny" if args.size == "tiny" else device.type
    asked = {key: getattr(args, key) for key in ("device", "size", "rounds", "batch")}
    before = clocks(device)
    return {
        "command": command("ceiling", asked),
        "device": device.type,
        "size": args.size,
        "note": args.note,
        "matmul": matmul(device, scale, args.rounds),
        "copy": copy(device, scale, args.rounds),
        "attention": attention(device, scale, args.rounds, args.batch),
        "clocks": {"before": before, "after": clocks(device)},
    }


def drawn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=rng, device=device).to(dtype)


def _told(seconds: list[float]) -> dict:
    found = summary(seconds)
    return {"median_s": found["median"], "mad_s": found["mad"], "rounds": found["n"]}


def matmul(device: torch.device, scale: str, rounds: int) -> dict:
    side, repeats, dtype = MATRIX[scale], REPEATS[scale], short(device)
    pairs = [[drawn(device, dtype, side, side, seed=2 * k + i) for i in (0, 1)] for k in range(INPUTS)]
    out = torch.full((side, side), torch.nan, device=device, dtype=dtype)

    def call() -> None:
        for k in range(repeats * INPUTS):
            torch.mm(*pairs[k % INPUTS], out=out)

    told = _told(abab({"matmul": call}, rounds, device)["matmul"])
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("a matrix product is not finite")
    work = 2 * side**3 * repeats * INPUTS
    return {"side": side, "dtype": str(dtype).removeprefix("torch."), **told, "tflops": work / told["median_s"] / 1e12}


def copy(device: torch.device, scale: str, rounds: int) -> dict:
    """Bytes read and written."""
    count, repeats = COPIED[scale] // 4, REPEATS[scale]
    here = drawn(device, torch.float32, count)
    there = torch.full_like(here, torch.nan)

    def call() -> None:
        for _ in range(repeats):
            there.copy_(here)

    told = _told(abab({"copy": call}, rounds, device)["copy"])
    if not torch.equal(here, there):
        raise RuntimeError("a copy differs from its source")
    return {"bytes": 4 * count, **told, "tb_per_s": 2 * 4 * count * repeats / told["median_s"] / 1e12}


# ---- attention ----


def attention(device: torch.device, scale: str, rounds: int, batch: int) -> list[dict]:
    """A row for each shape and kernel, with times forward alone and with the backward pass."""
    found = []
    for name, (heads, queries, keys) in SHAPES.items():
        if device.type == "cpu":
            queries, keys = queries // SMALLER, keys // SMALLER if keys > 77 else keys
        inputs = [_inputs(device, batch, heads, queries, keys, 3 * k) for k in range(INPUTS)]
        rows = {backend: _checked(inputs[0], kind) for backend, kind in BACKENDS.items()}
        calls = {
            (backend, way): _call(inputs, BACKENDS[backend], way == "both")
            for backend, row in rows.items()
            if "invalid" not in row
            for way in ("forward", "both")
        }
        seconds = abab(calls, rounds, device)
        products = INPUTS * 2 * batch * heads * queries * keys * HEAD
        for (backend, way), own in seconds.items():
            told, count = _told(own), FORWARD if way == "forward" else FORWARD + BACKWARD
            rows[backend][way] = {**told, "tflops": count * products / told["median_s"] / 1e12}
        shape = {"shape": name, "heads": heads, "queries": queries, "keys": keys}
        found += [{**shape, "backend": backend, **row} for backend, row in rows.items()]
    return found


def _inputs(device: torch.device, batch: int, heads: int, queries: int, keys: int, seed: int) -> list[Tensor]:
    lengths = (queries, keys, keys)
    return [
        drawn(device, short(device), batch, heads, length, HEAD, seed=seed + i).requires_grad_()
        for i, length in enumerate(lengths)
    ]


def _call(inputs: list[list[Tensor]], kind: SDPBackend, backward: bool) -> Callable[[], None]:
    incoming = torch.randn_like(inputs[0][0])

    def call() -> None:
        with sdpa_kernel(kind), torch.set_grad_enabled(backward):
            for one in inputs:
                out = attend(*one)
                if backward:
                    torch.autograd.grad(out, one, incoming)

    return call


def _checked(inputs: list[Tensor], kind: SDPBackend) -> dict:
    """How far a kernel is from float32 by its formula, as a share of the largest number; or why it is not timed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.no_grad(), sdpa_kernel(kind):
                out = attend(*inputs)
            with sdpa_kernel(kind):  # some refuse the backward pass alone
                torch.autograd.grad(attend(*inputs).sum(), inputs)
        except RuntimeError as error:
            why = [str(warning.message).partition(" (Triggered")[0].strip() for warning in said]
            why = [reason for reason in why if not any(words in reason for words in EMPTY)]
            return {"invalid": f"refused: {(' '.join(why) or str(error).splitlines()[0])[:REASON]}"}
    with torch.no_grad():
        q, k, v = (x.float() for x in inputs)
        expected = torch.softmax(q @ k.transpose(-2, -1) / HEAD**0.5, -1) @ v
        difference = float((out.float() - expected).abs().max() / expected.abs().max())
    limit = TOLERANCE[out.dtype]
    if not difference <= limit:
        return {"invalid": f"differs by {difference:.3g} of the largest number, more than {limit:.3g}"}
    return {"difference": difference}


def text(told: dict) -> str:
    product, copied = told["matmul"], told["copy"]
    shown = []
    for row in told["attention"]:
        size = f"{row['heads']} heads, {row['queries']} x {row['keys']}"
        line = {"attention": f"{row['shape'].split()[0]}, {size}", "kernel": row["backend"]}
        if "invalid" in row:
            line["forward"] = row["invalid"]
        else:
            names = {"forward": "forward", "both": "with the backward pass"}
            line |= {
                shown_as: f"{1000 * row[way]['median_s'] / INPUTS:.3g} ms, {row[way]['tflops']:.3g} TFLOP/s"
                for way, shown_as in names.items()
            }
        shown.append(line)
    rates = (
        f"A matrix product of {product['side']} x {product['side']} in {product['dtype']}: **{product['tflops']:.4g} "
        f"TFLOP/s**. A copy of {copied['bytes'] / 2**20:.0f} MiB: **{copied['tb_per_s']:.3g} TB/s** read and written."
    )
    parts = [
        "# Ceilings of a device",
        "On random numbers, never zeros; medians over rounds. MFU in the other benchmarks is a share of the first.",
        rates,
        pd.DataFrame(shown).fillna("–").to_markdown(index=False, disable_numparse=True),
        machine(told),
    ]
    return "\n\n".join(parts) + "\n"
