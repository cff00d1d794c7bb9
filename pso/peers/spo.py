"""SPO's training step: a second UNet as frozen model, and the sides in calls of their own.

Made again from RockeyCoss/SPO, `train_scripts/train_spo_sdxl.py`. A micro-batch of forked transitions: theta on the
target, the frozen copy on the target, theta on the reference, the frozen copy on the reference (with a graph wherever
the library makes one: the copy has no parameter that needs it), the ratio clipped to [0.9, 1.1], the loss, read once.
As its configuration has it: 2 pairs of transitions in a micro-batch, no gradient checkpointing.

Deviations, those of baselines/spo.py: the few-step sampler's kernel instead of DDIM's with eta = 1, and no guidance.
Beside them: bfloat16 instead of float16, torch's AdamW, log-probabilities in float32, sampling and its preference model
are outside of this step.
"""

import copy

import torch

from pso.evidence import Batch, Side
from pso.peers.script import Script, log_probability
from pso.policy import Conditioning


class Spo(Script):
    """Settings: beta, ratio_clip."""

    def __init__(self, pipeline, *more, **named):
        self.frozen = copy.deepcopy(pipeline.unet).requires_grad_(False)
        super().__init__(pipeline, *more, **named)

    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        ratio_target, ratio_reference = (self.ratio(side, text) for side in batch.sides)
        beta = self.settings.beta
        loss = -torch.log(torch.sigmoid(beta * torch.log(ratio_target) - beta * torch.log(ratio_reference))).mean()
        logged = loss.detach().item() * share
        (loss * share).backward()
        return logged

    def ratio(self, side: Side, text: Conditioning) -> torch.Tensor:
        n, x, following = side.n[:, 0], side.x[:, 0], side.answer[:, 0]
        theta = log_probability(self.schedule, n, x, self.eps(n, x, text), following)
        frozen = log_probability(self.schedule, n, x, self.eps(n, x, text, self.frozen), following)
        found, clip = torch.exp(theta - frozen), self.settings.ratio_clip
        return found if clip is None else torch.clamp(found, 1 - clip, 1 + clip)
