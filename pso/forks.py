"""Branching trajectories: at every fork K candidates leave one state, and sampling goes on from one of them.

From a shared x_n each candidate takes `inner` + 1 transitions with noise of its own. At the network's
next call, which has to be made anyway, it is shown by the clean latent predicted there; the last fork's
candidates are shown finished. The candidate that goes on is drawn uniformly, never by its score, so that
the states that are trained on keep the sampler's own distribution.

Noise is keyed as in rollout.py: x_N by `keys`, the steps of candidate k by `candidate_keys[k]`. So K = 2
candidates with `inner` = N - 2 are, bit for bit, two rollouts that share x_N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pso.mdp import Chain
from pso.policy import Conditioning, Policy
from pso.provenance import UserError
from pso.rollout import INITIAL, Key, keyed_noise, keyed_seed


@dataclass(frozen=True)
class Fork:
    """B prompts x K candidates.

    states [B, K, inner + 2, C, H, W]: x_n (the same for every k) .. x_{n - inner - 1}; shown
    [B, K, C, H, W]: the clean latent to judge a candidate by; t: the time it was predicted at, 0 if it
    is finished; chosen [B]: the candidate from which sampling went on.
    """

    n: int
    states: Tensor
    shown: Tensor
    t: int
    chosen: Tensor


def forked_steps(chain: Chain, inner: int) -> list[int]:
    """n of every fork, N first: segments of `inner` + 1 transitions that tile all trained ones."""
    trained, length = chain.trained_steps, inner + 1
    if len(trained) % length:
        fits = [str(k - 1) for k in range(1, len(trained) + 1) if len(trained) % k == 0]
        raise UserError(
            f"objective.inner_steps is {inner}; expected {' or '.join(fits)}, because the {len(trained)} trained "
            f"transitions of this sampler do not divide into segments of {length}."
        )
    return trained[::length]


def shown_times(chain: Chain, inner: int) -> list[int]:
    """The time at which each fork's candidates are shown: that of the next call, 0 for the last fork."""
    after = [n - inner - 1 for n in forked_steps(chain, inner)]
    return [0 if n == 1 else int(chain.times[n]) for n in after]


@torch.no_grad()
def forks(
    policy: Policy,
    chain: Chain,
    condition: Conditioning,
    keys: list[Key],
    candidate_keys: list[list[Key]],
    inner: int,
    *,
    micro_batch: int,
) -> Iterator[Fork]:
    """Every fork of theta's trajectories, one per key; at most `micro_batch` rows in a network call."""
    each, count = len(candidate_keys), len(keys)
    row_keys = [candidates[i] for i in range(count) for candidates in candidate_keys]  # b-major, as flatten makes it
    rows = torch.arange(count).repeat_interleave(each)
    calls = _Calls(policy, chain, micro_batch)
    x = chain.init(keyed_noise(keys, INITIAL, policy.latent_shape).to(policy.device))
    eps = calls(chain.num_steps, x, condition)
    for n, time in zip(forked_steps(chain, inner), shown_times(chain, inner), strict=True):
        now, eps = x[rows], eps[rows]
        states = [now]
        for step in range(n, n - inner - 1, -1):
            if step < n:
                eps = calls(step, now, condition.rows(rows))
            noise = keyed_noise(row_keys, step, policy.latent_shape).to(policy.device)
            now = chain.step(_number(step, now), now, eps, noise)
            states.append(now)
        after = n - inner - 1
        eps = calls(after, now, condition.rows(rows))
        number = _number(after, now)
        shown = chain.step(number, now, eps, None) if after == 1 else chain.x0_hat(number, now, eps)
        chosen = torch.tensor([keyed_seed(*key, "continue", n) % each for key in keys])
        yield Fork(n, *(v.unflatten(0, (count, each)) for v in (torch.stack(states, 1), shown)), time, chosen)
        going_on = torch.arange(count) * each + chosen
        x, eps = now[going_on], eps[going_on]


def _number(n: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), n)


@dataclass(frozen=True)
class _Calls:
    """eps_theta of any number of rows, `micro_batch` at a time."""

    policy: Policy
    chain: Chain
    micro_batch: int

    def __call__(self, n: int, x: Tensor, condition: Conditioning) -> Tensor:
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(x), self.micro_batch)]
        found = [self.policy.guided_eps(self.chain, _number(n, x[p]), x[p], condition.rows(p)) for p in parts]
        return torch.cat(found)
