"""Trajectories of a few-step sampler, from noise that belongs to each image.

Noise is a function of a key such as ("eval", seed, prompt id) and the step: one generator per image,
never a shared stream. So it does not depend on batch, order, shard or process count, and every
method sees the same noise for the same key.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pso.mdp import Chain
from pso.policy import Conditioning, Policy

Key = tuple  # of numbers and texts

INITIAL = "initial"  # the "step" of x_N


def keyed_seed(*key) -> int:
    """A 63-bit seed from numbers and texts."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def keyed_noise(keys: list[Key], step: int | str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [len(keys), *shape], float32, on the CPU."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(keyed_seed(*key, step))) for key in keys]
    return torch.stack(draws)


@dataclass(frozen=True)
class Trajectory:
    """states [B, N, C, H, W]: x_N..x_1; x0 [B, C, H, W], the clean latent."""

    states: Tensor
    x0: Tensor

    @property
    def transitions(self) -> tuple[Tensor, Tensor]:
        """(x_n, x_{n-1}) for n = N..2, each [B, N - 1, C, H, W]: the transitions that have a density."""
        return self.states[:, :-1], self.states[:, 1:]


@torch.no_grad()
def rollout(
    policy: Policy,
    chain: Chain,
    condition: Conditioning,
    keys: list[Key],
    step_keys: list[Key] | None = None,
    to_x0: bool = True,
) -> Trajectory:
    """Sample one image per key with theta.

    `step_keys` (default: keys) draw the noise of the steps. A few-step sampler's states are kept;
    with `to_x0` false the last, deterministic transition is left out and x0 is empty.
    """
    with policy.sampling():
        return _sampled(policy, chain, condition, keys, step_keys or keys, to_x0)


def _sampled(
    policy: Policy, chain: Chain, condition: Conditioning, keys: list[Key], step_keys: list[Key], to_x0: bool
) -> Trajectory:
    device, shape = policy.device, policy.latent_shape
    x = chain.init(keyed_noise(keys, INITIAL, shape).to(device))
    states = []
    for step in chain.all_steps:
        if chain.stochastic:
            states.append(x)
        if step == 1 and not to_x0:
            x = x[:0]
            break
        n = torch.full((len(keys),), step)
        noise = keyed_noise(step_keys, step, shape).to(device) if chain.stochastic and step > 1 else None
        x = chain.step(n, x, policy.guided_eps(chain, n, x, condition), noise)
    return Trajectory(torch.stack(states, 1) if states else x[:, None], x)


def rollouts(
    policy: Policy,
    chain: Chain,
    condition: Conditioning,
    keys: list[Key],
    step_keys: list[Key] | None = None,
    to_x0: bool = True,
    *,
    micro_batch: int,
) -> Iterator[Trajectory]:
    """The same trajectories, `micro_batch` images at a time: noise belongs to its key, so no split changes it."""
    step_keys = step_keys or keys
    for start in range(0, len(keys), micro_batch):
        part = slice(start, start + micro_batch)
        yield rollout(policy, chain, condition.rows(part), keys[part], step_keys[part], to_x0)
