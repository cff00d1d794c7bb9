"""Online PSO's training step as its authors released it, and an offline step in the same style.

Made again from ZichenMiao/Pairwise_Sample_Optimization: `train_online_pso_sdxl_dmd2.py` and its Turbo twin (online),
`personalization/train_pso_sdxl_turbo_dreambooth.py`, loss_type `pso` (offline). For each trained step of a micro-batch
of pairs: one network call of theta for each side, the same with the adapter switched off, log-probabilities, the ratio
clipped to [0.9, 1.1], a sigmoid for each step, the loss read, a backward pass. The steps are visited in an order drawn
for each pair. As released: 2 pairs in a micro-batch (DMD2) or 4 (Turbo), gradient checkpointing, LoRA in float32.

Deviations: bfloat16 instead of float16, so no loss scaling and none of its syncs; torch's AdamW instead of the 8-bit
one; `accumulate` of accelerate on one process is what is written out here, a division of the loss; log-probabilities
in float32, as the Turbo file has them and the DMD2 file has not; the sides are ordered before they come here; orders
are drawn on the CPU. The offline step was never released: the DreamBooth script's alternative loss without its prior
term and its factor 0.1, at uniform weight, on all S steps of Eq. 6, each step's call with both sides in one batch; S
graphs are held, because the sum stands inside the sigmoid. As there: pictures encoded in float32 in every step,
captions once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pso.evidence import Batch
from pso.peers.script import Script, log_probability
from pso.policy import Conditioning


class ReleasedPso(Script):
    """Settings: beta, ratio_clip, tie_rule."""

    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        pairs, steps = batch.target.n.shape
        order = torch.stack([torch.randperm(steps, generator=self.permutations) for _ in range(pairs)])
        rows, logged = torch.arange(pairs), 0.0
        for j in range(steps):
            target, reference = (
                (side.n[rows, order[:, j]], side.x[rows, order[:, j]], side.answer[rows, order[:, j]])
                for side in batch.sides
            )
            loss = self.step_loss(target, reference, text, batch.tied)
            logged += loss.item() * share / steps
            (loss * share / steps).backward()
        return logged

    def step_loss(self, target: tuple, reference: tuple, text: Conditioning, tied: Tensor | None) -> Tensor:
        """Of one transition (n, x_n, x_{n-1}) of each side."""
        eps_target, eps_reference = self.eps(*target[:2], text), self.eps(*reference[:2], text)
        with self.adapter_off():
            pre_target, pre_reference = self.eps(*target[:2], text), self.eps(*reference[:2], text)
        ratio_target = self.ratio(target, eps_target, pre_target)
        ratio_reference = self.ratio(reference, eps_reference, pre_reference)
        beta, sign = self.settings.beta, torch.ones_like(ratio_target)
        if self.settings.tie_rule == "no_grad":
            sign = sign * ~tied
        logit = beta * torch.log(ratio_target) * sign - beta * torch.log(ratio_reference) * sign
        return -torch.log(torch.sigmoid(logit)).mean()

    def ratio(self, transition: tuple, eps: Tensor, pre: Tensor) -> Tensor:
        """p_theta / p_pre, clipped."""
        n, x, following = transition
        if self.schedule.exploding:
            n = self.looked_up(n.to(x.device), x)
        theta, frozen = (log_probability(self.schedule, n, x, e, following) for e in (eps, pre))
        found = torch.exp(theta - frozen)
        clip = self.settings.ratio_clip
        return found if clip is None else torch.clamp(found, 1 - clip, 1 + clip)

    def looked_up(self, n: Tensor, x: Tensor) -> Tensor:
        """The Turbo file looks each sample's place in the schedule up on the GPU, for theta and for pre: a sync each,
        which a count on a CPU does not see."""
        grid = torch.arange(len(self.schedule.times), device=x.device)
        for _ in range(2):
            places = [(grid == one).nonzero()[0].item() for one in n]
        return torch.tensor(places)


class OfflineReleasedPso(Script):
    """Settings: beta."""

    encodes_captions = False

    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        both = text.followed_by(text)
        margin = 0.0
        for j in range(batch.target.n.shape[1]):
            n, x, noise = (torch.cat([getattr(side, k)[:, j] for side in batch.sides]) for k in ("n", "x", "answer"))
            error_target, error_reference = self.error(n, x, noise, both)
            with self.adapter_off():
                pre_target, pre_reference = self.error(n, x, noise, both)
            margin = margin + (pre_target - pre_reference) - (error_target - error_reference)
        loss = -F.logsigmoid(self.settings.beta * margin).mean()
        (loss * share).backward()
        return loss.item() * share

    def error(self, n: Tensor, x: Tensor, noise: Tensor, text: Conditioning) -> tuple[Tensor, Tensor]:
        return ((self.eps(n, x, text) - noise) ** 2).mean((1, 2, 3)).chunk(2)
