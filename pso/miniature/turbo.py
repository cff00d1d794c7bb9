"""The stand-in SDXL-Turbo: adversarial diffusion distillation (ADD) in latent space, for 4 steps and for 1.

The student predicts clean latents from noised pictures at its sampler's four times. A critic (small heads on the
frozen teacher's features, as in ADD's successor LADD, arXiv 2403.12015; ADD's own judges pixels with DINOv2) tells
them from real ones, and the teacher's guided prediction of the noised answer pulls towards the caption (ADD, Eq. 1
and 4). A warm start on the teacher's ODE solutions, as in dmd2.py, goes before: from the bare teacher the critic wins.

Turbo's sampler shows the network x / sqrt(sigma^2 + 1), which is the variance-preserving state of the same time,
and x0_hat = x - sigma eps is the same clean latent; so everything here is written in the teacher's own units.
"""

import copy

import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from pso.entries import Config
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE
from pso.miniature.common import TURBO, Average, job, log, steps
from pso.miniature.distil import every_text, load_teacher, pictures
from pso.miniature.dmd2 import Student, Teacher, predicted, warm_start
from pso.miniature.teacher import call, noised
from pso.policy import Conditioning

SHARES = {999: 0.4, 749: 0.2, 499: 0.2, 249: 0.2}  # of the student's times; 999 alone makes the 1-step pictures
CRITIC_TIMES = (20, 500)  # at which the critic looks: above, nothing of the grain is left
DISTIL_TIMES = (20, 980)
DISTIL_WEIGHT = 2.5  # ADD's lambda
CRITIC_WARM_UP = 30  # steps before the student moves
AVERAGE_DECAY = 0.97
HEAD_WIDTH = 32


def head(width: int) -> nn.Module:
    """Logits from one block's answer. No weights in the norm: torch's CPU backward of one on a frozen input crashes."""
    norm = nn.GroupNorm(8, width, affine=False)
    return nn.Sequential(norm, nn.Conv2d(width, HEAD_WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(HEAD_WIDTH, 1, 1))


class Critic(nn.Module):
    """Logits [B, K]: is a latent real, as seen in every block of the frozen teacher that reads its caption."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet, self.seen = [unet], []  # in a list: the teacher's weights are not the critic's
        widths = unet.config.block_out_channels
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
            block.register_forward_hook(self._note)
        self.heads = nn.ModuleList(head(width) for width in (*widths, widths[-1], *reversed(widths)))

    def _note(self, block, given, answer) -> None:
        self.seen.append(answer[0] if isinstance(answer, tuple) else answer)

    def forward(self, x0: Tensor, times: Tensor, noise: Tensor, condition: Conditioning, alphas: Tensor) -> Tensor:
        self.seen.clear()
        call(self.unet[0], noised(x0, noise, times, alphas), times, condition)
        logits = [judge(seen).flatten(1) for judge, seen in zip(self.heads, self.seen, strict=True)]
        self.seen.clear()
        return torch.cat(logits, 1)


class Duel:
    """One student against one critic on pictures with captions."""

    def __init__(self, student: Student, teacher: Teacher, latents: Tensor, rows: Tensor):
        self.student, self.teacher, self.latents, self.rows = student, teacher, latents, rows
        self.critic, self.rng = Critic(teacher.unet), student.rng
        self.times, self.shares = torch.tensor(list(SHARES)), torch.tensor(list(SHARES.values()))

    def answers(self, count: int) -> tuple[Tensor, Conditioning, Tensor]:
        """The student's clean latents, their condition, and as many real ones of the same captions."""
        index = torch.randint(len(self.latents), (count,), generator=self.rng)
        times = self.times[torch.multinomial(self.shares, count, True, generator=self.rng)]
        real, condition = self.latents[index], self.student.condition.rows(self.rows[index])
        x = noised(real, torch.randn(real.shape, generator=self.rng), times, self.teacher.alphas)
        eps = call(self.student.unet, x, times, condition)
        return predicted(x, times, eps, self.teacher.alphas), condition, real

    def judged(self, x0: Tensor, condition: Conditioning) -> Tensor:
        times = torch.randint(*CRITIC_TIMES, (len(x0),), generator=self.rng)
        noise = torch.randn(x0.shape, generator=self.rng)
        return self.critic(x0, times, noise, condition, self.teacher.alphas)

    def critic_loss(self, count: int) -> Tensor:
        """Hinge."""
        with torch.no_grad():
            fake, condition, real = self.answers(count)
        return F.relu(1 + self.judged(fake, condition)).mean() + F.relu(1 - self.judged(real, condition)).mean()

    def student_loss(self, count: int) -> Tensor:
        fake, condition, _ = self.answers(count)
        times = torch.randint(*DISTIL_TIMES, (count,), generator=self.rng)
        x = noised(fake.detach(), torch.randn(fake.shape, generator=self.rng), times, self.teacher.alphas)
        weight = self.teacher.alphas[times].sqrt().view(-1, 1, 1, 1)  # ADD's "exponential" weighting c(t) = alpha_t
        distance = (weight * (fake - self.teacher.x0(x, times, condition)) ** 2).mean()
        return DISTIL_WEIGHT * distance - self.judged(fake, condition).mean()


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    fit, seed = standin.turbo, standin.seed + 90
    policy = load_teacher(hub)
    torch.manual_seed(seed)  # the critic's heads
    teacher, rng = Teacher(policy.unet, fit.guidance_scale), torch.Generator().manual_seed(seed)
    generator = copy.deepcopy(policy.unet).requires_grad_(True).train()
    student = Student(generator, every_text(policy), rng, policy.latent_shape)
    latents, rows = pictures(policy, fit.num_solutions, seed)
    warm_start(student, teacher, latents, rows, fit.warm_start, "turbo", SHARES)
    duel = Duel(student, teacher, latents, rows)
    learn = critic_learner(duel, fit.critic_learning_rate, fit.batch_size)
    for _ in range(CRITIC_WARM_UP):
        learn()
    parameters = list(generator.parameters())
    average = Average(parameters, AVERAGE_DECAY)
    for _, descend in steps("turbo", parameters, fit, betas=(0.0, 0.99), hold=0.5):
        learn()
        descend(duel.student_loss(fit.batch_size))
        average.update()
    average.apply()
    scheduler = EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="trailing")
    policy.pipeline.register_modules(unet=generator.eval(), scheduler=scheduler)
    policy.pipeline.save_pretrained(hub.root / TURBO)
    log.info("saved %s", TURBO)
    return {}


def critic_learner(duel: Duel, learning_rate: float, batch_size: int):
    """learn(): one step of the critic."""
    optimizer = torch.optim.AdamW(duel.critic.parameters(), lr=learning_rate, betas=(0.0, 0.99), weight_decay=1e-3)

    def learn() -> None:
        optimizer.zero_grad()
        duel.critic_loss(batch_size).backward()
        optimizer.step()

    return learn


if __name__ == "__main__":
    job("turbo", train)
