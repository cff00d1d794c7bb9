"""What the trainings of the stand-in hub share: the command line, the optimiser loop, the record."""

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from pso.config import add_arguments, from_arguments
from pso.hub import Hub, hub_dir
from pso.paths import RESULTS
from pso.provenance import Meter, record, sentences, write_json
from pso.standin_entries import Fit

log = logging.getLogger("hub")

# The repositories that the stand-in hub holds, under their real ids.
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
VAE = "madebyollin/sdxl-vae-fp16-fix"
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICK_SCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC = ("christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth")
DMD2 = ("tianweiy/DMD2", "dmd2_sdxl_4step_unet_fp16.bin")
DMD2_LORA = ("tianweiy/DMD2", "dmd2_sdxl_4step_lora_fp16.safetensors")
LCM = "latent-consistency/lcm-sdxl"
LCM_LORA = ("latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors")
TURBO = "stabilityai/sdxl-turbo"
PICKAPIC_PAIRS = "yuvalkirstain/pickapic_v2"
PICKAPIC_PROMPTS = "yuvalkirstain/pickapic_v1_no_images"
PARTI = ("google-research/parti", "PartiPrompts.tsv")
PROMPTS_4K = ("RockeyCoss/SPO", "spo_training_and_inference/assets/prompts/4k_training_prompts.json")


def job(name: str, work: Callable[..., dict], per: str | None = None) -> None:
    """Run one step of the hub, work(config, hub), as a command; writes hub/{name}.json last.

    A step that is run once `per` model, say, takes --model, does work(config, hub, model) and writes {name}_{model}.
    """
    parser = argparse.ArgumentParser(description=f"stand-in hub: {name}")
    if per is not None:
        parser.add_argument(f"--{per}", required=True)
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    asked = [] if per is None else [getattr(args, per)]
    name = "_".join([name, *asked])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()  # a text tower out of a whole CLIP leaves the other half unused
    with sentences(f"hub {name}"):
        config, meter = from_arguments(args), Meter()
        root = hub_dir(config.scale, args.results)
        root.mkdir(parents=True, exist_ok=True)
        hub = Hub(root)
        found = work(config, hub, *asked)
        settings = {"scale": config.scale, "standin": config.scale_entry.standin.model_dump()}
        write_json(root / f"{name}.json", record(f"hub {name}", settings, hub.inputs(), meter, **found))


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [-1, 1], [B, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(done: float, warm_up: float, hold: float) -> float:
    """Share of the peak after a share of the steps: linear up, held, then a cosine down to 2 %."""
    if done < warm_up:
        return done / warm_up
    left = min(1.0, (1 - done) / (1 - hold))
    return 0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left))


def steps(
    name: str, parameters: list[Tensor], fit: Fit, betas=(0.9, 0.99), warm_up=0.05, hold=0.05, weight_decay=0.0
) -> Iterator[tuple[int, Callable[[Tensor], None]]]:
    """(step, descend) pairs: descend(loss) does backward, clipping and AdamW with a learning-rate schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / fit.num_steps, warm_up, hold)
    )
    began = printed = time.monotonic()

    def descend(loss: Tensor) -> None:
        nonlocal printed
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        now, done = time.monotonic(), step + 1
        if now - printed > 10 or done == fit.num_steps:
            printed, left = now, (now - began) / done * (fit.num_steps - done)
            log.info(
                "%s %d/%d  loss %.4f  left %d:%02d", name, done, fit.num_steps, loss.item(), *divmod(int(left), 60)
            )

    for step in range(fit.num_steps):
        yield step, descend


class Average:
    """Exponential moving average of parameters."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def apply(self) -> None:
        """Put the average in place of the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data.copy_(value)
