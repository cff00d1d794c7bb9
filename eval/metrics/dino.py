"""DINO of the DreamBooth protocol: DINO ViT-S/16, cosine of class tokens, mean over a subject's real pictures."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ViTModel

from eval.checkpoints import whole
from eval.compared import mean_cosine
from eval.transforms import pixels, shared

LAYER_NORM_EPS = 1e-6  # DINO's; the converted checkpoint's config says 1e-12


class DinoScorer:
    """compare(features, images, others) -> Tensor [B]: of eval.compared. output: what it gives, in words."""

    def __init__(self, folder: Path, device, output: str, compare: Callable):
        options = {"add_pooling_layer": False, "layer_norm_eps": LAYER_NORM_EPS}
        self.model, self.device, self.compare = whole(ViTModel, folder, device, **options), device, compare
        self.size = self.model.config.image_size
        self.spec = {
            "output": output,
            "transform": "dino_256_224",
            "layer_norm_eps": LAYER_NORM_EPS,
            "dtype": "float32",
        }

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> Tensor:
        """Unit class tokens [B, D]."""

        def class_tokens() -> Tensor:
            x = pixels(images, "dino_256_224", self.size).to(self.device)
            with torch.backends.cudnn.flags(allow_tf32=False):
                return F.normalize(self.model(pixel_values=x).last_hidden_state[:, 0].float(), dim=-1)

        return shared(images, id(self.model), class_tokens)

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """[B], of each picture and its others; the prompts do not matter."""
        return self.compare(self.features, images, others)


def load(files: dict[str, Path], device) -> DinoScorer:
    return DinoScorer(files["model"], device, "mean cosine of class tokens with a subject's pictures", mean_cosine)
