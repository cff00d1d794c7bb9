"""Diffusion-DPO's training step with LoRA, as diffusers has it.

Made again from huggingface/diffusers, `examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py`. A
micro-batch of pairs: the pictures through the VAE (in float32, 8 at a time), the captions through both text encoders,
one time and one noise for each pair, one batched call of theta and one with the adapter switched off, the loss, four
numbers read for the log. As its README has it: 8 pairs in a micro-batch, gradient checkpointing.

Deviations: bfloat16 instead of float16; torch's AdamW instead of the 8-bit one; the times are drawn by the caller, so
that ours gets the same; size and crop are those of the sampler; caption dropout is the loader's matter; captions are
encoded by the pipeline's own method, tokenizer included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pso.evidence import Batch
from pso.peers.script import Script
from pso.policy import Conditioning


class DiffusersDpo(Script):
    """Settings: beta."""

    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        n, x, noise = (torch.cat([getattr(side, k)[:, 0] for side in batch.sides]) for k in ("n", "x", "answer"))
        both = text.followed_by(text)
        losses = self.losses(n, x, noise, both)
        target, reference = losses.chunk(2)
        with self.adapter_off():
            frozen = self.losses(n, x, noise, both)
            pre_target, pre_reference = frozen.chunk(2)
        inside = -0.5 * self.settings.beta * ((target - reference) - (pre_target - pre_reference))
        loss = -F.logsigmoid(inside).mean()
        accuracy = (inside > 0).float().mean()
        (loss * share).backward()
        logged = [value.detach().item() for value in (loss, losses.mean(), frozen.mean(), accuracy)]
        return logged[0] * share

    def losses(self, n: Tensor, x: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        return F.mse_loss(self.eps(n, x, text), noise, reduction="none").mean((1, 2, 3))
