"""CLIP score as the paper's code computes it: LAION's ViT-H-14, cosine, the HPSv2 code's transform."""

from pathlib import Path

from eval.clip_model import ClipScorer
from eval.transforms import hps_letterbox


def load(files: dict[str, Path], device) -> ClipScorer:
    spec = {"metric": "clip_score", "output": "cosine", "transform": "hps_letterbox_noaa"}
    return ClipScorer(files["model"], files["processor"], hps_letterbox, spec, device)
