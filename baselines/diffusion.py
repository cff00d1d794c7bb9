"""The naive diffusion fine-tune (Figure 1b): the loss that a diffusion model is trained with.

    L = E |eps - eps_theta(x_t)|^2,   x_t = target image noised to t

No reference, no pre. Also called supervised fine-tuning (SFT); Diffusion-DPO's code replaces one caption in
five by the empty one (`caption_dropout`). `times: uniform` draws t from 0..999 as the paper's figure does;
`sampler_grid` draws it from the times at which the few-step sampler calls the network.
Its optimum is the conditional mean, which a few-step sampler shows as blur.
"""

from torch import Tensor

from pso.entries import DenoisingConfig
from pso.evidence import Batch, Evidence

SOURCE = "Targets"
NEEDS_PRE = False


class Config(DenoisingConfig):
    """Nothing more: the loss has no setting of its own."""


def loss(target: Evidence, reference: None, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence raw = -|eps - eps_theta|^2 [B, 1] -> (scalar, log)."""
    return -target.raw.mean(), {}
