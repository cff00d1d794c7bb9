"""Pictures per second of scoring by five metrics, against one picture, one metric and one network call at a time.

    python -m pso.bench score [--pictures 96] [--size 512] [--rounds 5]

Small random checkpoints in the official formats (eval/seeded.py), PNG files, a prompt of its own for every picture.
`together` is eval.scoring as the command runs it. `one_by_one` is what the official snippets do: for each metric and
each picture open the file, transform it, encode its text, a batch of 1. Both by our scorers, so that nothing but the
order of work differs; both must give the same scores to 1e-5 before anything is timed. Then they take turns.
Peak memory is that of a fresh process each, networks included.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch

from eval.pictures import Pictures
from eval.score_folder import open_pictures, with_prompts
from eval.scoring import score_pictures
from eval.seeded import build
from eval.seeded_pictures import scene
from pso.config import load
from pso.hub import Hub
from pso.models import load_metric
from pso.provenance import UserError

log = logging.getLogger("bench")
METRICS = ("pick_score", "clip_score", "image_reward", "aesthetic_score", "hps_v2")
TOLERANCE = 1e-5
WORDS = ("red", "cat", "dog", "castle", "ocean", "painting", "night", "robot", "a", "of", "in", "the")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--size", type=int, default=512, help="px of each side")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each of the two takes")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the report")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)  # the fresh process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)


# ---- the two ways ----


def together(pictures: Pictures, scorers: dict) -> pd.DataFrame:
    return score_pictures(pictures, pictures.frame["prompt"].tolist(), scorers, names=pictures.names)


def one_by_one(pictures: Pictures, scorers: dict) -> pd.DataFrame:
    found = {name: [] for name in scorers}
    for name, scorer in scorers.items():
        for row, prompt in enumerate(pictures.frame["prompt"]):
            forget(scorer)
            found[name].append(scorer.score([pictures[row]], [prompt]).item())
    return pd.DataFrame(found)


def forget(scorer) -> None:
    """Texts that a scorer keeps."""
    for kept in ("text", "tokens"):
        if isinstance(texts := getattr(scorer, kept, None), dict):
            texts.clear()


WAYS = {"together": together, "one_by_one": one_by_one}


# ---- what is scored ----


def prepare(work: Path, count: int, size: int) -> None:
    """Checkpoints, pictures and prompts in a folder."""
    build(work / "hub", only=("clip_score", "pick_score", "image_reward", "aesthetic_score", "hps_v2"))
    folder = work / "pictures"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for k in range(count):
        scene(size, size, k).save(folder / f"{k:04d}.png")
        text = f"{k} " + " ".join(rng.choice(WORDS, int(rng.integers(4, 30))))
        lines.append(json.dumps({"file_name": f"{k:04d}.png", "prompt": text}))
    (work / "prompts.jsonl").write_text("\n".join(lines))


def opened(work: Path) -> tuple[Pictures, dict]:
    entries, hub = load().metrics, Hub(work / "hub")
    scorers = {name: load_metric(name, entries[name].unpinned(), hub, torch.device("cpu")) for name in METRICS}
    return with_prompts(open_pictures(work / "pictures"), work / "prompts.jsonl"), scorers


# ---- measuring ----


def differences(pictures: Pictures, scorers: dict) -> dict[str, float]:
    """Largest difference of each metric between the two ways; a sentence if it is more than TOLERANCE."""
    one, other = (way(pictures, scorers) for way in WAYS.values())
    found = {name: float((one[name] - other[name]).abs().max()) for name in scorers}
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            raise UserError(f"{name} differs by {difference:.2g} between the two ways; nothing was timed.")
    return found


def timed(way: Callable, pictures: Pictures, scorers: dict) -> float:
    for scorer in scorers.values():
        forget(scorer)
    began = time.perf_counter()
    way(pictures, scorers)
    return time.perf_counter() - began


def peak_memory(way: str, work: Path) -> dict[str, float]:
    """GiB of a fresh process: after loading the networks, and at most."""
    command = [sys.executable, "-m", "pso.bench", "score", "--memory-of", way, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the process that measures memory failed ({done.stderr.strip()[-300:]}); run it again.")
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> float:
    """GiB. By Linux's own count of this program: getrusage's begins with what the parent had when it started this."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20, 3)


def measure(work: Path, rounds: int) -> dict:
    pictures, scorers = opened(work)
    found = {"max_abs_diff": differences(pictures, scorers)}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for name, way in WAYS.items():
            seconds[name].append(round(timed(way, pictures, scorers), 3))
        log.info("round %d/%d: %s", number + 1, rounds, {name: times[-1] for name, times in seconds.items()})
    per_second = {name: round(len(pictures) / median(times), 2) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["together"], seconds["one_by_one"], strict=True)]
    found |= {"seconds": seconds, "pictures_per_second": per_second, "ratio": round(median(ratios), 2)}
    return found | {"peak_rss_gib": {name: peak_memory(name, work) for name in WAYS}}


def run(args: argparse.Namespace) -> dict | None:
    if args.memory_of is not None:
        pictures, scorers = opened(args.work)
        loaded = peak()
        WAYS[args.memory_of](pictures, scorers)
        print(json.dumps({"networks_loaded": loaded, "most": peak()}))
        return None
    for name in ("pictures", "size", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected a number of at least 1.")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.pictures, args.size)
        found = measure(Path(folder), args.rounds)
    asked = {key: getattr(args, key) for key in ("pictures", "size", "rounds")}
    return {
        "command": "python -m pso.bench score " + " ".join(f"--{key} {value}" for key, value in asked.items()),
        **asked,
        "metrics": list(METRICS),
        **found,
        "note": args.note,
        "load_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


def text(told: dict) -> str:
    rows = [
        {
            "way": name.replace("_", " "),
            "pictures/s": told["pictures_per_second"][name],
            "seconds of each round": ", ".join(map(str, told["seconds"][name])),
            "peak memory (GiB)": told["peak_rss_gib"][name]["most"],
            "of it before scoring": told["peak_rss_gib"][name]["networks_loaded"],
        }
        for name in WAYS
    ]
    load = " and ".join(map(str, told["load_before_and_after"]))
    parts = [
        "# Scoring by five metrics on a CPU",
        f"{told['pictures']} pictures of {told['size']} px, each with a prompt of its own, by "
        f"{', '.join(told['metrics'])}: small random networks of 224 px in the official formats, "
        f"{told['hardware']['threads']} thread of {told['hardware']['cpus']} CPUs. Together: a picture is decoded "
        "once, scorers share transforms and features, batches of 64. One by one: each metric by itself, a file opened, "
        "a text encoded and a network called for every picture, as the official snippets do. The two take turns; "
        "medians.",
        f"**{told['ratio']} times as fast** (median over rounds of the ratio); the same scores to "
        f"{max(told['max_abs_diff'].values()):.1e}, checked before.",
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
        f"Load average before and after: {load}. {told['note']}".strip(),
        f"`{told['command']}`; torch {told['versions']['torch']}, transformers {told['versions']['transformers']}.",
    ]
    return "\n\n".join(parts) + "\n"
