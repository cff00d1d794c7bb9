"""Drift: how far tuning moved a picture, 1 - cosine of DINO class tokens with the untuned model's of the same prompt
and noise. 0 where nothing was tuned; it has no best value, and is read beside what the row gained."""

from pathlib import Path

from eval.compared import mean_distance
from eval.metrics.dino import DinoScorer

OUTPUT = "1 - cosine of class tokens with the untuned model's picture of the same noise"


def load(files: dict[str, Path], device) -> DinoScorer:
    """Scores in 0..2."""
    return DinoScorer(files["model"], device, OUTPUT, mean_distance)
