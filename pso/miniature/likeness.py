"""The stand-ins that judge likeness to a subject: a third small CLIPModel, and a DINO-type ViTModel.

The CLIP learns from captions as its two elder ones do. The ViT sees no caption: two pictures of one thing, drawn with
chance colours and patterns, belong together and all others apart, so it can tell things that no word names. Both are
measured on the subjects, which neither has seen.
"""

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import CLIPModel, ViTConfig, ViTModel

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import subjects, world
from pso.miniature.clip import VISION, image_features, noisy, train_one
from pso.miniature.common import job, log, pixels, steps

CLIP_B = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"
LAYER_NORM_EPS = 1e-6  # in training; the config that is saved says 1e-12, as the real one's does
TEMPERATURE = 0.1
PLAIN = 0.3  # share of things in one colour
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def dino_input(x: Tensor) -> Tensor:
    """[-1, 1] pixels -> DINO's input: 256 / 224 of the size, centre crop, ImageNet's mean and std."""
    size = x.shape[-1]
    grown = F.interpolate(x, (size * 256 // 224,) * 2, mode="bicubic", align_corners=False, antialias=True)
    margin = (grown.shape[-1] - size) // 2
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((grown[..., margin : margin + size, margin : margin + size] + 1) / 2 - mean) / std


def dino_features(model: ViTModel, x: Tensor) -> Tensor:
    """Unit class tokens [B, D]."""
    return F.normalize(model(pixel_values=dino_input(x)).last_hidden_state[:, 0], dim=-1)


def chance_thing(rng: np.random.Generator) -> subjects.Thing:
    first, second = rng.uniform(0, 255, (2, 3))
    second = first if rng.random() < PLAIN else second
    shape, pattern = str(rng.choice(world.SHAPES)), str(rng.choice(subjects.PATTERNS))
    return subjects.Thing(shape, pattern, tuple(first), tuple(second))


def views(count: int, rng: np.random.Generator) -> Tensor:
    """Two pictures of each of `count` things, [2, count, 3, 32, 32]."""
    backgrounds, positions = list(world.BACKGROUNDS.values()), list(world.POSITIONS.values())
    things = [chance_thing(rng) for _ in range(count)]
    shown = [
        subjects.render(thing, backgrounds[rng.integers(len(backgrounds))], float(rng.choice(positions)), rng)
        for _, thing in product(range(2), things)
    ]
    return pixels(np.stack(shown)).unflatten(0, (2, count))


def train_dino(config: Config, hub: Hub, seed: int) -> ViTModel:
    """Instance contrast: each thing's two pictures find each other among all of the batch."""
    fit = config.scale_entry.standin.likeness.dino
    torch.manual_seed(seed)
    noise, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    model = ViTModel(
        ViTConfig(**VISION, image_size=world.RESOLUTION, layer_norm_eps=LAYER_NORM_EPS), add_pooling_layer=False
    )
    for _, descend in steps(f"dino {DINO}", list(model.parameters()), fit, betas=(0.9, 0.98), weight_decay=0.01):
        x = views(fit.batch_size, rng).flatten(0, 1)
        one, other = dino_features(model, noisy(x, noise)).chunk(2)
        logits, match = one @ other.T / TEMPERATURE, torch.arange(fit.batch_size)
        descend((F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2)
    model.eval().config.layer_norm_eps = 1e-12
    model.save_pretrained(hub.root / DINO)
    return model


def train_clip(config: Config, hub: Hub, seed: int) -> float:
    """clip.py's training with a budget of its own; zero-shot accuracy."""
    scale = config.scale_entry
    own = scale.standin.model_copy(update={"clip": scale.standin.likeness.clip})
    budget = config.model_copy(update={"scale_entry": scale.model_copy(update={"standin": own})})
    return train_one(budget, CLIP_B, "quick_gelu", seed, hub)


@torch.no_grad()
def likeness(features) -> dict[str, float]:
    """Mean cosine of two pictures of one subject, and of two subjects."""
    shown = {name: subjects.pictures(thing, 12, seed=0) for name, thing in subjects.SUBJECTS.items()}
    found = torch.stack([features(pixels(np.stack(pictures))) for pictures in shown.values()])  # [S, K, D]
    cosine = torch.einsum("akd,bld->akbl", found, found)
    same_subject = torch.eye(len(shown), dtype=torch.bool)[:, None, :, None].expand_as(cosine)
    same_picture = same_subject & torch.eye(cosine.shape[1], dtype=torch.bool)[None, :, None, :]
    same, other = cosine[same_subject & ~same_picture].mean(), cosine[~same_subject].mean()
    return {"same_subject": round(float(same), 3), "other_subject": round(float(other), 3)}


def train(config: Config, hub: Hub) -> dict:
    transformers.utils.logging.disable_progress_bar()
    seed = config.scale_entry.standin.seed
    accuracy = train_clip(config, hub, seed + 70)
    clip = CLIPModel.from_pretrained(hub.root / CLIP_B, local_files_only=True).eval()
    dino = train_dino(config, hub, seed + 80)
    found = {
        CLIP_B: likeness(lambda x: image_features(clip, x)),
        DINO: likeness(lambda x: dino_features(dino, x)),
    }
    for repo, cosine in found.items():
        log.info("%s: cosine %s", repo, ", ".join(f"{k} {v}" for k, v in cosine.items()))
    return {"zero_shot_accuracy": {CLIP_B: accuracy}, "likeness": found}


if __name__ == "__main__":
    job("likeness", train)
