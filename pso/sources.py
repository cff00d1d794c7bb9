"""Where a batch comes from: labelled pairs, targets, targets against the model, online pairs.

A source is built once per run and asked for `batch(update)`. Which samples an update sees and all
its noise are functions of (run seed, update, sample, step), so every method sees the same pairs in
the same order with the same (t, eps) where it can, and a resumed run continues exactly.
"""

from dataclasses import dataclass, field

import torch
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr
from torch import Tensor

from pso.caches import PairCache
from pso.config import ConfigError
from pso.data import pair_indices
from pso.evidence import Batch, Side
from pso.mdp import Chain, Renoise, sdxl_alphas_cumprod
from pso.policy import Conditioning, Policy, to_images
from pso.provenance import UserError
from pso.rollout import Trajectory, keyed_noise, keyed_seed, rollout


@dataclass
class Given:
    """What a run gives its source: the loaded model, its data and the method's own Config."""

    policy: Policy
    chain: Chain
    cfg: object
    seed: int
    batch_size: int
    pairs: PairCache | None = None  # clean latents with prompts
    prompts: list[str] = field(default_factory=list)  # texts, for sources that only need prompts
    condition: Conditioning | None = None  # of `prompts`, or of the pairs' prompts
    reward: object | None = None  # score(images, prompts) -> Tensor [B]


def zero_terminal_alphas() -> Tensor:
    """SDXL's alpha_bar rescaled so that x_999 is pure noise (Diffusion-DPO's Turbo recipe)."""
    alphas = sdxl_alphas_cumprod()
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    return torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)


class _Latents:
    """Clean latents of a cache, noised forward."""

    def __init__(self, given: Given):
        self.given, self.cfg = given, given.cfg
        self.chain = self.noising = given.chain
        if getattr(self.cfg, "zero_terminal_snr", False):
            if not isinstance(given.chain, Renoise):
                raise ConfigError(
                    "objective.zero_terminal_snr is true; expected false for an ancestral sampler, whose noise level "
                    "at t = 999 would be infinite."
                )
            times = given.chain.times[1:].flip(0).tolist()
            self.noising = Renoise(times, zero_terminal_alphas())

    def samples(self, update: int) -> list[int]:
        given = self.given
        return pair_indices(update, given.batch_size, len(given.pairs), given.seed)

    def clean(self, side: str, update: int, index: list[int]) -> Tensor:
        """A fresh draw from the latent posteriors [B, C, H, W]."""
        mean, std = self.given.pairs.latents(side, index)
        noise = keyed_noise([(self.given.seed, "posterior", side, update, i) for i in index], 0, mean.shape[1:])
        return (mean + std * noise).to(self.given.policy.device)

    def steps(self, update: int, index: list[int]) -> Tensor:
        """n [B, S]: all trained transitions, or one drawn per sample."""
        trained = self.given.chain.trained_steps
        if getattr(self.cfg, "timestep_mode", None) != "sample_one":
            return torch.tensor(trained).expand(len(index), -1)
        return torch.tensor([[trained[self._draw(update, i, len(trained))]] for i in index])

    def _draw(self, update: int, sample: int, count: int) -> int:
        return keyed_seed(self.given.seed, "step", update, sample) % count

    def noised(self, side: str, update: int, index: list[int], n: Tensor, shares_eps: bool) -> Side:
        """The forward side: x_n = clean latent with eps. The pair shares eps if asked to."""
        clean = self.clean(side, update, index)
        whose = "pair" if shares_eps else side
        rows = [
            keyed_noise([(self.given.seed, "eps", whose, update, i)], step, clean.shape[1:])
            for i, steps in zip(index, n.tolist(), strict=True)
            for step in steps
        ]
        eps = torch.cat(rows).view(*n.shape, *clean.shape[1:]).to(clean.device)
        x = self.noising.noise_to(n, clean[:, None].expand_as(eps), eps)
        return Side("forward", n, x, eps)


class PreferencePairs(_Latents):
    """Labelled pairs of images, both noised forward (Eq. 6)."""

    def batch(self, update: int) -> Batch:
        index = self.samples(update)
        n = self.steps(update, index)
        target, reference = (
            self.noised(side, update, index, n, self.cfg.pair_shares_eps) for side in ("target", "reference")
        )
        return Batch(self.given.pairs.prompt_index[index], target, reference)


class Targets(_Latents):
    """The pairs' target images alone, noised to uniform times or to the sampler's."""

    def __init__(self, given: Given):
        super().__init__(given)
        if self.cfg.times == "uniform":  # every time is a step of this chain: n = t + 1
            self.chain = self.noising = type(given.chain)(list(range(999, -1, -1)))

    def batch(self, update: int) -> Batch:
        index = self.samples(update)
        n = torch.tensor([[1 + self._draw(update, i, self.noising.num_steps)] for i in index])
        return Batch(self.given.pairs.prompt_index[index], self.noised("target", update, index, n, True))


class TargetsAgainstModel(_Latents):
    """Given images against samples that theta makes of the same prompts, fresh each update (Eq. 5)."""

    def batch(self, update: int) -> Batch:
        given, index = self.given, self.samples(update)
        n = self.steps(update, index)
        target = self.noised("target", update, index, n, True)
        prompts = given.pairs.prompt_index[index]
        keys = [(given.seed, "rollout", update, i) for i in index]
        trajectory = rollout(given.policy, given.chain, given.condition.rows(prompts), keys, to_x0=False)
        return Batch(prompts, target, reverse_side(given.chain, trajectory, n))


def reverse_side(chain: Chain, trajectory: Trajectory, n: Tensor) -> Side:
    """The transitions n [B, S] of a trajectory."""
    before, after = trajectory.transitions
    column = chain.num_steps - n  # transition n is the (N - n)-th state
    row = torch.arange(len(n))[:, None]
    return Side("reverse", n, before[row, column], after[row, column])


class OnlinePairs:
    """Two samples of theta per prompt, ranked by a reward, sampled in rounds and used once (Eq. 7)."""

    def __init__(self, given: Given):
        self.given, self.cfg, self.chain = given, given.cfg, given.chain
        if self.cfg.pairs_per_round % given.batch_size:
            raise ConfigError(
                f"objective.pairs_per_round is {self.cfg.pairs_per_round}; expected a multiple of "
                f"tune.batch_size ({given.batch_size}), so that a round is used up exactly."
            )
        self.updates_per_round = self.cfg.pairs_per_round // given.batch_size
        self.round, self.buffer = -1, {}
        self.reward_queries = 0

    def batch(self, update: int) -> Batch:
        if update // self.updates_per_round != self.round:
            self._sample(update // self.updates_per_round)
        start = update % self.updates_per_round * self.given.batch_size
        here = {k: v[start : start + self.given.batch_size] for k, v in self.buffer.items()}
        n = self._steps(update, len(here["prompts"]))
        target, reference = (
            reverse_side(self.given.chain, Trajectory(here[side], here[side][:, 0]), n)
            for side in ("target", "reference")
        )
        log = {f"reward_{side}": here[f"reward_{side}"].mean().item() for side in ("target", "reference")}
        log["ties"] = here["tied"].float().mean().item()
        return Batch(here["prompts"], target, reference, here["tied"].to(target.x.device), log)

    def _steps(self, update: int, count: int) -> Tensor:
        trained = self.given.chain.trained_steps
        if self.cfg.timestep_mode != "sample_one":
            return torch.tensor(trained).expand(count, -1)
        draws = [keyed_seed(self.given.seed, "step", update, i) % len(trained) for i in range(count)]
        return torch.tensor([[trained[d]] for d in draws])

    def _sample(self, number: int) -> None:
        """Sample, decode and rank one round."""
        given, cfg = self.given, self.cfg
        prompts = torch.tensor(pair_indices(number, cfg.pairs_per_round, len(given.prompts), given.seed))
        sides, rewards = [], []
        for member in ("first", "second"):
            steps = [
                (given.seed, "rollout", number, i - i % cfg.shared_noise_over, member) for i in range(len(prompts))
            ]
            start = "pair" if cfg.pair_shares_initial_noise else member
            keys = [(given.seed, "rollout", number, i, start) for i in range(len(prompts))]
            trajectory = rollout(given.policy, given.chain, given.condition.rows(prompts), keys, steps)
            images = given.policy.decode(trajectory.x0)
            rewards.append(given.reward.score(to_images(images), [given.prompts[i] for i in prompts]).cpu())
            sides.append(trajectory.states)
        self.reward_queries += 2 * len(prompts)
        self.round = number
        self.buffer = rank(prompts, sides, rewards)

    # -- resuming in the middle of a round --

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.round, self.reward_queries])
        return {"counts": counts, **{f"buffer.{k}": v.contiguous() for k, v in self.buffer.items()}}

    def set_state(self, state: dict[str, Tensor]) -> None:
        self.round, self.reward_queries = state["counts"].tolist()
        device = self.given.policy.device
        self.buffer = {k.removeprefix("buffer."): v for k, v in state.items() if k.startswith("buffer.")}
        self.buffer |= {k: v.to(device) for k, v in self.buffer.items() if k in ("target", "reference")}


def rank(prompts: Tensor, sides: list[Tensor], rewards: list[Tensor]) -> dict[str, Tensor]:
    """Order the members of each pair: the first is the target only if strictly better (Algorithm 2)."""
    first, second = rewards
    bad = int((~torch.isfinite(torch.stack(rewards))).sum())
    if bad:
        raise UserError(
            f"the reward of {bad} of {2 * len(first)} sampled images is not finite; is its checkpoint whole?"
        )
    wins = (first > second).to(sides[0].device)
    choose = wins[:, None, None, None, None]
    return {
        "prompts": prompts,
        "target": torch.where(choose, sides[0], sides[1]),
        "reference": torch.where(choose, sides[1], sides[0]),
        "reward_target": torch.maximum(first, second),
        "reward_reference": torch.minimum(first, second),
        "tied": first == second,
    }
