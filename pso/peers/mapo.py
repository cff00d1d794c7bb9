"""MaPO's training step with LoRA: no frozen model.

Made again from mapo-t2i/mapo, `train_with_lora.py` and `utils.py`. A micro-batch of pairs: the pictures through the VAE
(in float32, 8 at a time), the captions through both text encoders, one time and one noise for each pair, one batched
call of theta, the loss, six numbers read for the log. As its README has it: 8 pairs in a micro-batch, gradient
checkpointing.

Deviations: bfloat16 instead of float16; torch's AdamW instead of the 8-bit one; the times are drawn by the caller, so
that ours gets the same; size and crop are those of the sampler; captions are encoded by the pipeline's own method.
s d / (exp(s d) - 1) is left as it stands there, 0 / 0 at d = 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pso.evidence import Batch
from pso.peers.script import Script
from pso.policy import Conditioning


class Mapo(Script):
    """Settings: beta, margin_scale, snr."""

    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        n, x, noise = (torch.cat([getattr(side, k)[:, 0] for side in batch.sides]) for k in ("n", "x", "answer"))
        predicted = self.eps(n, x, text.followed_by(text))
        target, reference = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)).chunk(2)
        better, worse = self.score(target), self.score(reference)
        odds = F.logsigmoid(self.settings.margin_scale * (better - worse))
        loss = target.mean() - self.settings.beta * odds.mean()
        (loss * share).backward()
        told = (loss, better.mean(), worse.mean(), -odds.mean(), target.mean(), reference.mean())
        logged = [value.detach().item() for value in told]
        return logged[0] * share

    def score(self, d: Tensor) -> Tensor:
        s = self.settings.snr
        return s * d / (torch.exp(s * d) - 1)
