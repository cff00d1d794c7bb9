"""LoRA files of others, through diffusers' own loader, with an account of every tensor: what it cannot place it drops
with a warning at most.

A file's keys are of one style: kohya's with alpha (DMD2's and LCM's), PEFT's, or one of diffusers' two older ones. What
a file should hold follows from what it holds: the layers of a kind, such as `attn1.to_q` or `resnets.conv1`, are all
adapted or none is.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from pso import state_dicts
from pso.entries import Lora
from pso.hub import Hub
from pso.provenance import UserError
from pso.weights import BROKEN

PARTS = ("down", "up", "alpha")
CONTAINER = re.compile(r"(down_blocks|up_blocks|attentions|resnets|transformer_blocks|downsamplers|upsamplers)\.\d+")


def _processor(layer: str) -> str:
    """diffusers' oldest name of an attention layer: ...attn1.processor.to_out_lora of ...attn1.to_out.0."""
    place, _, name = layer.removesuffix(".0").rpartition(".")
    return f"unet.{place}.processor.{name}_lora"


STYLES: dict[str, Callable[[str], tuple[str, str, str]]] = {  # layer -> names of its down, up and alpha
    "kohya": lambda x: _ends("lora_unet_" + x.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "peft": lambda x: _ends(f"unet.{x}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": lambda x: _ends(f"unet.{x}", ".lora.down.weight", ".lora.up.weight"),
    "processor": lambda x: _ends(_processor(x), ".down.weight", ".up.weight"),
}


def _ends(stem: str, down: str, up: str) -> tuple[str, str, str]:
    return stem + down, stem + up, stem + ".alpha"


def layers(unet: nn.Module) -> dict[str, Tensor]:
    """Name and weight of every layer that a LoRA can adapt; asked for before one does."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module.weight for name, module in unet.named_modules() if isinstance(module, kinds)}


def kind(layer: str) -> str:
    """What layers of one kind have in common: their name without the blocks that they are in."""
    name = CONTAINER.sub(lambda found: found[1], layer)
    return re.sub(r"^(down_blocks|up_blocks|mid_block)\.", "", name)


def places(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> dict[str, tuple[str, str]]:
    """Each key's layer and part; ValueError with the first keys that the file lacks, has in excess or misshapen."""
    if not state:
        raise ValueError(f"{path} holds nothing")
    every = {style: _keys(names, weights) for style, names in STYLES.items()}
    style = max(every, key=lambda name: len(every[name].keys() & state.keys()))
    found = {key: every[style][key] for key in state if key in every[style]}
    kinds, parts = {kind(layer) for layer, _ in found.values()}, {part for _, part in found.values()}
    wanted = {}
    for layer in (layer for layer in weights if kind(layer) in kinds):
        names = STYLES[style](layer)
        wanted |= _wanted(names if "alpha" in parts else names[:2], state, weights[layer])
    state_dicts.check(state, wanted, path)
    return found


def _keys(names: Callable, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """All keys that a file of one style could have for these layers."""
    return {key: (layer, part) for layer in weights for key, part in zip(names(layer), PARTS, strict=True)}


def _wanted(names: tuple[str, ...], state: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Of one layer of the file: down [rank, in, ...] and up [out, rank, 1...]; alpha is one number of any type."""
    down = state.get(names[0])
    rank, (out, *into) = 1 if down is None or not down.ndim else len(down), weight.shape
    shapes = ((rank, *into), (out, rank, *(1 for _ in into[1:])))
    found = {name: torch.empty(shape, device="meta") for name, shape in zip(names, shapes, strict=False)}
    for name in names[2:]:
        own = state.get(name)
        found[name] = own if own is not None and own.numel() == 1 else torch.empty((), device="meta")
    return found


# ---- into a UNet ----


def fuse_loras(pipeline: StableDiffusionXLPipeline, hub: Hub, loras: list[Lora], field: str) -> None:
    """Through the pipeline's own door, which applies each file's alpha; then into the weights, so that pre has them."""
    weights, names = layers(pipeline.unet), [f"part{i}" for i in range(len(loras))]
    for i, (lora, name) in enumerate(zip(loras, names, strict=True)):
        path = hub.file(lora.repo, lora.file)
        try:
            place = places(state_dicts.headers([path]), weights, path)
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
            check_arrived(pipeline.unet, name, place, path)
        except BROKEN as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{field}[{i}] cannot be loaded ({reason}); fetch it again, or is it for another model?"
            ) from error
    if names:
        pipeline.set_adapters(names, [lora.scale for lora in loras])
        pipeline.fuse_lora(components=["unet"], adapter_names=names)
        pipeline.unload_lora_weights()


def check_arrived(unet: UNet2DConditionModel, name: str, place: dict[str, tuple[str, str]], path: Path) -> None:
    """The adapter holds the file's numbers, each in its layer and at the scale alpha / rank, and no others."""
    state, layers = state_dicts.tensors([path]), {layer for layer, _ in place.values()}
    adapted = {layer: module for layer, module in unet.named_modules() if name in getattr(module, "scaling", {})}
    if lost := sorted(layers ^ adapted.keys()):
        raise ValueError(f"diffusers' loader read {path} otherwise: {len(lost)} layers differ, the first is {lost[0]}")
    for key, (layer, part) in place.items():
        if not _arrived(adapted[layer], name, part, state[key]):
            raise ValueError(f"diffusers' loader did not put {key} of {path} where it belongs")
    if "alpha" in {part for _, part in place.values()} or _own_scale(path):
        return
    for layer, module in adapted.items():
        if module.scaling[name] != 1.0:
            raise ValueError(f"{path} has no alpha, but {layer} was scaled by {module.scaling[name]}; expected 1")


def _arrived(module: nn.Module, name: str, part: str, value: Tensor) -> bool:
    if part == "alpha":
        return math.isclose(module.scaling[name], value.item() / module.r[name], rel_tol=1e-6)
    held = (module.lora_A if part == "down" else module.lora_B)[name].weight
    return torch.equal(held, value.to(held))


def _own_scale(path: Path) -> bool:
    """Whether PEFT's settings, alpha among them, stand in the file's head, where newer diffusers puts them."""
    with safe_open(path, "pt") as file:
        return "lora_adapter_metadata" in (file.metadata() or {})
