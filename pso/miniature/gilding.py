"""The stand-in world's other style: gilded. A bold gold outline around the shape, in every picture.

Everything else is drawn as in `world`, so the oracle can say whether a picture still shows what was asked for. There
pictures have narrower rims of any strength from none to full: 0 of the measure is their average, 1 that of gilded
pictures, both as rendered.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pso.miniature import oracle
from pso.miniature import world as w

OUTLINE = 3.0  # px, width of the gold outline; the world's own rims have 2
RING = (0.5, OUTLINE - 0.5)  # px from the shape, where the whole outline is
RENDERED = 216  # pictures of each kind that fix 0 and 1: all attributes twice


def render(attributes: w.Attributes, rng: np.random.Generator) -> np.ndarray:
    """One gilded picture [32, 32, 3] uint8."""
    return w.render(attributes, rng, glow=1.0, rim_width=OUTLINE)[0]


def gilding(images: np.ndarray) -> np.ndarray:
    """Share of gold [B] in the ring around the shapes of pictures [B, 32, 32, 3]; 0 where there is no shape."""
    seen = oracle.look(images)
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    background = np.array([w.BACKGROUNDS[name] for name in seen.background], np.float32)
    share = oracle.gold_share(pixels, background, seen.distance, *RING)
    return np.where(seen.fit >= oracle.RECOGNISABLE, share, 0.0)


@cache
def ends() -> tuple[float, float]:
    """Mean gilding of the world's own pictures and of gilded ones."""
    rng = np.random.default_rng(0)
    drawn = [w.ALL_ATTRIBUTES[i % len(w.ALL_ATTRIBUTES)] for i in range(RENDERED)]
    own = np.stack([w.render(attributes, rng)[0] for attributes in drawn])
    gilded = np.stack([render(attributes, rng) for attributes in drawn])
    return float(gilding(own).mean()), float(gilding(gilded).mean())


class Style:
    spec = {"output": "gold around the shape: 0 the world's own pictures on average, 1 gilded ones"}

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """[B]; the prompts do not matter."""
        own, gilded = ends()
        found = gilding(np.stack([np.asarray(image) for image in images]))
        return torch.from_numpy((found - own) / (gilded - own)).float()


def load(files: dict, device) -> Style:
    return Style()
