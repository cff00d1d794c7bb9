"""General PSO (Eq. 3 and 5, Algorithm 1): target by the forward, reference by the reverse process.

    L = -E log sigma( beta sum_{n=2..N} [ lr_n(target) - lr_n(reference) ] )
    lr_n(target)    = -( |eps - eps_theta(x_n)|^2 - |eps - eps_pre(x_n)|^2 ),  x_n = a given image, noised
    lr_n(reference) = -( |x_{n-1} - mu_theta(x_n)|^2 - |x_{n-1} - mu_pre(x_n)|^2 ) / (2 sigma_n^2),
                      x sampled from the current theta for the same prompt

Eq. 5 gives the target weight 1 although the reference carries kappa_n (2 to 6): `omega: kl` puts
both in the same unit. Not symmetric in target and reference. The authors' DreamBooth script is
another objective (its reference term cancels).
"""

from torch import Tensor

from pso.entries import PreferenceConfig
from pso.evidence import Batch, Evidence, log_sigmoid_loss

SOURCE = "TargetsAgainstModel"
NEEDS_PRE = True


class Config(PreferenceConfig):
    pass


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios [B, S] -> (scalar, log)."""
    margin_BS = target.ratio - reference.ratio
    return log_sigmoid_loss(margin_BS, cfg.beta, cfg.timestep_mode), {}
