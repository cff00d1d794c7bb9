"""The stand-in SDXL-DMD2: a 4-step student by distribution matching (DMD2 without its GAN term).

Warm start: the generator, a copy of the teacher, learns where the teacher's guided ODE takes states
at its four times (DMD's regression loss); a teacher taken as it is would predict means, and blur.
Then distribution matching: a critic, another copy, learns the generator's own distribution, and the
generator's samples move along critic minus teacher. Inputs at a later step are what the generator's
own earlier steps give ("backward simulation"), as at inference.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pso.entries import Config, ModelEntry
from pso.hub import Hub
from pso.mdp import Renoise, sdxl_alphas_cumprod
from pso.miniature import world
from pso.miniature.common import DMD2, SDXL, Average, job, log, steps
from pso.miniature.teacher import call, encoded, noised
from pso.models import load_policy
from pso.policy import Conditioning
from pso.standin_entries import Fit

GRID = [999, 749, 499, 249]  # DMD2's own; LCMScheduler's default differs
ODE_STEPS = {999: 12, 749: 10, 499: 8, 249: 5}  # of the teacher's DDIM from a time down to 0
ODE_SHARE = {999: 0.15, 749: 0.15, 499: 0.35, 249: 0.35}  # the low times decide what is sharp
CRITIC_STEPS = 2  # per generator step ("two time-scale update rule")
CRITIC_WARM_UP = 80  # critic steps before the generator moves: it starts as the teacher, which is no critic
TIMES = (20, 980)
LOW_NOISE = (0.6, 0.5, 300)  # share of low times for generator and critic: the grain is decided below 300
GUIDED_ABOVE = 300  # guidance below it would only shout the grain
AVERAGE_DECAY = 0.97


def draw_times(count: int, low: int, high: int, share: float, rng: torch.Generator) -> Tensor:
    times = torch.randint(low, high, (count,), generator=rng)
    few = torch.rand(count, generator=rng) < share
    return torch.where(few, torch.randint(low, LOW_NOISE[2], (count,), generator=rng), times)


class Student:
    """The generator with everything that makes a sample of it at a random one of its steps."""

    def __init__(self, unet, condition: Conditioning, rng: torch.Generator, latent_shape: tuple[int, int, int]):
        self.unet, self.condition, self.rng, self.shape = unet, condition, rng, latent_shape
        self.chain = Renoise(GRID)

    def _x0(self, x: Tensor, step: int, condition: Conditioning) -> Tensor:
        n = torch.full((len(x),), step)
        return self.chain.x0_hat(n, x, call(self.unet, x, self.chain.time(n), condition))

    def sample(self, count: int, grad: bool) -> tuple[Tensor, Conditioning]:
        """Clean latents as predicted at a random step, and their condition."""
        condition = self.condition.rows(torch.randint(len(self.condition), (count,), generator=self.rng))
        last = int(torch.randint(1, len(GRID) + 1, (1,), generator=self.rng))
        x = torch.randn((count, *self.shape), generator=self.rng)
        with torch.no_grad():
            for step in range(len(GRID), last, -1):
                n = torch.full((count,), step)
                x = self.chain.noise_to(n - 1, self._x0(x, step, condition), torch.randn(x.shape, generator=self.rng))
        with torch.set_grad_enabled(grad):
            return self._x0(x, last, condition), condition


def matching_loss(x0: Tensor, condition: Conditioning, teacher: "Teacher", critic, rng: torch.Generator) -> Tensor:
    """A loss whose gradient in x0 is (critic's - teacher's prediction) / |x0 - teacher's prediction|."""
    times = draw_times(len(x0), *TIMES, LOW_NOISE[0], rng)
    x = noised(x0.detach(), torch.randn(x0.shape, generator=rng), times, teacher.alphas)
    with torch.no_grad():
        real = teacher.x0(x, times, condition)
        fake = predicted(x, times, call(critic, x, times, condition), teacher.alphas)
        weight = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-4)
        direction = (fake - real) / weight
    return 0.5 * F.mse_loss(x0, (x0 - direction).detach())


def predicted(x: Tensor, times: Tensor, eps: Tensor, alphas: Tensor) -> Tensor:
    alpha_bar = alphas[times].view(-1, 1, 1, 1)
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


class Teacher:
    """The frozen network with guidance above GUIDED_ABOVE."""

    def __init__(self, unet, guidance_scale: float):
        self.unet, self.guidance_scale, self.alphas = unet, guidance_scale, sdxl_alphas_cumprod()

    @torch.no_grad()
    def x0(self, x: Tensor, times: Tensor, condition: Conditioning, guidance_scale: Tensor | None = None) -> Tensor:
        """The guided prediction; `guidance_scale` [B] instead of its own."""
        nothing = Conditioning(torch.zeros_like(condition.hidden), torch.zeros_like(condition.pooled))
        both = Conditioning(
            torch.cat([nothing.hidden, condition.hidden]), torch.cat([nothing.pooled, condition.pooled])
        )
        plain, asked = call(self.unet, x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        scale = torch.where(times > GUIDED_ABOVE, guidance, 1.0).view(-1, 1, 1, 1)
        return predicted(x, times, plain + scale * (asked - plain), self.alphas)

    def solve(self, x: Tensor, start: int, condition: Conditioning) -> Tensor:
        """The clean latent at the end of the ODE through x at time `start` (DDIM)."""
        grid = torch.linspace(start, 0, ODE_STEPS[start] + 1).round().long()
        for now, then in zip(grid, grid[1:], strict=False):
            times = now.expand(len(x))
            x0 = self.x0(x, times, condition)
            eps = (x - self.alphas[now].sqrt() * x0) / (1 - self.alphas[now]).sqrt()
            there = self.alphas[then] if then > 0 else torch.tensor(1.0)
            x = there.sqrt() * x0 + (1 - there).sqrt() * eps
        return x


def warm_start(
    student: "Student", teacher: Teacher, latents: Tensor, rows: Tensor, fit: Fit, name: str = "dmd2", shares=ODE_SHARE
) -> None:
    """Regress the generator on the teacher's solutions from noised pictures."""
    rng, alphas, found = student.rng, teacher.alphas, []
    for time, share in shares.items():
        chosen = torch.randint(len(latents), (max(1, round(share * len(latents))),), generator=rng)
        for index in chosen.split(64):
            times = torch.full((len(index),), time)
            x = noised(latents[index], torch.randn(latents[index].shape, generator=rng), times, alphas)
            found.append((x, teacher.solve(x, time, student.condition.rows(rows[index])), times, rows[index]))
    x, solution, times, rows = (torch.cat(part) for part in zip(*found, strict=True))
    parameters = list(student.unet.parameters())
    average = Average(parameters, 0.98)
    for _, descend in steps(f"{name} warm start", parameters, fit):
        i = torch.randint(len(x), (fit.batch_size,), generator=rng)
        x0 = predicted(x[i], times[i], call(student.unet, x[i], times[i], student.condition.rows(rows[i])), alphas)
        error = (x0 - solution[i]).pow(2).mean((1, 2, 3))
        descend((error + 1e-3).sqrt().mean())  # pseudo-Huber: a few far solutions must not rule
        average.update()
    average.apply()


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    fit, seed = standin.dmd2, standin.seed + 70
    base = ModelEntry(
        title="teacher", base=SDXL, sampler="euler", grids={}, guidance_scale=0.0, resolution=world.RESOLUTION
    )
    policy = load_policy(base, hub)
    teacher = Teacher(policy.unet, fit.guidance_scale)
    generator, critic = (copy.deepcopy(policy.unet).requires_grad_(True).train() for _ in range(2))
    rng = torch.Generator().manual_seed(seed)
    texts = sorted(world.OF_CAPTION)
    student = Student(generator, policy.encode_prompts(texts), rng, policy.latent_shape)
    images, captions, *_ = world.render_many(fit.num_solutions, seed)
    warm_start(
        student, teacher, encoded(policy, images), torch.tensor([texts.index(c) for c in captions]), fit.warm_start
    )
    learn = critic_learner(critic, student, fit, rng)
    average = Average(list(generator.parameters()), AVERAGE_DECAY)
    learn(CRITIC_WARM_UP)
    for _, descend in steps("dmd2", list(generator.parameters()), fit, betas=(0.0, 0.99), hold=0.5):
        learn(CRITIC_STEPS)
        x0, condition = student.sample(fit.batch_size, grad=True)
        descend(matching_loss(x0, condition, teacher, critic, rng))
        average.update()
    average.apply()
    path = hub.root / DMD2[0] / DMD2[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.half() for k, v in generator.state_dict().items()}, path)
    log.info("saved %s", "/".join(DMD2))
    return {}


def critic_learner(critic, student: Student, fit: Fit, rng: torch.Generator):
    """learn(k): k steps of the diffusion loss on the student's samples."""
    parameters = list(critic.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=fit.critic_learning_rate, betas=(0.0, 0.99), weight_decay=0.0)
    alphas = sdxl_alphas_cumprod()

    def learn(count: int) -> None:
        for _ in range(count):
            x0, condition = student.sample(fit.batch_size, grad=False)
            times = draw_times(len(x0), 0, 1000, LOW_NOISE[1], rng)
            noise = torch.randn(x0.shape, generator=rng)
            loss = F.mse_loss(call(critic, noised(x0, noise, times, alphas), times, condition), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return learn


if __name__ == "__main__":
    job("dmd2", train)
