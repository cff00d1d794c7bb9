"""CLIP-I of the DreamBooth protocol: cosine of pictures, mean over a subject's real ones. CLIP ViT-B/32 unless the
entry names another checkpoint: the paper names none."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from eval.clip_model import ClipScorer, load_clip
from eval.compared import mean_cosine


class ClipI(ClipScorer):
    truncated = None  # reads no prompt

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """Mean cosine [B] with the subject's real pictures; the prompts do not matter."""
        return mean_cosine(self.image_features, images, others)


def load(files: dict[str, Path], device, activation: str = "quick_gelu") -> ClipI:
    spec = {"output": "mean cosine with a subject's pictures"}
    return ClipI(load_clip(files["model"], activation, device), files["processor"], "clip_pil224", spec)
