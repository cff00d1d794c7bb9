"""How a policy is made faster without another function: compiled blocks, memory layout, attention kernels.

Each is an entry of a scale (`speed` in scales.yaml), told in run.json, and equal to the plain path up to rounding
(tests/test_speed.py). A compiled network is looked at before it is used (pso/compiled.py).
"""

import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # what SDXL's UNet is made of, in a few different shapes
SHAPES = 64  # graphs of one block that torch keeps: its widths, batch sizes, with and without gradients


def attention(name: str) -> contextlib.AbstractContextManager:
    """Kernels of scaled_dot_product_attention: the one asked for first, then whatever can do the shape at hand."""
    if name == "auto":
        return contextlib.nullcontext()
    first = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    rest = [b for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if b != first]
    return sdpa_kernel([first, *rest], set_priority=True)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Each block by itself, for the shapes that it meets: torch keeps one graph for all blocks of a kind and width."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    for module in network.modules():
        if type(module).__name__ in BLOCKS:
            module.compile(dynamic=False, backend=backend)
