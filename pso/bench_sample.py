"""Pictures per second of few-step sampling by pso/rollout.py, against diffusers' pipeline with one picture at a time.

    python -m pso.bench sample [--resolution 1024] [--batches 1 4 16] [--pictures]

A tuned SDXL of random weights, four steps; texts are encoded before. Both loops must give the same latents in float32
for the same noise before anything is timed, and every faster variant those of the plain one in the numbers that it
runs in. Then they take turns. With --pictures both decode as well.
"""

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from pso import bench_networks as nets
from pso.bench_rows import Variant, command, machine, measured_rate, rows, table
from pso.entries import Speed
from pso.mdp import Chain
from pso.policy import Conditioning, Policy
from pso.rollout import INITIAL, keyed_noise, keyed_seed, rollout
from pso.timing import clocks

TEXTS = 4  # different ones, taken in turns
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # |difference| / |latents|; random weights amplify rounding
DIFFUSERS = "diffusers' pipeline"


@dataclass(frozen=True)
class Fast:
    """A way to make sampling faster, by options of pso/speed.py."""

    name: str
    options: dict
    needs: str = ""  # an option of the command line, cpu, or cuda


SHORT_LORA = {"lora_compute": "base"}  # nothing else in float32
PLAIN = Fast("plain", {})
FAST = [
    Fast("channels_last", {"channels_last": True}),
    Fast("LoRA added to the weights", {"merge_lora": True}, "cpu"),  # not in 16 bits
    Fast("LoRA in 16 bits", SHORT_LORA, "cuda"),
    Fast("cuDNN's attention first", {"attention": "cudnn"}, "cuda"),
    Fast("compiled blocks", {"compile": True}, "compile"),
    Fast("all of these", {**SHORT_LORA, "channels_last": True, "attention": "cudnn", "compile": True}, "compile"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    nets.add_arguments(parser)
    parser.add_argument("--resolution", type=int, help="px (default: 1024; of the tiny size 32)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sampler", choices=nets.SAMPLERS, default="renoise")
    parser.add_argument("--pictures", action="store_true", help="decode the latents too")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks (minutes)")


def run(args: argparse.Namespace) -> dict:
    device = nets.check_arguments(args, "batches")
    args.resolution = args.resolution or nets.default_side(args.size)
    names = ("device", "size", "resolution", "batches", "sampler", "rounds", "pictures", "compile")
    asked = {key: getattr(args, key) for key in names}
    rate, before = measured_rate(args.out, device), clocks(device)
    with nets.without_denormals():
        found = rows(variants(args, device), args.rounds, device, rate)
    return {
        "command": command("sample", asked),
        **asked,
        "device": device.type,
        "dtype": str(nets.short(device)).removeprefix("torch."),
        "note": args.note,
        "rows": found,
        "mfu_reason": rate.reason,
        "clocks": {"before": before, "after": clocks(device)},
    }


# ---- the two loops ----


def key(number: int) -> tuple:
    return ("bench", 0, number)


def ours(policy: Policy, chain: Chain, texts: Conditioning, first: int, batch: int) -> Tensor:
    """Latents of the pictures first, first + 1, ..."""
    numbers = range(first, first + batch)
    index = torch.tensor([number % len(texts) for number in numbers])
    return rollout(policy, chain, texts.rows(index), [key(number) for number in numbers]).x0


def pipelines(policy: Policy, chain: Chain, texts: Conditioning, number: int, pictures: bool = False):
    """The same by diffusers' own loop. Its generator is seeded anew before each step, by that step's key."""
    generator, last = torch.Generator(), chain.num_steps
    noise = keyed_noise([key(number)], INITIAL, policy.latent_shape)

    def seed_for(n: int) -> None:
        generator.manual_seed(keyed_seed(*key(number), n))

    def on_step_end(_, step: int, time, given: dict) -> dict:
        seed_for(last - 1 - step)
        return given

    seed_for(last)
    row = texts.rows(torch.tensor([number % len(texts)]))
    renoised = {"timesteps": chain.times[1:].flip(0).tolist()} if chain.init(noise) is noise else {}
    return policy.pipeline(
        prompt_embeds=row.hidden,
        pooled_prompt_embeds=row.pooled,
        latents=noise.to(policy.device, policy.unet.dtype),
        height=policy.resolution,
        width=policy.resolution,
        num_inference_steps=last,
        guidance_scale=0.0,
        generator=generator,
        callback_on_step_end=on_step_end,
        output_type="pil" if pictures else "latent",
        **renoised,
    ).images


def apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|; NaN where either is not finite."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def loops_apart(args: argparse.Namespace, device: torch.device) -> float:
    """Between the two, both in float32 on networks of their own."""
    policy, chain = nets.new_policy(args.size, args.resolution, device, torch.float32, args.sampler)
    texts = nets.condition(policy, TEXTS)
    return max(apart(pipelines(policy, chain, texts, i), ours(policy, chain, texts, i, 1)) for i in range(2))


# ---- what is timed ----


def variants(args: argparse.Namespace, device: torch.device, fast: list[Fast] = FAST) -> list[Variant]:
    dtype, numbers = nets.short(device), itertools.count()
    work = len(nets.TIMES) * nets.call_flops(args.size, args.resolution)
    work += nets.vae_flops(args.size, args.resolution, "decode") if args.pictures else 0

    def policy_of(options: dict) -> tuple[Policy, Chain]:
        speed = Speed(**options)
        return nets.new_policy(args.size, args.resolution, device, dtype, args.sampler, speed=speed)

    policy, chain = policy_of(PLAIN.options)
    texts = nets.condition(policy, TEXTS)
    expected = ours(policy, chain, texts, 0, 1)
    peer, _ = policy_of(SHORT_LORA)  # as diffusers itself loads a LoRA: in the pipeline's numbers

    def loop() -> None:
        pipelines(peer, chain, texts, next(numbers), args.pictures)

    def loops() -> float:
        loop()  # in the numbers that are timed
        return loops_apart(args, device)

    found = [Variant(f"{DIFFUSERS}, batch 1", loop, 1, work, loops, LIMITS[torch.float32])]
    for one in [PLAIN, *fast]:
        if one.needs and not (getattr(args, one.needs, False) or one.needs == device.type):
            continue
        changed = policy if one is PLAIN else policy_of(one.options)[0]
        for batch in args.batches:
            call, difference = _calls(changed, chain, texts, batch, args.pictures, numbers, expected)
            found.append(Variant(f"{one.name}, batch {batch}", call, batch, batch * work, difference, LIMITS[dtype]))
    return found


def _calls(policy, chain, texts, batch: int, pictures: bool, numbers, expected: Tensor):
    """The timed call, and how far the first picture is from that of the plain policy by itself."""

    def call() -> None:
        latents = ours(policy, chain, texts, batch * next(numbers), batch)
        if pictures:
            policy.decode(latents)

    return call, lambda: apart(ours(policy, chain, texts, 0, batch)[:1], expected)


def text(told: dict) -> str:
    what = "pictures, decoded" if told["pictures"] else "latents, not decoded"
    parts = [
        "# Few-step sampling",
        f"Four steps at {told['resolution']} px in {told['dtype']} ({what}), random weights of the {told['size']} "
        f"size with a LoRA of rank {nets.RANK}; texts encoded before. Medians of variants that take turns, ratios "
        "within a round and by picture. The difference is that of the latents from the plain variant's; of diffusers' "
        "own loop it is taken in float32.",
        table(told["rows"], told["mfu_reason"]),
        machine(told),
    ]
    return "\n\n".join(parts) + "\n"
