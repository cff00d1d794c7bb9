"""A published head of linear layers with nothing but dropout between them: one affine map."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pso import state_dicts

LAYERS = (0, 2, 4, 6, 7)  # of the published Sequentials; dropout in between
KEYS = {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}


def folded(state: Mapping[str, Tensor], path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Its weight [width] and bias [] in float64. ValueError where the keys or shapes are others."""
    state_dicts.refuse(KEYS - state.keys(), state.keys() - KEYS, path)
    state_dicts.refuse_types(state, path)
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for i in LAYERS:
        layer = state[f"layers.{i}.weight"].double()
        if layer.ndim != 2 or layer.shape[1] != len(weight):
            raise ValueError(f"{path} has layers.{i}.weight of shape {[*layer.shape]}; expected [*, {len(weight)}]")
        shift = state[f"layers.{i}.bias"].double()
        if shift.shape != layer.shape[:1]:  # of one number it would be added to all
            raise ValueError(f"{path} has layers.{i}.bias of shape {[*shift.shape]}; expected [{len(layer)}]")
        weight, bias = layer @ weight, layer @ bias + shift
    if len(weight) != 1:
        raise ValueError(f"{path} ends in {len(weight)} numbers; expected 1")
    return weight[0], bias[0]
