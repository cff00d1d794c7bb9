"""CLIP score as the paper's code computes it: LAION's ViT-H-14, cosine, open_clip's tokens.

`transform` is the HPSv2 code's, without antialias as under the paper's torchvision 0.15.2; with it, or with
open_clip's own ("openai_pil224"), the score is another one: entries of their own.
"""

from pathlib import Path

from eval.clip_model import ClipScorer, as_open_clip, load_clip


def load(files: dict[str, Path], device, transform: str = "hps_letterbox224_noaa") -> ClipScorer:
    model = load_clip(files["model"], "gelu", device)
    return ClipScorer(model, files["processor"], transform, {"output": "cosine"}, as_open_clip)
