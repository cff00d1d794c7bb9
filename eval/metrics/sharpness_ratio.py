"""Sharpness against the untuned model's picture of the same prompt and noise, both at native resolution: 1 where
nothing was tuned, below 1 blurred.

Rounding to whole grey levels alone gives a smooth picture a Laplacian with the variance (4^2 + 4) / 12, of 1/12 for
each pixel. Less counts as that, so that a flat picture has a ratio: 1 against a flat one.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.sharpness import variance

ROUNDING = 20 / 12  # grey levels squared


class SharpnessRatio:
    spec = {"output": "variance of the Laplacian over the untuned picture's", "least_variance": round(ROUNDING, 4)}

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """[B]; the prompts do not matter. Of several others the mean variance counts."""
        for image, row in zip(images, others, strict=True):
            if sizes := {other.size for other in row} - {image.size}:
                raise ValueError(f"a picture of {image.size} px cannot be compared with one of {sizes.pop()} px")
        mine = torch.stack([variance(image) for image in images])
        untuned = torch.stack([torch.stack([variance(other) for other in row]).mean() for row in others])
        return mine.clamp(min=ROUNDING) / untuned.clamp(min=ROUNDING)


def load(files: dict[str, Path], device) -> SharpnessRatio:
    return SharpnessRatio()
