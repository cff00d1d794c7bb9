"""Offline PSO (Eq. 6, Algorithm 3): both sides of a labelled pair by the forward process.

    L = -E log sigma( beta sum_{n=2..N} [ lr_n(target) - lr_n(reference) ] )
    lr_n = -( |eps - eps_theta(x_n)|^2 - |eps - eps_pre(x_n)|^2 ),   x_n = clean latent noised to t_n

It is Diffusion-DPO on the few-step grid with beta_PSO = beta_DPO / 2, the last transition dropped.
Never released by the authors. Open in the paper, so a switch here: the reduction over latent
elements (mean), whether n is summed (Eq. 6, default) or sampled, whether a pair shares its eps.
"""

from torch import Tensor

from pso.entries import PreferenceConfig
from pso.evidence import Batch, Evidence, log_sigmoid_loss

SOURCE = "PreferencePairs"
NEEDS_PRE = True


class Config(PreferenceConfig):
    pair_shares_eps: bool = True


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios [B, S] -> (scalar, log)."""
    margin_BS = target.ratio - reference.ratio
    return log_sigmoid_loss(margin_BS, cfg.beta, cfg.timestep_mode), {}
