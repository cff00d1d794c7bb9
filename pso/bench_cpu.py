"""The comparison for two CPU cores: updates of ours and of peers, a round's pictures, and memory of fresh processes.

    python -m pso.bench cpu

On a small model of SDXL's kind with random weights. Updates as `python -m pso.bench peers` has them; pictures: captions
encoded, sampled, decoded and scored in batches against diffusers' pipeline and one picture at a time. Launching an
operation costs other shares of a step on a CPU than on a GPU: nothing here tells a GPU's ratios.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from pso import timing
from pso.bench_model import RESOLUTION, policy_of, random_pipeline
from pso.bench_pairs import peak_gib
from pso.bench_peers import compared, counts_table, free, table
from pso.bench_updates import COMPARISONS, Pair, Size, captions
from pso.config import import_module
from pso.provenance import UserError

log = logging.getLogger("bench")
PICTURES = "eval.bench_pictures"
CPU = torch.device("cpu")
MEMORY = ("ours", "as released")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--timesteps", type=int, default=3, help="trained steps of a pair")
    parser.add_argument("--pictures", type=int, default=32, help="generated and scored in a turn")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--note", default="", help="what else ran on the machine, for the report")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # the fresh process


# ---- pictures ----


def pictures(count: int, rounds: int) -> dict:
    module = import_module(PICTURES, "PICTURES")
    policy, scorer, prompts = _pictures(count)
    found = {"difference_grey_levels": module.difference(policy, scorer, prompts[:4])}
    calls = {
        "ours": lambda: module.ours(policy, scorer, prompts, count),
        "one by one": lambda: module.one_by_one(policy, scorer, prompts),
    }
    seconds = timing.abab(calls, rounds, CPU, warmups=1)
    return {
        **found,
        "seconds": {name: [round(s, 4) for s in taken] for name, taken in seconds.items()},
        "pictures_per_s": {name: round(count / timing.summary(taken)["median"], 2) for name, taken in seconds.items()},
        "ratio": round(timing.ratio(seconds["one by one"], seconds["ours"]), 3),
    }


def _pictures(count: int) -> tuple:
    policy = policy_of(random_pipeline(RESOLUTION, CPU, torch.float32), RESOLUTION, 4)
    return policy, import_module(f"{PICTURES}:reward", "PICTURES")(CPU), captions(count)


# ---- memory ----


def peak_memory(name: str, variant: str, size: Size) -> dict:
    """GiB of a fresh process: before the first update, and at most."""
    command = [sys.executable, "-m", "pso.bench", "cpu", "--memory-of", name, variant]
    command += ["--pairs", str(size.pairs), "--timesteps", str(size.steps), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the process that measures memory failed ({done.stderr.strip()[-300:]}); run it again.")
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(name: str, variant: str, size: Size) -> dict:
    """Two updates of one way; the other way's model is dropped before, and the peak counted from then on."""
    pair = Pair(name, size, CPU, torch.float32)
    released = pair.released()
    pair.drop("theirs" if variant == "ours" else "ours")
    begin_anew()
    before = peak_gib()
    for _ in range(2):
        pair.our_update() if variant == "ours" else pair.their_update(released)
    return {"loaded": before, "most": peak_gib()}


def begin_anew() -> None:
    """What was let go of is given back, and the peak counted from here, by Linux and its C library; where that is not
    allowed, loading is in the peak too."""
    free(CPU)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---- all of it ----


def run(args: argparse.Namespace) -> dict | None:
    for key in ("rounds", "pairs", "timesteps", "pictures", "threads"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} is {getattr(args, key)}; expected a number of at least 1.")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # else a small number may cost a hundred times a usual one
    size = Size(RESOLUTION, args.pairs, args.timesteps)
    if args.memory_of:
        print(json.dumps(memory_here(*args.memory_of, size)))
        return None
    load_before, found = os.getloadavg()[0], {}
    for name in args.only:
        found[name] = compared(name, size, CPU, torch.float32, args.rounds)
        found[name]["peak_rss_gib"] = {variant: peak_memory(name, variant, size) for variant in MEMORY}
        log.info("%s: %s", name, found[name].get("ratio", "invalid"))
        free(CPU)
    asked = ("rounds", "pairs", "timesteps", "pictures", "threads")
    told = " ".join(f"--{key} {getattr(args, key)}" for key in asked)
    return {
        "command": f"python -m pso.bench cpu {told} --only {' '.join(args.only)}",
        **{key: getattr(args, key) for key in asked},
        "comparisons": found,
        "generation_and_scoring": pictures(args.pictures, args.rounds),
        "note": args.note,
        "load_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


def text(told: dict) -> str:
    made, load = told["generation_and_scoring"], " and ".join(map(str, told["load_before_and_after"]))
    memory = [
        {"comparison": name, "variant": variant, "peak memory (GiB)": one["most"], "before the updates": one["loaded"]}
        for name, found in told["comparisons"].items()
        for variant, one in found["peak_rss_gib"].items()
    ]
    speeds = pd.DataFrame(
        [{"way": name, "pictures/s": value} for name, value in made["pictures_per_s"].items()]
    ).to_markdown(index=False, disable_numparse=True)
    parts = [
        "# Ours and others on a CPU",
        f"Updates of {told['pairs']} pairs and {told['timesteps']} trained steps on a small model of SDXL's kind "
        f"({RESOLUTION} px, float32, random weights), {told['hardware']['threads']} threads of "
        f"{told['hardware']['cpus']} CPUs. Each comparison is of the same function: gradients agree in float64. `ours "
        "again` is the noise. As released: the peer's own micro-batch, checkpointing and encoding; tuned: the same "
        "code without checkpointing at its best micro-batch. Variants take turns; ratios are medians over rounds. "
        "They say nothing of a GPU.",
        table(told["comparisons"]),
        "What one update does, counted:",
        counts_table(told["comparisons"]),
        "Memory of a fresh process each:",
        pd.DataFrame(memory).to_markdown(index=False, disable_numparse=True),
        f"{told['pictures']} pictures of {RESOLUTION} px in 4 steps, captions encoded, decoded and scored by a small "
        f"PickScore: batches of ours are **{made['ratio']} times as fast** as diffusers' pipeline and the scorer "
        "called for one picture at a time. In one step, which draws no noise, both make the same pictures to "
        f"{made['difference_grey_levels']} grey levels.",
        speeds,
        f"Load average before and after: {load}. {told['note']}".strip(),
        f"`{told['command']}`; torch {told['versions']['torch']}, diffusers {told['versions']['diffusers']}, "
        f"peft {told['versions']['peft']}.",
    ]
    return "\n\n".join(parts) + "\n"
