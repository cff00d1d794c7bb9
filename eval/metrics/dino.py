"""DINO of the DreamBooth protocol: DINO ViT-S/16, cosine of class tokens, mean over a subject's real pictures."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ViTModel

from eval.clip_model import files_as_they_are
from eval.compared import mean_cosine
from eval.transforms import pixels, shared

LAYER_NORM_EPS = 1e-6  # DINO's; the converted checkpoint's config says 1e-12


_loaded: WeakValueDictionary = WeakValueDictionary()  # files as they are, device -> model, while a scorer holds it


def load_vit(folder: Path, device) -> ViTModel:
    """Every weight from the checkpoint, in float32; scorers of one checkpoint share it."""
    key = (*files_as_they_are(folder), str(device))
    if key not in _loaded:
        model, info = ViTModel.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            add_pooling_layer=False,
            layer_norm_eps=LAYER_NORM_EPS,
            output_loading_info=True,
            use_safetensors=True,
        )
        missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unknown:  # transformers would draw a missing weight at random
            raise ValueError(
                f"weights in {folder} lack {missing[:2]} and have {unknown[:2]} in excess (the first two of "
                f"{len(missing)} and {len(unknown)}); fetch the checkpoint again"
            )
        _loaded[key] = model = model.to(device).eval()
    return _loaded[key]


class DinoScorer:
    output = "mean cosine of class tokens with a subject's pictures"

    def __init__(self, folder: Path, device):
        self.model, self.device = load_vit(folder, device), device
        self.size = self.model.config.image_size
        self.spec = {
            "output": self.output,
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
        """Mean cosine [B] with the subject's real pictures; the prompts do not matter."""
        return mean_cosine(self.features, images, others)


def load(files: dict[str, Path], device) -> DinoScorer:
    return DinoScorer(files["model"], device)
