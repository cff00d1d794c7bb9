"""Sharpness at native resolution: variance of the Laplacian of the luminance.

The learned scorers see 224 px, where blur is nearly invisible. Higher is sharper or noisier: read it
against the untuned model's picture of the same noise, and beside hf_ratio.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.transforms import to_tensor

LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


def luminance(image: Image.Image) -> Tensor:
    """[H, W] in 0..255."""
    return 255 * (to_tensor(image) * LUMINANCE[:, None, None]).sum(0)


def variance(image: Image.Image) -> Tensor:
    """Of the Laplacian at every inner pixel, grey levels squared. ValueError of a picture that has none."""
    if min(image.size) < 3:
        raise ValueError(f"a picture of {image.width} x {image.height} px has no Laplacian; expected at least 3 x 3")
    return F.conv2d(luminance(image)[None, None], LAPLACIAN[None, None]).var(correction=0)


class Sharpness:
    spec = {"output": "variance of the Laplacian, grey levels squared"}

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """[B]; the prompts do not matter."""
        return torch.stack([variance(image) for image in images])


def load(files: dict[str, Path], device) -> Sharpness:
    return Sharpness()
