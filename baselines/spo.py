"""SPO, Step-aware Preference Optimization (Liang et al. 2024, arXiv 2406.04314).

    L = -E log sigma( beta log rho_n(target) - beta log rho_n(reference) )
    rho_n = clamp( p_theta(x_{n-1} | x_n) / p_pre(x_{n-1} | x_n), 1 - ratio_clip, 1 + ratio_clip )

Each transition is a term of its own (the sum stands outside the sigmoid), log-probabilities are means over
latent elements. Target and reference are the best and the worst candidate of a fork, by a step-aware
preference model (baselines/preference_model.py): their first transition leaves the same x_n, further ones
(`inner_steps` > 0) do not. With inner_steps = N - 2 it is D3PO on pairs that share x_N.

Deviations: every stochastic transition is forked (the authors skip the first fifth of 20) and the kernel is the
sampler's own instead of DDIM's with eta = 1. On the few-step samplers, onto which the paper at hand moves it,
guidance is off. log(clamp) is computed as clamp(log), which also keeps its gradient outside at 0.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from pso.entries import Strict
from pso.evidence import Batch, Evidence, clip_ratio, log_sigmoid_loss

SOURCE = "pso.stepwise:StepwisePairs"
NEEDS_PRE = True


class Config(Strict):
    beta: PositiveFloat
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] | None
    candidates: Annotated[int, Field(ge=2, le=4)] = 2  # per fork
    inner_steps: Annotated[int, Field(ge=0)] = 0  # further transitions before the candidates are scored
    threshold: Annotated[float, Field(ge=0, lt=1)]  # of p_best - p_worst, above which a fork is kept
    prompts_per_round: PositiveInt  # sampled, forked, then trained on once
    reduction: Literal["mean", "sum"] = "mean"


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios [B, 1], one transition each -> (scalar, log)."""
    ratio_target_BS, cut_target = clip_ratio(target.ratio, cfg.ratio_clip)
    ratio_reference_BS, cut_reference = clip_ratio(reference.ratio, cfg.ratio_clip)
    margin_BS = ratio_target_BS - ratio_reference_BS
    clip_fraction = torch.cat([cut_target, cut_reference]).float().mean()
    return log_sigmoid_loss(margin_BS, cfg.beta, "per_step_mean"), {"clip_fraction": clip_fraction}
