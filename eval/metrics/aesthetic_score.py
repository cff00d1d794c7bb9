"""LAION's aesthetic predictor: an MLP without activations on the unit CLIP ViT-L image embedding."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from eval.affine import folded
from eval.clip_model import ClipScorer, load_clip
from pso import state_dicts


class AestheticScorer:
    def __init__(self, files: dict[str, Path], device):
        model = load_clip(files["model"], "quick_gelu", device)
        self.clip = ClipScorer(model, files["processor"], "clip_pil224", {"output": "rating"})
        weight, bias = folded(state_dicts.read(files["head"]), files["head"], self.clip.model.config.projection_dim)
        self.weight, self.bias = weight.float().to(device), bias.float().to(device)
        self.spec = {**self.clip.spec, "head_norm": round(self.weight.norm().item(), 4)}

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Rating [B]; the prompts do not matter."""
        return self.clip.image_features(images) @ self.weight + self.bias


def load(files: dict[str, Path], device) -> AestheticScorer:
    return AestheticScorer(files, device)
