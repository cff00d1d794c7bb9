"""Drift: how far tuning moved a picture, 1 - cosine of DINO class tokens with the untuned model's of the same prompt
and noise. 0 where nothing was tuned; it has no best value, and is read beside what the row gained."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from eval.compared import mean_distance
from eval.metrics.dino import DinoScorer


class Drift(DinoScorer):
    output = "1 - cosine of class tokens with the untuned model's picture of the same noise"

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """[B] in 0..2; the prompts do not matter."""
        return mean_distance(self.features, images, others)


def load(files: dict[str, Path], device) -> Drift:
    return Drift(files["model"], device)
