"""The stand-in SDXL-LCM: latent consistency distillation (LCM, arXiv 2310.04378, Algorithm 1).

The student maps every state of the teacher's guided ODE to its clean end. It learns this from itself: its
answer at a time must be that of its moving average (the target) a few solver times further down, where one
step of DDIM with guidance w takes the state; at time 0 the boundary condition ties the answer to the state.
The guidance is drawn anew for each sample and told to the student as its guidance embedding, so that one
number at sampling decides it.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pso.entries import Config
from pso.hub import Hub
from pso.mdp import sdxl_alphas_cumprod
from pso.miniature.common import LCM, job, log, steps
from pso.miniature.distil import every_text, load_teacher, pictures
from pso.miniature.dmd2 import Teacher, predicted
from pso.miniature.teacher import call, noised
from pso.policy import Conditioning, Policy

EMBEDDING = 256  # time_cond_proj_dim of the real checkpoint (diffusers' scripts)
SPACING = 20  # LCM's solver has 50 times, 19, 39, .., 999; the sampler's 999, 759, 499 and 259 are among them
NUM_TIMES = 50
HUBER = 1e-3  # c of the pseudo-Huber distance, diffusers' default
TARGET_DECAY = 0.95


def new_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with a guidance embedding that says nothing yet."""
    own = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    student = UNet2DConditionModel.from_config({**own, "time_cond_proj_dim": EMBEDDING})
    missing = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    if missing != ["time_embedding.cond_proj.weight"]:
        raise ValueError(f"the student lacks {missing} of the teacher")
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def boundary(times: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out [B, 1, 1, 1] of LCMScheduler (sigma_data 0.5, timestep_scaling 10): 1 and 0 at time 0."""
    scaled = 10.0 * times.view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def consistency(unet, x: Tensor, times: Tensor, condition: Conditioning, told: Tensor, alphas: Tensor) -> Tensor:
    """The clean latent as the student sees it from x at `times`."""
    c_skip, c_out = boundary(times)
    return c_skip * x + c_out * predicted(x, times, call(unet, x, times, condition, told), alphas)


def solve(teacher: Teacher, x: Tensor, now: Tensor, then: Tensor, condition: Conditioning, guidance: Tensor) -> Tensor:
    """One DDIM step of the guided teacher between times [B]; time 0 is clean."""
    here, there = (teacher.alphas[t].view(-1, 1, 1, 1) for t in (now, then))
    there = torch.where(then.view(-1, 1, 1, 1) > 0, there, 1.0)
    x0 = teacher.x0(x, now, condition, guidance)
    return there.sqrt() * x0 + (1 - there).sqrt() * (x - here.sqrt() * x0) / (1 - here).sqrt()


def told(policy: Policy, guidance: Tensor) -> Tensor:
    """The guidance embedding as diffusers makes it at sampling: of guidance - 1."""
    return policy.pipeline.get_guidance_scale_embedding(guidance - 1, embedding_dim=EMBEDDING)


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    fit, seed = standin.lcm, standin.seed + 80
    policy = load_teacher(hub)
    teacher, alphas = Teacher(policy.unet, 1.0), sdxl_alphas_cumprod()
    student = new_student(policy.unet).train()
    target = copy.deepcopy(student).requires_grad_(False)
    every = every_text(policy)
    latents, rows = pictures(policy, fit.num_images, seed)
    rng = torch.Generator().manual_seed(seed)
    low, high = fit.guidance_scales
    parameters = list(student.parameters())
    for step, descend in steps("lcm", parameters, fit, hold=0.5):
        index = torch.randint(len(latents), (fit.batch_size,), generator=rng)
        position = torch.randint(1, NUM_TIMES + 1, (fit.batch_size,), generator=rng)
        now, then = (SPACING * k - 1 for k in (position, position - fit.num_jumps))
        then = then.clamp(min=0)
        guidance = low + (high - low) * torch.rand(fit.batch_size, generator=rng)
        condition, embedding = every.rows(rows[index]), told(policy, guidance)
        x = noised(latents[index], torch.randn(latents[index].shape, generator=rng), now, alphas)
        earlier = solve(teacher, x, now, then, condition, guidance)
        with torch.no_grad():
            wanted = consistency(target, earlier, then, condition, embedding, alphas)
        error = consistency(student, x, now, condition, embedding, alphas) - wanted
        descend(((error**2 + HUBER**2).sqrt() - HUBER).mean())
        decay = min(TARGET_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in parameters], 1 - decay)
    target.eval().save_pretrained(hub.root / LCM)
    log.info("saved %s", LCM)
    return {}


if __name__ == "__main__":
    job("lcm", train)
