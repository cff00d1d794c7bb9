"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, Eq. 14) on the model that is tuned.

    L = -E log sigma( -beta/2 [ (d_theta - d_pre)(target) - (d_theta - d_pre)(reference) ] )
    d = |eps - eps_net(x_t)|^2,   x_t = clean latent noised to t;  one t and one eps per pair

The half is literal, d is the mean over latent elements, T and the weight of t are absorbed in beta, as in the
authors' code. With S = 1 it is pso.pso_offline at half the beta.

Deviations: pre is the distilled model itself; LoRA and AdamW with Offline-PSO's budget instead of the whole UNet
with Adafactor, 2048 pairs and lr 2.048e-5; no flips, because latents are cached (theirs, drawn for each image of a
pair on its own, only add noise). PSO's paper has no such row; it brackets Offline-PSO.
`zero_terminal_snr` is what the authors' SDXL-Turbo launcher does (the entry `published_turbo_dpo`): at t = 999 both
images of a pair are then the same eps, so one pair in four has a margin of exactly 0 and teaches nothing.
"""

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from pso.entries import DenoisingConfig
from pso.evidence import Batch, Evidence

SOURCE = "PreferencePairs"
NEEDS_PRE = True


class Config(DenoisingConfig):
    beta: PositiveFloat
    zero_terminal_snr: bool = False


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios -(d_theta - d_pre) [B, 1] -> (scalar, log)."""
    margin_B1 = target.ratio - reference.ratio
    return -F.logsigmoid(cfg.beta / 2 * margin_B1).mean(), {}
