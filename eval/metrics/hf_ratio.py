"""High-frequency ratio at native resolution: share of the luminance's spectral power above 0.25 cycles per px."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.sharpness import luminance

ABOVE = 0.25  # cycles per px


class HighFrequencyRatio:
    spec = {"output": f"share of power above {ABOVE} cycles/px, Hann window"}

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """[B]; the prompts do not matter."""
        return torch.stack([self._ratio(luminance(image)) for image in images])

    @staticmethod
    def _ratio(level: Tensor) -> Tensor:
        height, width = level.shape
        window = torch.hann_window(height)[:, None] * torch.hann_window(width)[None]
        power = torch.fft.fft2((level - level.mean()) * window).abs() ** 2
        frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
        return power[frequency > ABOVE].sum() / power.sum().clamp(min=1e-12)


def load(files: dict[str, Path], device) -> HighFrequencyRatio:
    return HighFrequencyRatio()
