"""Online PSO (Eq. 7, Algorithm 2): both sides by the reverse process.

    L = -E log sigma( beta sum_{n=2..N} [ lr_n(target) - lr_n(reference) ] )
    lr_n = -( |x_{n-1} - mu_theta(x_n)|^2 - |x_{n-1} - mu_pre(x_n)|^2 ) / (2 sigma_n^2)

Both trajectories are sampled from the current theta; the one with the higher reward is the target.
1/(2 sigma_n^2) stands inside the sum (the paper prints it in front, but it depends on n).
The released code differs: one sigmoid per transition (`per_step_mean`), the ratio clipped to
[0.9, 1.1] against pre (`ratio_clip`), beta 50: the entry `pso_online_released`.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from pso.entries import PreferenceConfig
from pso.evidence import Batch, Evidence, clip_ratio, log_sigmoid_loss

SOURCE = "OnlinePairs"
NEEDS_PRE = True


class Config(PreferenceConfig):
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    pairs_per_round: PositiveInt  # sampled, ranked, then trained on once
    tie_rule: Literal["second_wins", "no_grad"] = "second_wins"
    pair_shares_initial_noise: bool = False
    shared_noise_over: PositiveInt = 1  # consecutive samples with the same step noise (a quirk of the release)


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios [B, S] -> (scalar, log)."""
    ratio_target_BS, cut_target = clip_ratio(target.ratio, cfg.ratio_clip)
    ratio_reference_BS, cut_reference = clip_ratio(reference.ratio, cfg.ratio_clip)
    margin_BS = ratio_target_BS - ratio_reference_BS
    if cfg.tie_rule == "no_grad":
        margin_BS = margin_BS * ~batch.tied[:, None]
    clip_fraction = torch.cat([cut_target, cut_reference]).float().mean()
    return log_sigmoid_loss(margin_BS, cfg.beta, cfg.timestep_mode), {"clip_fraction": clip_fraction}
