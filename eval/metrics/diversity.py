"""Diversity: how much the pictures of one prompt differ, mean of 1 - cosine of DINO class tokens with its others.

Preference tuning may draw one picture for every noise. A picture's own mean, so that a prompt's mean over its
pictures is that over all their pairs; at least two noises for each prompt.
"""

from pathlib import Path

from eval.compared import mean_distance
from eval.metrics.dino import DinoScorer

OUTPUT = "mean of 1 - cosine of class tokens with the other pictures of the prompt"


def load(files: dict[str, Path], device) -> DinoScorer:
    """Scores in 0..2."""
    return DinoScorer(files["model"], device, OUTPUT, mean_distance)
