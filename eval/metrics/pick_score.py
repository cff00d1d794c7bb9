"""PickScore (Kirstain et al. 2023): cosine of a CLIP ViT-H tuned on Pick-a-Pic; the paper prints it x 100."""

from pathlib import Path

from eval.clip_model import ClipScorer, load_clip


def load(files: dict[str, Path], device) -> ClipScorer:
    return ClipScorer(
        load_clip(files["model"], "gelu", device), files["processor"], "clip_pil224", {"output": "cosine"}
    )
