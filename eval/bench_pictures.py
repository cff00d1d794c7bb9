"""Generation and scoring for benchmarks: batches of ours against diffusers' pipeline called for one picture at a time.

Found by its dotted path (`python -m pso.bench cpu`, `online-epoch`), because the package pso does not import this one.
Both sample with the same network, sampler and initial noise and score with the same PickScore, random weights in the
official format. In one step, which draws no noise, both must make the same pictures before anything is timed.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler
from PIL import Image
from torch import Tensor

from eval.scoring import score_pictures
from eval.seeded import build
from pso.config import load
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE, Renoise
from pso.models import load_metric
from pso.policy import Policy, to_images
from pso.provenance import UserError
from pso.rollout import INITIAL, keyed_noise, rollouts

METRIC = "pick_score"
GREY = 1  # levels that float rounding may move a pixel by
TIMES = [999, 749, 499, 249]


def reward(device: torch.device, full: bool = False):
    """PickScore with random weights; `full`: of the published size."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), only=(METRIC,), full=(METRIC,) if full else ())
        return load_metric(METRIC, load().metrics[METRIC].unpinned(), Hub(Path(folder)), device)


def ours(policy: Policy, scorer, prompts: list[str], batch: int, times: list[int] = TIMES) -> tuple[list, list[float]]:
    """Captions encoded, sampled, decoded and scored in batches."""
    scorer.text.clear()
    condition = policy.encode_prompts(prompts)
    keys = [("bench", i) for i in range(len(prompts))]
    images: list[Image.Image] = []
    for part in rollouts(policy, Renoise(times), condition, keys, micro_batch=batch):
        images += to_images(policy.decode(part.x0))
    return images, score_pictures(images, prompts, {METRIC: scorer}, batch=batch)[METRIC].tolist()


def one_by_one(policy: Policy, scorer, prompts: list[str], times: list[int] = TIMES) -> tuple[list, list[float]]:
    """diffusers' pipeline as its model cards call it, then the scorer's snippet."""
    scorer.text.clear()
    pipeline, scheduler = policy.pipeline, policy.pipeline.scheduler
    pipeline.scheduler = LCMScheduler(**SDXL_SCHEDULE)
    images, scores = [], []
    side = policy.resolution
    for i, prompt in enumerate(prompts):
        made = pipeline(
            prompt, height=side, width=side, timesteps=times, guidance_scale=0.0, latents=_start(policy, i),
            generator=torch.Generator(policy.device).manual_seed(i),
        ).images[0]  # fmt: skip
        images.append(made)
        scores.append(scorer.score([made], [prompt]).item())
    pipeline.scheduler = scheduler
    return images, scores


def _start(policy: Policy, i: int) -> Tensor:
    noise = keyed_noise([("bench", i)], INITIAL, policy.latent_shape)
    return noise.to(policy.device, policy.unet.dtype)


def difference(policy: Policy, scorer, prompts: list[str]) -> float:
    """Most grey levels between the two ways in one step; a sentence if it is more than rounding."""
    one, other = (
        np.stack([np.asarray(image, dtype=int) for image in made])
        for made, _ in (ours(policy, scorer, prompts, 64, TIMES[:1]), one_by_one(policy, scorer, prompts, TIMES[:1]))
    )
    found = int(np.abs(one - other).max())
    if found > GREY:
        raise UserError(f"pictures of the two ways differ by {found} grey levels; nothing was timed.")
    return found
