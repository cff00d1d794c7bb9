"""Diversity: how much the pictures of one prompt differ, mean of 1 - cosine of DINO class tokens with its others.

Preference tuning may draw one picture for every noise. A picture's own mean, so that a prompt's mean over its
pictures is that over all their pairs; at least two noises for each prompt.
"""

from pathlib import Path

from PIL import Image
from torch import Tensor

from eval.compared import mean_distance
from eval.metrics.dino import DinoScorer


class Diversity(DinoScorer):
    output = "mean of 1 - cosine of class tokens with the other pictures of the prompt"

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """[B] in 0..2; the prompts do not matter."""
        return mean_distance(self.features, images, others)


def load(files: dict[str, Path], device) -> Diversity:
    return Diversity(files["model"], device)
