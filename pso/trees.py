"""The same UNet once more: another tree of modules around the same weights, without a LoRA or with it added in.

`pre` is such a tree. So no adapter is switched off and on again: none is forgotten, no compiled block has to notice,
and pre is the untuned network bit for bit.
"""

import copy
from collections.abc import Callable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn


def without_lora(network: nn.Module) -> nn.Module:
    """The network under its adapters; every weight is the network's own, none is copied."""
    return _again(network, lambda layer: layer.get_base_layer())


def with_lora_added(network: nn.Module, adapter: str) -> nn.Module:
    """One layer in place of three: W + scale B A wherever there is an adapter. The other weights are the network's own.

    Of full precision alone: in bfloat16 a change below |W| / 512 would be lost, and with it most of a young LoRA.
    """
    return _again(network, lambda layer: _added(layer, adapter))


def _again(module: nn.Module, layer: Callable[[LoraLayer], nn.Module]) -> nn.Module:
    if isinstance(module, LoraLayer):
        return layer(module)
    if not module._modules:
        return module
    twin = copy.copy(module)  # what a block was compiled to is bound to the old one; torch leaves it out of copies
    twin._modules = {name: child if child is None else _again(child, layer) for name, child in module._modules.items()}
    return twin


@torch.no_grad()
def _added(layer: LoraLayer, adapter: str) -> nn.Module:
    base = layer.get_base_layer()
    if adapter not in layer.lora_A:
        return base
    if base.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a LoRA cannot be added to weights in {base.weight.dtype} without loss; expected float32")
    changed = copy.copy(base)
    weight = nn.Parameter(base.weight + layer.get_delta_weight(adapter), requires_grad=False)
    changed._parameters = {**base._parameters, "weight": weight}
    return changed
