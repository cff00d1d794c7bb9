"""Where a batch comes from: labelled pairs, targets, targets against the model, online pairs.

A source is built once per run and asked for `batch(update)`. Which samples an update sees and all
its noise are functions of (run seed, update, sample, step), so every method sees the same pairs in
the same order with the same (t, eps) where it can, and a resumed run continues exactly.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pso.caches import PairCache
from pso.config import ConfigError
from pso.embeddings import PairEmbeddings
from pso.evidence import Batch, Side
from pso.mdp import Ancestral, Chain, Renoise, sdxl_alphas_cumprod
from pso.policy import Conditioning, Policy, to_images
from pso.provenance import UserError
from pso.ranks import Ranks
from pso.rollout import Key, keyed_noise, keyed_seed, rollouts
from pso.visits import pair_indices


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
    micro_batch: int = 256  # images sampled, decoded and scored at a time; changes no result
    embeddings: PairEmbeddings | None = None  # of the pairs
    ranks: Ranks = field(default_factory=Ranks)  # the processes among which sampling is shared out


class _Latents:
    """Clean latents of a cache, noised forward.

    Which steps, by the method's Config: all trained ones, one of these drawn per sample (`timestep_mode:
    sample_one`), or one of all times drawn per sample (`times`: of the whole schedule or of the sampler's grid).
    """

    def __init__(self, given: Given):
        if given.pairs is None:
            raise ConfigError(
                f"the method's data holds no pairs, which its SOURCE {type(self).__name__} needs; "
                "name a data set of format preference_parquet or imagefolder (for targets alone also dreambooth)."
            )
        self.given, self.cfg, self.chain = given, given.cfg, given.chain
        if getattr(self.cfg, "times", None) is None:
            refuse_guidance(given.policy)
        if getattr(self.cfg, "zero_terminal_snr", False):
            self.chain = with_zero_terminal_snr(self.chain)
        if getattr(self.cfg, "times", None) == "uniform":
            self.chain = at_every_time(self.chain)
        if getattr(self.cfg, "caption_dropout", 0):  # the last row of the condition is then the empty caption
            given.condition = given.condition.followed_by(given.policy.encode_prompts([""]))

    def samples(self, update: int) -> list[int]:
        given = self.given
        return pair_indices(update, given.batch_size, len(given.pairs), given.seed, given.pairs.left_out)

    def prompts(self, update: int, index: list[int]) -> Tensor:
        """Rows of the condition [B]: the pairs' captions, a share of them replaced by the empty one."""
        rows, share = self.given.pairs.prompt_index[index], getattr(self.cfg, "caption_dropout", 0)
        if not share:
            return rows
        dropped = [keyed_seed(self.given.seed, "caption", update, i) < share * 2**63 for i in index]
        return torch.where(torch.tensor(dropped), len(self.given.condition) - 1, rows)

    def clean(self, side: str, update: int, index: list[int]) -> Tensor:
        """A fresh draw from the latent posteriors [B, C, H, W]."""
        mean, std = self.given.pairs.latents(side, index)
        noise = keyed_noise([(self.given.seed, "posterior", side, update, i) for i in index], 0, mean.shape[1:])
        return (mean + std * noise).to(self.given.policy.device, non_blocking=True)

    def steps(self, update: int, index: list[int]) -> Tensor:
        """n [B, S]."""
        if getattr(self.cfg, "times", None) is not None:
            choice = self.chain.all_steps[::-1]
        elif getattr(self.cfg, "timestep_mode", None) == "sample_one":
            choice = self.chain.trained_steps
        else:
            return torch.tensor(self.chain.trained_steps).expand(len(index), -1)
        draws = [keyed_seed(self.given.seed, "step", update, i) % len(choice) for i in index]
        return torch.tensor([[choice[d]] for d in draws])

    def noised(self, side: str, update: int, index: list[int], n: Tensor, shares_eps: bool) -> Side:
        """The forward side: x_n = clean latent with eps. Only the reference may have an eps of its own."""
        clean = self.clean(side, update, index)
        whose = "pair" if shares_eps or side == "target" else side
        rows = [
            keyed_noise([(self.given.seed, "eps", whose, update, i)], step, clean.shape[1:])
            for i, steps in zip(index, n.tolist(), strict=True)
            for step in steps
        ]
        eps = torch.cat(rows).view(*n.shape, *clean.shape[1:]).to(clean.device, non_blocking=True)
        x = self.chain.noise_to(n, clean[:, None].expand_as(eps), eps)
        return Side("forward", n, x, eps)


class PreferencePairs(_Latents):
    """Labelled pairs of images, both noised forward to the same time (Eq. 6); they share eps unless the Config
    says otherwise."""

    def batch(self, update: int) -> Batch:
        index = self.samples(update)
        n, shares_eps = self.steps(update, index), getattr(self.cfg, "pair_shares_eps", True)
        target, reference = (self.noised(side, update, index, n, shares_eps) for side in ("target", "reference"))
        return Batch(self.prompts(update, index), target, reference)


class ContrastPairs(PreferencePairs):
    """Preference pairs in groups of `group_size` that are compared with each other: one time for a whole group, that
    of its first pair, and embeddings of captions and pictures."""

    def __init__(self, given: Given):
        super().__init__(given)
        if given.embeddings is None:
            raise ConfigError(
                "the method has no embeddings, by which its SOURCE ContrastPairs tells how near two pairs are; name a "
                "metric with a CLIP as embeddings."
            )
        if given.batch_size % self.cfg.group_size:
            raise ConfigError(
                f"objective.group_size is {self.cfg.group_size}; expected a divisor of tune.batch_size "
                f"({given.batch_size})."
            )

    def steps(self, update: int, index: list[int]) -> Tensor:
        return super().steps(update, [index[k - k % self.cfg.group_size] for k in range(len(index))])

    def batch(self, update: int) -> Batch:
        embeddings = self.given.embeddings.rows(self.samples(update), self.given.policy.device)
        return replace(super().batch(update), embeddings=embeddings)


class Targets(_Latents):
    """The pairs' target images alone."""

    def batch(self, update: int) -> Batch:
        index = self.samples(update)
        n = self.steps(update, index)
        return Batch(self.prompts(update, index), self.noised("target", update, index, n, True))


class TargetsAgainstModel(_Latents):
    """Given images against samples that theta makes of the same prompts, fresh each update (Eq. 5)."""

    def batch(self, update: int) -> Batch:
        given, index = self.given, self.samples(update)
        n = self.steps(update, index)
        target = self.noised("target", update, index, n, True)
        prompts, own = given.pairs.prompt_index[index], given.ranks.share(len(index))
        keys = [(given.seed, "rollout", update, i) for i in index[own]]
        condition, bound = given.condition.rows(prompts[own]), given.micro_batch
        with given.ranks.together():
            parts = rollouts(given.policy, given.chain, condition, keys, to_x0=False, micro_batch=bound)
            states = torch.cat([part.states for part in parts])
        states = given.ranks.whole(states, len(index))
        return Batch(prompts, target, reverse_side(given.chain, states, n))


def with_zero_terminal_snr(chain: Chain) -> Chain:
    """The chain's times on the rescaled schedule, where x_999 is eps alone. Variance preserving, because its sigma
    would be infinite there; and for forward noising only: no sampler of ours steps through it."""
    if not isinstance(chain, Ancestral):
        raise ConfigError(
            "objective.zero_terminal_snr is true; expected false for a model whose sampler is not ancestral, because "
            "only SDXL-Turbo was published with it."
        )
    rescaled = Renoise(chain.times[1:].flip(0).tolist(), sdxl_alphas_cumprod(zero_terminal_snr=True))
    rescaled.stochastic = False
    return rescaled


def at_every_time(chain: Chain) -> Chain:
    """The chain's noising at every time of its schedule, n = t + 1. No sampler takes these steps: no kernel, no KL."""
    alphas = chain.alphas_cumprod
    every = type(chain)(list(reversed(range(len(alphas)))), alphas)
    every.stochastic = False
    return every


def refuse_guidance(policy: Policy) -> None:
    """Evidence of noised latents is the bare network's, so it says nothing of the steps of a guided sampler."""
    if policy.guidance_scale > 1:
        raise ConfigError(
            f"the model's guidance_scale is {policy.guidance_scale}; expected at most 1 for a method that weighs the "
            "steps of its sampler by noised latents (Eq. 5 and 6): their evidence is that of the unguided network."
        )


def reverse_side(chain: Chain, states: Tensor, n: Tensor) -> Side:
    """The transitions n [B, S] of trajectories with states [B, N, C, H, W]."""
    column = (chain.num_steps - n).to(states.device, non_blocking=True)  # x_n is the (N - n)-th state
    row = torch.arange(len(n), device=states.device)[:, None]
    return Side("reverse", n, states[row, column], states[row, column + 1])


class OnlinePairs:
    """Two samples of theta per prompt, ranked by a reward, sampled in rounds and used once (Eq. 7)."""

    def __init__(self, given: Given):
        self.given, self.cfg, self.chain = given, given.cfg, given.chain
        if given.reward is None:
            raise ConfigError(
                "the method has no reward, by which its SOURCE OnlinePairs ranks samples; name a metric as reward."
            )
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
        target, reference = (reverse_side(self.chain, here[side], n) for side in ("target", "reference"))
        log = {f"reward_{side}": here[f"reward_{side}"].mean().item() for side in ("target", "reference")}
        log["ties"] = here["tied"].float().mean().item()
        return Batch(here["prompts"], target, reference, here["tied"].to(target.x.device, non_blocking=True), log)

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
            states, scores = self._member(prompts, keys, steps)
            sides.append(states)
            rewards.append(scores)
        self.reward_queries += 2 * len(prompts)
        self.round = number
        self.buffer = rank(prompts, sides, rewards)

    def _member(self, prompts: Tensor, keys: list[Key], step_keys: list[Key]) -> tuple[Tensor, Tensor]:
        """One sample per prompt: states [B, N, C, H, W] and rewards [B]. Each process samples and scores its share;
        images are dropped once they are scored."""
        given, states, scores, own = self.given, [], [], self.given.ranks.share(len(prompts))
        texts, condition = [given.prompts[i] for i in prompts[own]], given.condition.rows(prompts[own])
        with given.ranks.together():
            bound = given.micro_batch
            parts = rollouts(given.policy, given.chain, condition, keys[own], step_keys[own], micro_batch=bound)
            for start, part in zip(range(0, len(texts), bound), parts, strict=True):
                images = to_images(given.policy.decode(part.x0))
                states.append(part.states)
                scores.append(given.reward.score(images, texts[start : start + len(images)]).cpu())
        return tuple(given.ranks.whole(torch.cat(parts), len(prompts)) for parts in (states, scores))

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
