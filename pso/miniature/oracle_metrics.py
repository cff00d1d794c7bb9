"""The oracle's judgements as metrics: accuracy, utility and texture of a picture of the stand-in world."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pso.miniature import oracle, world


class OracleMetric:
    def __init__(self, name: str):
        self.name = name
        self.spec = {"output": "template matching on the stand-in world"}

    def load(self, files: dict, device) -> "OracleMetric":
        return self

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """[B]; every prompt must be a caption of the world."""
        unknown = [p for p in prompts if p not in world.OF_CAPTION]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no caption of the stand-in world; the oracle cannot judge it")
        seen = oracle.look(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        if self.name == "texture":
            return torch.from_numpy(seen.texture).float()
        attributes = [world.OF_CAPTION[p] for p in prompts]
        return torch.from_numpy(getattr(seen, self.name)(attributes)).float()


accuracy, utility, texture = (OracleMetric(name) for name in ("accuracy", "utility", "texture"))
