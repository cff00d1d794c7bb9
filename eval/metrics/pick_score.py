"""PickScore (Kirstain et al. 2023): cosine of a CLIP ViT-H tuned on Pick-a-Pic; the paper prints it x 100."""

from pathlib import Path

from eval.clip_model import ClipScorer
from eval.transforms import clip_pil


def load(files: dict[str, Path], device) -> ClipScorer:
    spec = {"metric": "pick_score", "output": "cosine", "transform": "clip_pil"}
    return ClipScorer(files["model"], files["processor"], clip_pil, spec, device)
