"""Stepwise pairs: the best and the worst of a fork's candidates, transition by transition (SPO).

Rounds of prompts are sampled by theta as it is then, with forks (pso/forks.py). Every fork's candidates
are scored by a step-aware reward, `score(images, prompts, t)`, on the clean latents predicted at t. The
best and the worst are kept if the softmax over their two scores is further apart than `threshold`; each
transition of such a segment is a pair of its own. Pairs are shuffled over prompts and forks and trained on
once. How many a round yields is up to the reward: what is left over after the last whole batch goes first
into the next one (the authors train on it in a smaller batch).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pso.config import ConfigError
from pso.evidence import Batch, Side
from pso.forks import Fork, forks, shown_times
from pso.policy import to_images
from pso.provenance import UserError
from pso.rollout import keyed_seed
from pso.sources import Given
from pso.visits import pair_indices

# Names in the noise's keys; the first two as OnlinePairs has them, so that D3PO's trajectories are the same there.
CANDIDATES = ("first", "second", "third", "fourth")
EMPTY_ROUNDS = 20  # so many rounds without a single pair, and the threshold is to blame


@dataclass
class Counts:
    """What became of the forks, in the last round and in all, and what that cost."""

    rounds: int = 0
    reward_queries: int = 0
    forks: list[int] = field(default_factory=list)  # in all, per time
    accepted: list[int] = field(default_factory=list)
    last: list[float] = field(default_factory=lambda: [0.0, 0.0])  # share accepted and mean gap


class Found(NamedTuple):
    """A fork of a few prompts: its place in the trajectory, gaps [B], which were kept [B], and their pairs."""

    fork: int
    gaps: Tensor
    kept: Tensor
    pairs: dict[str, Tensor]


class StepwisePairs:
    """Pairs of transitions that leave one state, or that follow one from it, ranked step by step."""

    def __init__(self, given: Given):
        self.given, self.cfg, self.chain = given, given.cfg, given.chain
        if not getattr(given.reward, "step_aware", False):
            raise ConfigError(
                "the method's reward does not know of time steps, which its SOURCE StepwisePairs needs to score "
                "predictions of clean images; name one that does, such as spm_lite."
            )
        times = shown_times(given.chain, self.cfg.inner_steps)  # also refuses segments that do not fit
        self.times = times
        self.counts = Counts(forks=[0] * len(times), accepted=[0] * len(times))
        self.buffer: dict[str, Tensor] = {}

    @property
    def reward_queries(self) -> int:
        return self.counts.reward_queries

    def batch(self, update: int) -> Batch:
        """The next pairs in line: a round follows on the one before, so updates have to be asked for in order."""
        size, empty = self.given.batch_size, 0
        while self._waiting() < size:
            before = self._waiting()
            self._sample(self.counts.rounds)
            empty = 0 if self._waiting() > before else empty + 1
            if empty == EMPTY_ROUNDS:
                raise UserError(
                    f"objective.threshold is {self.cfg.threshold}, and in {EMPTY_ROUNDS} rounds of "
                    f"{self.cfg.prompts_per_round} prompts no fork's gap exceeded it; lower it."
                )
        here = {k: v[:size] for k, v in self.buffer.items()}
        self.buffer = {k: v[size:] for k, v in self.buffer.items()}
        sides = [
            Side("reverse", here["n"], here[f"{side}_x"], here[f"{side}_next"]) for side in ("target", "reference")
        ]
        share, gap = self.counts.last
        return Batch(here["prompts"], *sides, log={"accepted": share, "gap": gap, "rounds": float(self.counts.rounds)})

    def _waiting(self) -> int:
        return len(self.buffer["n"]) if self.buffer else 0

    # -- one round --

    def _sample(self, number: int) -> None:
        """Sample, fork and score the prompts of one round; its pairs join the buffer, shuffled."""
        given, cfg = self.given, self.cfg
        prompts = torch.tensor(pair_indices(number, cfg.prompts_per_round, len(given.prompts), given.seed))
        at_once, own = max(1, given.micro_batch // cfg.candidates), given.ranks.share(len(prompts))
        parts = [slice(start, min(start + at_once, own.stop)) for start in range(own.start, own.stop, at_once)]
        with given.ranks.together(), given.policy.sampling():
            found = [one for part in parts for one in self._part(number, part.start, prompts[part])]
        found = self._of_all(found)
        found.sort(key=lambda one: one.fork)  # then by prompt: in how many parts it was made leaves no trace
        self._count(number, found)
        joined = {k: torch.cat([one.pairs[k] for one in found]) for k in found[0].pairs}
        shuffle = torch.Generator().manual_seed(keyed_seed(given.seed, "shuffle", number))
        order = torch.randperm(len(joined["n"]), generator=shuffle)
        new = {k: v[order.to(v.device)] for k, v in joined.items()}
        self.buffer = {k: torch.cat([self.buffer[k], v]) for k, v in new.items()} if self.buffer else new

    def _of_all(self, found: list[Found]) -> list[Found]:
        """With what the other processes found: tensors travel by way of the CPU."""
        ranks, device = self.given.ranks, self.given.policy.device
        if ranks.count == 1:
            return found
        moved = [one._replace(pairs={k: v.cpu() for k, v in one.pairs.items()}) for one in found]
        return [one._replace(pairs={k: _to(device, v) for k, v in one.pairs.items()}) for one in ranks.lists(moved)]

    def _part(self, number: int, first: int, prompts: Tensor) -> Iterator[Found]:
        """Every fork of a few prompts, the `first` and following ones of the round."""
        given, cfg = self.given, self.cfg
        where = [(given.seed, "rollout", number, first + i) for i in range(len(prompts))]
        made = forks(
            given.policy,
            given.chain,
            given.condition.rows(prompts),
            [(*key, "pair") for key in where],
            [[(*key, name) for key in where] for name in CANDIDATES[: cfg.candidates]],
            cfg.inner_steps,
            micro_batch=given.micro_batch,
        )
        rows = torch.arange(len(prompts))
        for index, fork in enumerate(made):
            scores = self._scores(fork, prompts)
            best, worst = scores.argmax(1), scores.argmin(1)
            gaps = ((scores[rows, best] - scores[rows, worst]) / 2).tanh()  # p_best - p_worst of a softmax of two
            kept = gaps > cfg.threshold
            yield Found(index, gaps, kept, segments(fork, prompts, best, worst, kept))

    def _count(self, number: int, found: list[Found]) -> None:
        counts = self.counts
        kept, gaps = (torch.cat([getattr(one, k) for one in found]) for k in ("kept", "gaps"))
        counts.rounds, counts.last = number + 1, [kept.float().mean().item(), gaps.mean().item()]
        for one in found:
            counts.reward_queries += len(one.kept) * self.cfg.candidates
            counts.forks[one.fork] += len(one.kept)
            counts.accepted[one.fork] += int(one.kept.sum())

    def _scores(self, fork: Fork, prompts: Tensor) -> Tensor:
        """The reward of every candidate [B, K], on the CPU. Images are dropped once they are scored."""
        given, count = self.given, fork.shown.shape[1]
        latents, texts = fork.shown.flatten(0, 1), [given.prompts[i] for i in prompts.repeat_interleave(count)]
        found = []
        for start in range(0, len(texts), given.micro_batch):
            part = slice(start, start + given.micro_batch)
            images = to_images(given.policy.decode(latents[part]))
            found.append(given.reward.score(images, texts[part], fork.t).float().cpu())
        scores = torch.cat(found)
        if bad := int((~torch.isfinite(scores)).sum()):
            raise UserError(
                f"the reward of {bad} of {len(scores)} sampled images is not finite; is its checkpoint whole?"
            )
        return scores.view(-1, count)

    # -- the record, and resuming in the middle of a round --

    def summary(self) -> dict:
        """For run.json: how many forks were sampled and how many of them gave pairs, per time of the score."""
        counts = self.counts
        per_time = zip(self.times, counts.forks, counts.accepted, strict=True)
        return {"rounds": counts.rounds, "forks": {str(t): {"sampled": f, "accepted": a} for t, f, a in per_time}}

    def state(self) -> dict[str, Tensor]:
        counts = self.counts
        numbers = torch.tensor([counts.rounds, counts.reward_queries, *counts.forks, *counts.accepted])
        last = torch.tensor(counts.last, dtype=torch.float64)
        return {"counts": numbers, "last": last, **{f"buffer.{k}": v.contiguous() for k, v in self.buffer.items()}}

    def set_state(self, state: dict[str, Tensor]) -> None:
        rounds, queries, *per_time = state["counts"].tolist()
        half, device = len(per_time) // 2, self.given.policy.device
        self.counts = Counts(rounds, queries, per_time[:half], per_time[half:], state["last"].tolist())
        self.buffer = {k.removeprefix("buffer."): v for k, v in state.items() if k.startswith("buffer.")}
        self.buffer = {k: _to(device, v) for k, v in self.buffer.items()}


def _to(device, values: Tensor) -> Tensor:
    """Latents go to the device; n and prompts stay."""
    return values.to(device) if values.ndim > 2 else values


def segments(fork: Fork, prompts: Tensor, best: Tensor, worst: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The kept forks' transitions as pairs: prompts [M], n [M, 1] and both sides' x_n, x_{n-1} [M, 1, C, H, W]."""
    rows = kept.nonzero()[:, 0]
    length = fork.states.shape[2] - 1
    found = {"prompts": prompts[rows].repeat_interleave(length)}
    found["n"] = torch.arange(fork.n, fork.n - length, -1).repeat(len(rows))[:, None]
    for side, which in (("target", best), ("reference", worst)):
        states = fork.states[rows, which[rows]]
        found[f"{side}_x"] = states[:, :-1].flatten(0, 1)[:, None]
        found[f"{side}_next"] = states[:, 1:].flatten(0, 1)[:, None]
    return found
