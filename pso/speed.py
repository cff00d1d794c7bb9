"""How a policy is made faster without another function: compiled blocks, memory layout, attention kernels.

Each is an entry of a scale (`speed` in scales.yaml), told in run.json, and equal to the plain path up to rounding
(tests/test_speed.py). A compiled network is looked at before it is used: `check`.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pso.mdp import Chain
from pso.provenance import UserError

if TYPE_CHECKING:
    from pso.policy import Conditioning, Policy

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # 90 % of SDXL's FLOPs, in a few different shapes
SHAPES = 64  # graphs of one block that torch keeps: its widths, batch sizes, with and without gradients
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the norm of eps


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


@torch.no_grad()
def check(policy: "Policy", chain: Chain, condition: "Conditioning", rows: int = 1) -> None:
    """Whether a compiled policy still is the policy. Compiled networks have been seen to ignore their adapters: the
    loss then stays at log 2, and looks fast. With a LoRA that is moved for the occasion, theta and pre are each what
    they are uncompiled, and not each other."""
    n = torch.full((rows,), chain.num_steps)
    x = torch.randn((rows, *policy.latent_shape), generator=torch.Generator().manual_seed(0)).to(policy.device)
    told, counted = condition.rows(torch.zeros(rows, dtype=torch.long)), policy.unet_forwards

    def both() -> tuple[Tensor, Tensor]:
        return tuple(policy.eps(chain, n, chain.init(x), told, pre=pre) for pre in (False, True))

    with _moved(policy):
        found = both()
        with torch.compiler.set_stance("force_eager"):
            expected = both()
    policy.unet_forwards = counted  # a measurement, not a part of the run
    bound = TOLERANCE[policy.unet.dtype]
    for name, one, other in zip(("theta", "pre"), found, expected, strict=True):
        if not (apart := _apart(one, other)) <= bound:
            raise UserError(
                f"speed.compile is true, and the compiled {name} is {apart:.2g} of its norm away from the network that "
                f"it was compiled from; expected at most {bound}: set speed.compile to false."
            )
    if not _apart(*found) > bound:
        raise UserError(
            "speed.compile is true, and the compiled theta and pre are the same network, though the LoRA is not zero; "
            "set speed.compile to false."
        )


def _apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@contextlib.contextmanager
def _moved(policy: "Policy") -> Iterator[None]:
    """A LoRA that changes what the network says, for a moment."""
    before = {k: v.clone() for k, v in policy.lora_state().items()}
    noise = torch.Generator().manual_seed(0)
    state = {k: v + 0.3 * torch.randn(v.shape, generator=noise).to(v) for k, v in before.items()}
    policy.set_lora_state(state)
    try:
        yield
    finally:
        policy.set_lora_state(before)
