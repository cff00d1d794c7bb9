"""Pictures per second of the VAE, decoding and encoding, in several numbers and layouts, against float32.

    python -m pso.bench decode [--resolution 1024] [--batches 1 4] [--compile]

Random weights. Every variant's pictures are compared with those of the float32 VAE first: the largest difference in
grey levels stands in the row, and a variant that is further away than its numbers explain is not timed. A tiny VAE
(TAESD's architecture) is a row of its own, because it is another function: what it costs in pictures, and how many
labels of a reward it turns, only trained weights tell.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pso import bench_networks as nets
from pso.bench_rows import Variant, command, machine, measured_rate, rows, table
from pso.timing import Timer, clocks

INPUTS = 4  # batches taken in turns
SPREAD = 0.1  # std of the encoded pictures' noise around their large shapes
LEVELS = {torch.float32: 1, torch.float16: 4, torch.bfloat16: 16}  # grey levels of 255 that are allowed
APART = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}  # |difference| / |mean| of the posteriors


@dataclass(frozen=True)
class Way:
    """How the VAE runs."""

    name: str
    dtype: torch.dtype
    channels_last: bool = False
    compiled: bool = False
    tiny: bool = False


def ways(device: torch.device, compiled: bool) -> list[Way]:
    """The first is what others are compared with."""
    short = [torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    found = []
    for dtype in (torch.float32, *short):
        name = str(dtype).removeprefix("torch.")
        found += [Way(name, dtype), Way(f"{name}, channels_last", dtype, channels_last=True)]
    last = found[-1].dtype if device.type == "cuda" else torch.float32
    name = str(last).removeprefix("torch.")
    if compiled:
        found.append(Way(f"{name}, channels_last, compiled", last, channels_last=True, compiled=True))
    return [*found, Way(f"tiny VAE, {name}: another function", last, tiny=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    nets.add_arguments(parser)
    parser.add_argument("--resolution", type=int, help="px (default: 1024; of the tiny size 32)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--compile", action="store_true", help="also compiled (minutes)")


def run(args: argparse.Namespace) -> dict:
    device = nets.check_arguments(args, "batches")
    args.resolution = args.resolution or nets.default_side(args.size)
    asked = {key: getattr(args, key) for key in ("device", "size", "resolution", "batches", "rounds", "compile")}
    rate, before = measured_rate(args.out, device), clocks(device)
    compile_s: dict[str, float] = {}
    with nets.without_denormals(), torch.no_grad():
        found = {way: timed(args, device, way, rate, compile_s) for way in ("decode", "encode")}
    return {
        "command": command("decode", asked),
        **asked,
        "device": device.type,
        "note": args.note,
        **found,
        "compile_s": compile_s,
        "mfu_reason": rate.reason,
        "clocks": {"before": before, "after": clocks(device)},
    }


def timed(args: argparse.Namespace, device: torch.device, what: str, rate, compile_s: dict) -> list[dict]:
    """Rows of all batches; the plain variant of a batch is float32 of that batch."""
    found = []
    for batch in args.batches:
        plain, *others = variants(args, device, what, batch, compile_s)
        found += rows([plain, *others], args.rounds, device, rate)
    return found


# ---- what is decoded and encoded ----


def latents(size: str, side: int, batch: int, device: torch.device, seed: int) -> Tensor:
    """Of unit variance, as the UNet has them."""
    rng = torch.Generator(device).manual_seed(seed)
    px = nets.latent_px(size)
    return torch.randn((batch, 4, side // px, side // px), generator=rng, device=device)


def pixels(side: int, batch: int, device: torch.device, seed: int) -> Tensor:
    """In [-1, 1]: large shapes and noise."""
    rng = torch.Generator(device).manual_seed(seed)
    shapes = torch.randn((batch, 3, 4, 4), generator=rng, device=device)
    noise = SPREAD * torch.randn((batch, 3, side, side), generator=rng, device=device)
    return (nn.functional.interpolate(shapes, (side, side), mode="bilinear") + noise).clamp(-1, 1)


def decoded(vae: nn.Module, z: Tensor) -> Tensor:
    """Grey levels [B, 3, H, W] of latents of unit variance, as pso/policy.py rounds them."""
    sample = vae.decode(_laid_out(vae, z / vae.config.scaling_factor)).sample.float()
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round()


def encoded(vae: nn.Module, x: Tensor) -> Tensor:
    """The posteriors' means; of the tiny VAE its latents."""
    made = vae.encode(_laid_out(vae, x))
    return (made.latents if hasattr(made, "latents") else made.latent_dist.mean).float() * vae.config.scaling_factor


def _laid_out(vae: nn.Module, x: Tensor) -> Tensor:
    first = next(p for p in vae.parameters() if p.ndim == 4)
    last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    return x.to(vae.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


# ---- variants ----


def made(vae: nn.Module, way: Way, what: str) -> nn.Module:
    """A VAE of the same weights that runs that way."""
    model = nn.Module.to(copy.deepcopy(vae), way.dtype)
    if way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if way.compiled:
        part = "decoder" if what == "decode" else "encoder"
        setattr(model, part, torch.compile(getattr(model, part)))
    return model


def variants(args: argparse.Namespace, device: torch.device, what: str, batch: int, compile_s: dict) -> list[Variant]:
    run_one = decoded if what == "decode" else encoded
    inputs = [
        latents(args.size, args.resolution, batch, device, k)
        if what == "decode"
        else pixels(args.resolution, batch, device, k)
        for k in range(INPUTS)
    ]
    plain = nets.new_vae(args.size, device, torch.float32)
    expected, apart = run_one(plain, inputs[0]), levels if what == "decode" else relative
    limits = LEVELS if what == "decode" else APART
    found = []
    for way in ways(device, args.compile):
        source = nets.new_tiny_vae(args.size, device, torch.float32) if way.tiny else plain
        vae = made(source, way, what)
        name = f"{way.name}, batch {batch}"
        one = Variant(
            name, _call(run_one, vae, inputs), batch,
            batch * nets.vae_flops(args.size, args.resolution, what, way.tiny),
            _difference(run_one, vae, inputs[0], expected, apart), None if way.tiny else limits[way.dtype],
        )  # fmt: skip
        found.append(_clocked(one, device, f"{what}: {name}", compile_s) if way.compiled else one)
    return found


def _call(run_one: Callable, vae: nn.Module, inputs: list[Tensor]) -> Callable[[], Tensor]:
    turns = itertools.cycle(inputs)
    return lambda: run_one(vae, next(turns))


def _difference(run_one: Callable, vae: nn.Module, z: Tensor, expected: Tensor, apart: Callable) -> Callable[[], float]:
    return lambda: apart(run_one(vae, z), expected)


def _clocked(one: Variant, device: torch.device, name: str, compile_s: dict) -> Variant:
    """Its first call compiles; how long that takes is told apart."""

    def first() -> float:
        with Timer(device) as timer:
            found = one.difference()
        compile_s[name] = round(timer.seconds, 2)
        return found

    return replace(one, difference=first)


def levels(one: Tensor, other: Tensor) -> float:
    """The largest difference of two pictures."""
    return float((one - other).abs().max()) if one.shape == other.shape else float("nan")


def relative(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("nan")
    return float((one.double() - other.double()).norm() / other.double().norm())


def text(told: dict) -> str:
    parts = [
        "# The VAE",
        f"At {told['resolution']} px, random weights of the {told['size']} size. Medians of variants that take turns, "
        "ratios within a round to float32 in the same batch. The difference is from float32: of decoded pictures the "
        "largest in grey levels of 255, of encoded ones that of the means, relative.",
        "## Decode",
        table(told["decode"], told["mfu_reason"], "grey levels"),
        "## Encode",
        table(told["encode"], told["mfu_reason"], "difference"),
    ]
    if told["compile_s"]:
        parts.append("Compiled in: " + ", ".join(f"{name} {s} s" for name, s in told["compile_s"].items()) + ".")
    return "\n\n".join([*parts, machine(told)]) + "\n"
