"""What one side of a batch says about theta: log-likelihood evidence per transition.

A side is B samples x S transitions. Its evidence comes from one of two processes:

reverse   a transition (x_n, x_{n-1}) that the sampler took. Its log-ratio is that of two Gaussians
          with the same std, exact:  log p_theta/p_pre = -(|a - mu_theta|^2 - |a - mu_pre|^2) / 2 std^2,
          a = x_{n-1}  (Eq. 7; the printed 1/(2 sigma^2) in front of the sum belongs inside it).
forward   a clean latent noised to x_n:  log p_theta/p_pre = -omega (|eps - eps_theta|^2 - |eps - eps_pre|^2)
          (Eq. 5, 6).

They are one object in two units: with eps* the noise that would put the mean exactly on a,
lr_reverse = kappa (|eps* - eps_pre|^2 - |eps* - eps_theta|^2). All values are float32 [B, S], never
reduced over transitions; over latent elements by `reduction` (mean: the authors' code, and the only
reading under which the paper's betas work; sum: the paper's notation. sum with beta = mean with D beta).
A deterministic sampler has no kernel: of it only the forward process with `omega: one` can be measured, and
whatever needs mean, std or kappa raises `NoKernel`.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pso.entries import EvidenceConfig
from pso.mdp import Ancestral, Chain, Renoise


@dataclass(frozen=True)
class Side:
    """B samples x S transitions, before the network has seen them.

    n [B, S] CPU LongTensor; x = x_n and answer, both [B, S, C, H, W]: the noise eps that made x_n
    (forward) or the next state x_{n-1} (reverse). keys [B, S] CPU LongTensor: a number for all that pre's error is a
    function of, beside the model and the data (pso/memo.py); of sources that know it.
    """

    process: str  # "forward" or "reverse"
    n: Tensor
    x: Tensor
    answer: Tensor
    keys: Tensor | None = None

    def rows(self, index) -> "Side":
        keys = None if self.keys is None else self.keys[index]
        return Side(self.process, self.n[index], self.x[index], self.answer[index], keys)


@dataclass(frozen=True)
class Batch:
    """What a source hands over for one update: B samples with one or two sides.

    prompts [B] CPU LongTensor, rows of the source's conditioning; tied [B] bool, pairs whose two
    rewards were equal; log, plain numbers about the batch; embeddings, unit vectors [B, D] of the captions (text) and
    of both sides' pictures (target, reference), where the source has them.
    """

    prompts: Tensor
    target: Side
    reference: Side | None = None
    tied: Tensor | None = None
    log: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, Tensor] | None = None

    @property
    def sides(self) -> list[Side]:
        return [self.target] if self.reference is None else [self.target, self.reference]


@dataclass(frozen=True)
class Evidence:
    """Float32 [B, S] each; None where the method does not ask for the column.

    ratio  log p_theta / p_pre           raw  log p_theta (forward: -|eps - eps_theta|^2, no constants)
    kl     KL(p_theta | p_pre) of the kernel at x_n, never with a gradient
    """

    ratio: Tensor | None = None
    raw: Tensor | None = None
    kl: Tensor | None = None


def reduce(values: Tensor, reduction: str) -> Tensor:
    """[B, S, C, H, W] -> [B, S]."""
    return values.mean((-3, -2, -1)) if reduction == "mean" else values.sum((-3, -2, -1))


def reverse_ratio(chain: Chain, side: Side, eps_theta: Tensor, eps_pre: Tensor, reduction: str) -> Tensor:
    """log p_theta(a | x_n) - log p_pre(a | x_n) [B, S]."""
    # -[(a - mu_theta)^2 - (a - mu_pre)^2] = change (2 (a - mu_pre) - change), from the difference of the
    # means: two nearly equal log-probabilities subtracted in float32 would leave noise
    change = chain.mean_per_eps(side.n, side.x) * (eps_theta - eps_pre)  # mu_theta - mu_pre
    squares = change * (2 * (side.answer - chain.mean(side.n, side.x, eps_pre)) - change)
    return reduce(squares / (2 * chain.std(side.n, side.x) ** 2), reduction)


def forward_ratio(chain: Chain, side: Side, eps_theta: Tensor, eps_pre: Tensor, cfg: EvidenceConfig) -> Tensor:
    """-omega (|eps - eps_theta|^2 - |eps - eps_pre|^2) [B, S], with the couplings of `EvidenceConfig`."""
    change = eps_theta - eps_pre
    errors = -change * (2 * side.answer - eps_theta - eps_pre)  # |eps-eps_theta|^2 - |eps-eps_pre|^2
    if cfg.omega == "kl" or cfg.forward_coupling != "paper":
        errors = chain.kappa(side.n, side.x) * errors
    # A cross term that Eq. 11 drops, where forward states and kernel differ in kind: with the Markov
    # forward chain of Eq. 2, x_{n-1} is correlated with x_n but Renoise noises anew; with forward states
    # noised independently it is not, but Ancestral's kernel is the posterior given x_n.
    if cfg.forward_coupling == "exact_markov" and isinstance(chain, Renoise):
        errors = errors + side.answer * change
    elif cfg.forward_coupling == "exact_independent" and isinstance(chain, Ancestral):
        errors = errors - side.answer * change
    return reduce(-errors, cfg.reduction)


def raw(chain: Chain, side: Side, eps_theta: Tensor, reduction: str) -> Tensor:
    """log p_theta(a | x_n) (reverse) or -|eps - eps_theta|^2 (forward) [B, S]."""
    if side.process == "forward":
        return -reduce((side.answer - eps_theta) ** 2, reduction)
    std = chain.std(side.n, side.x)
    squares = (side.answer - chain.mean(side.n, side.x, eps_theta)) ** 2 / (2 * std**2)
    return -reduce(squares + std.log() + 0.5 * math.log(2 * math.pi), reduction)


def kl(chain: Chain, n: Tensor, x: Tensor, eps_theta: Tensor, eps_pre: Tensor, reduction: str) -> Tensor:
    """KL(p_theta | p_pre) = kappa |eps_theta - eps_pre|^2, exact [B, S]."""
    return reduce(chain.kappa(n, x) * (eps_theta - eps_pre) ** 2, reduction)


def gather(chain: Chain, side: Side, eps_theta: Tensor, eps_pre: Tensor | None, cfg: EvidenceConfig) -> Evidence:
    """The columns that can be had: without eps_pre only `raw`."""
    if eps_pre is None:
        return Evidence(raw=raw(chain, side, eps_theta, cfg.reduction))
    divergence = None  # the last transition has none, nor has any of a deterministic sampler
    if chain.stochastic and bool((side.n > 1).all()):
        with torch.no_grad():
            divergence = kl(chain, side.n, side.x, eps_theta.detach(), eps_pre, cfg.reduction)
    if side.process == "reverse":
        ratio = reverse_ratio(chain, side, eps_theta, eps_pre, cfg.reduction)
    else:
        ratio = forward_ratio(chain, side, eps_theta, eps_pre, cfg)
    return Evidence(ratio=ratio, kl=divergence)


def squared_error(side: Side, eps: Tensor) -> Tensor:
    """|eps - eps_hat|^2 of the forward process, summed over latent elements in float64 [B, S]."""
    return ((side.answer.double() - eps.double()) ** 2).sum((-3, -2, -1))


def gather_remembered(side: Side, eps_theta: Tensor, pre_error: Tensor, cfg: EvidenceConfig) -> Evidence:
    """The ratio by `squared_error` of pre instead of its prediction; there is no KL then.

    Two nearly equal numbers are subtracted, which float64 bears: the difference is right to 1e-15 of the error.
    """
    gained = pre_error - squared_error(side, eps_theta)
    if cfg.reduction == "mean":
        gained = gained / math.prod(side.answer.shape[-3:])
    return Evidence(ratio=gained.to(eps_theta.dtype))


def log_sigmoid_loss(margin_BS: Tensor, beta: float, timestep_mode: str) -> Tensor:
    """-log sigma(beta * margin), one number.

    trajectory_sum: the sum over transitions stands inside the sigmoid (Eq. 5 to 7).
    per_step_mean: one sigmoid per transition, then the mean (the authors' code).
    sample_one: the source drew one transition per sample, S = 1.
    """
    if timestep_mode == "trajectory_sum":
        margin_BS = margin_BS.sum(1, keepdim=True)
    return -torch.nn.functional.logsigmoid(beta * margin_BS).mean()


def clip_ratio(ratio_BS: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """log clamp(p_theta/p_pre, 1 - clip, 1 + clip), and which entries were cut off (bool)."""
    if clip is None:
        return ratio_BS, torch.zeros_like(ratio_BS, dtype=torch.bool)
    low, high = math.log1p(-clip), math.log1p(clip)
    return ratio_BS.clamp(low, high), (ratio_BS < low) | (ratio_BS > high)
