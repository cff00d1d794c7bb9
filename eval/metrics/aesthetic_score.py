"""LAION's aesthetic predictor: an MLP without activations on the unit CLIP ViT-L image embedding."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.clip_model import ClipScorer, load_clip

LAYERS = (0, 2, 4, 6, 7)  # of the published Sequential; dropout in between


class AestheticScorer:
    def __init__(self, files: dict[str, Path], device):
        model = load_clip(files["model"], "quick_gelu", device)
        self.clip = ClipScorer(model, files["processor"], "clip_pil224", {"output": "rating"})
        state = torch.load(files["head"], map_location="cpu", weights_only=True)
        expected = {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}
        if set(state) != expected:
            raise ValueError(f"{files['head']} has the keys {sorted(state)}; expected {sorted(expected)}")
        width = self.clip.model.config.projection_dim
        # affine after affine is affine: fold in float64
        weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for i in LAYERS:
            layer = state[f"layers.{i}.weight"].double()
            weight, bias = layer @ weight, layer @ bias + state[f"layers.{i}.bias"].double()
        self.weight, self.bias = weight[0].float().to(device), bias[0].float().to(device)
        self.spec = {**self.clip.spec, "head_norm": round(self.weight.norm().item(), 4)}

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Rating [B]; the prompts do not matter."""
        return self.clip.image_features(images) @ self.weight + self.bias


def load(files: dict[str, Path], device) -> AestheticScorer:
    return AestheticScorer(files, device)
