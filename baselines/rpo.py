"""Diffusion-RPO (Gu et al. 2024, arXiv 2406.06382): a RECONSTRUCTION, and its rows must say so.

Of the paper only the introduction and summaries could be read and its repository holds no code. The algebra is that
of the parent method's code (Relative Preference Optimization for language models, Yin et al. 2024): the target of
pair i is compared with the reference of every pair j, weighted by how near the two are.

    L    = mean_ij -log sigma( W_ij beta/2 [ u_i(target) - u_j(reference) ] ),   u = -(d_theta - d_pre)
    W_i. = softmax_j( -D_ij / tau ),   d = |eps - eps_net(x_t)|^2
    D_ij = 1 - cos(T_i, T_j)  `text`     1 - cos(I_i target, I_j reference)  `image`     their mean  `multi`

T, I: CLIP embeddings of caption and picture. W stands inside the sigmoid, as in the parent's code. A group of one
pair is Diffusion-DPO; tau to infinity gives W = 1/B.

Reconstructed, so open: D, tau, beta, the group, and that all pairs of a group share one t, because errors at
different t differ by an order of magnitude. Groups are consecutive pairs of the common order, seldom of related
captions. Deviations from a multi-step recipe: those of baselines.diffusion_dpo.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from pso.entries import DenoisingConfig
from pso.evidence import Batch, Evidence

SOURCE = "ContrastPairs"
NEEDS_PRE = True


class Config(DenoisingConfig):
    beta: PositiveFloat
    distance: Literal["text", "image", "multi"]
    temperature: PositiveFloat  # tau
    group_size: PositiveInt  # pairs that are compared with each other; it divides the batch


def weights(embeddings: dict[str, Tensor], cfg: Config) -> Tensor:
    """W [G, B, B] of G groups of B pairs, from unit vectors."""
    text, target, reference = (
        embeddings[k].unflatten(0, (-1, cfg.group_size)) for k in ("text", "target", "reference")
    )
    of_texts, of_images = 1 - text @ text.mT, 1 - target @ reference.mT
    distance = {"text": of_texts, "image": of_images, "multi": (of_texts + of_images) / 2}[cfg.distance]
    return torch.softmax(-distance / cfg.temperature, dim=-1)


def loss(target: Evidence, reference: Evidence, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence ratios u [G * B, 1] and the batch's embeddings [G * B, D] -> (scalar, log)."""
    margin_GBB = target.ratio.view(-1, cfg.group_size, 1) - reference.ratio.view(-1, 1, cfg.group_size)
    weight_GBB = weights(batch.embeddings, cfg)
    value = -F.logsigmoid(weight_GBB * cfg.beta / 2 * margin_GBB).mean()
    return value, {"own_weight": weight_GBB.diagonal(dim1=-2, dim2=-1).mean()}
