"""MaPO (Hong et al. 2024, arXiv 2406.06424), from the authors' code: no reference model, so pre never runs.

    L = E d(target) - beta E log sigma( T (f(d(target)) - f(d(reference))) )
    f(d) = s d / (exp(s d) - 1),   d = |eps - eps_theta(x_t)|^2;  one t and one eps per pair

f falls from f(0) = 1 with slope -s/2, so at equal errors the gradient is 13.5 on d(target) and -12.5 on
d(reference) with their beta = 0.1, T = 1000, s = 0.5. Nothing is subtracted from d: the logit, about
250 (d(reference) - d(target)), is ruled by which image is the harder one, and raising d(reference) pays without end.

Deviations: LoRA and AdamW with Offline-PSO's budget instead of 128 pairs, 2000 steps and weight decay 1e-2; no flips,
because latents are cached; size and crop as the few-step sampler is called. d is always the mean over latent
elements, because s and T are in its unit; T is a scale, not the number of steps. f(0) is the limit, theirs is 0/0.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from pso.entries import Strict
from pso.evidence import Batch, Evidence

SOURCE = "PreferencePairs"
NEEDS_PRE = False


class Config(Strict):
    beta: PositiveFloat
    margin_scale: PositiveFloat  # T
    snr: PositiveFloat  # s, the name in their code
    times: Literal["uniform", "sampler_grid"]


def f(d: Tensor, s: float) -> Tensor:
    """s d / (exp(s d) - 1), for d >= 0."""
    x = s * d
    # Bernoulli's series near 0, where autograd subtracts two numbers of size 1/x; its error is below 1e-8.
    near = x < 0.05
    series = 1 - x / 2 + x**2 / 12
    x = torch.where(near, torch.ones_like(x), x)  # no 0/0, whose gradient is NaN even where it is not taken
    return torch.where(near, series, -x * (-x).exp() / torch.expm1(-x))  # with exp(-x), which cannot overflow


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence raw = -d [B, 1] -> (scalar, log)."""
    d_target, d_reference = -target.raw, -reference.raw
    logit = cfg.margin_scale * (f(d_target, cfg.snr) - f(d_reference, cfg.snr))
    log = {"error_reference": d_reference.mean(), "open_gates": torch.sigmoid(-logit).mean()}
    return d_target.mean() - cfg.beta * F.logsigmoid(logit).mean(), log
