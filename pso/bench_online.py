"""One round of Online-PSO, sampled, decoded, scored and trained on: ours against the authors' released way.

    python -m pso.bench online-epoch --resolution 512

Ours is the loop of a run with its own source. The reward of both is a PickScore with random weights in the official
format, of the published size where the networks are. In turns, ratios within a round.
"""

import argparse
import os
from dataclasses import replace

import pandas as pd
import torch

from pso import timing
from pso.bench_model import RESOLUTION, SIZES
from pso.bench_step import asked_device, size_of
from pso.bench_updates import Form, Pair, captions
from pso.config import import_module
from pso.memory import sample_batch
from pso.peers.released_round import ReleasedRound
from pso.provenance import UserError
from pso.sources import Given, OnlinePairs

REWARD = "eval.bench_pictures:reward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, choices=SIZES, default=RESOLUTION, help="px; 128 is a small model")
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--round-pairs", type=int, default=8, help="sampled for a round, a multiple of --pairs")
    parser.add_argument("--timesteps", type=int, default=3, help="trained steps of a pair")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class Rounds:
    """Both ways on the same frozen weights."""

    def __init__(self, pair: Pair, round_pairs: int, scorer):
        self.pair, self.scorer = pair, scorer
        self.count = round_pairs // pair.size.pairs
        settings = pair.settings.model_copy(update={"pairs_per_round": round_pairs})
        prompts, before = captions(4 * round_pairs), pair.loop.given
        given = Given(pair.policy, pair.chain, settings, 0, pair.size.pairs, prompts=prompts, reward=scorer)
        given.condition, given.ranks = pair.policy.encode_prompts(prompts), before.ranks
        given.micro_batch = sample_batch(pair.policy, 256)
        self.loop = replace(pair.loop, given=given, source=OnlinePairs(given))
        self.prompts, self.number = prompts, 0
        vae, shape = pair.pipeline.vae, pair.policy.latent_shape
        self.released = ReleasedRound(pair.peer, vae, shape, self.reward, pair.size.pairs)

    def reward(self, images: list, prompts: list[str]) -> torch.Tensor:
        """Texts are encoded anew, as there."""
        self.scorer.text.clear()
        return self.scorer.score(images, prompts)

    def ours(self) -> None:
        for _ in range(self.count):
            self.loop.update(self.number)
            self.number += 1

    def theirs(self, form: Form) -> None:
        self.pair.peer.use(form)
        size = self.count * self.pair.size.pairs
        start = self.number * self.pair.size.pairs % len(self.prompts)
        self.released((self.prompts + self.prompts)[start : start + size])


def run(args: argparse.Namespace) -> dict:
    device, dtype = asked_device(args)
    if args.round_pairs < 1 or args.round_pairs % args.pairs:
        raise UserError(f"--round-pairs is {args.round_pairs}; expected a multiple of --pairs ({args.pairs}).")
    scorer = import_module(REWARD, "REWARD")(device, full=args.resolution != RESOLUTION)
    pair, load_before = Pair("online", size_of(args), device, dtype), os.getloadavg()[0]
    rounds, released = Rounds(pair, args.round_pairs, scorer), pair.released()
    tuned = Form(args.pairs, gradient_checkpointing=False)
    calls = {
        "ours": rounds.ours,
        "ours again": rounds.ours,
        "as released": lambda: rounds.theirs(released),
        "tuned": lambda: rounds.theirs(tuned),
    }
    seconds = timing.abab(calls, args.rounds, device, warmups=1)
    asked = ("resolution", "pairs", "round_pairs", "timesteps", "rounds", "device")
    told = " ".join(f"--{key.replace('_', '-')} {getattr(args, key)}" for key in asked)
    return {
        "command": f"python -m pso.bench online-epoch {told}",
        **{key: getattr(args, key) for key in asked},
        "seconds": {name: [round(s, 4) for s in taken] for name, taken in seconds.items()},
        "summary": {name: timing.summary(taken) for name, taken in seconds.items()},
        "ratio": {name: round(timing.ratio(seconds[name], seconds["ours"]), 3) for name in calls if name != "ours"},
        "clocks": timing.clocks(device),
        "load_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


def text(told: dict) -> str:
    rows = [
        {
            "variant": name,
            "seconds of a round": f"{one['median']:.3f}",
            "spread": f"{one['mad']:.3f}",
            "ours is so many times as fast": told["ratio"].get(name, ""),
        }
        for name, one in told["summary"].items()
    ]
    parts = [
        "# A round of Online-PSO",
        f"{told['round_pairs']} pairs at {told['resolution']} px: sampled, decoded, scored, and trained on in updates "
        f"of {told['pairs']} pairs and {told['timesteps']} steps. As released: its own batch sizes; tuned: batches of "
        f"{told['pairs']} pairs without checkpointing. `ours again` is the noise; variants take turns.",
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
        "Load average before and after: " + " and ".join(map(str, told["load_before_and_after"])) + ".",
        f"`{told['command']}`; torch {told['versions']['torch']}, diffusers {told['versions']['diffusers']}.",
    ]
    return "\n\n".join(parts) + "\n"
