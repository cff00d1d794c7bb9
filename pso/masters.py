"""Float32 masters of LoRA weights of which the network holds copies in 16 bits.

Gradients of every backward pass are added up in float32 on the masters, the optimiser moves the masters, and `refresh`
rounds them into the network. So no cast of an activation stands between base and LoRA, and no small update is lost.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Masters:
    """Of a network's LoRA parameters by their names, which are float32 still (or more), and in `dtype` from here on."""

    def __init__(self, copies: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype):
        self.copies = dict(copies)
        self.full = {name: nn.Parameter(_full(p.detach()).clone()) for name, p in self.copies.items()}
        for name, parameter in self.copies.items():
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, copied: Tensor) -> None:
        master, grad = self.full[name], _full(copied.grad)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        copied.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """What the optimiser did, rounded into the network."""
        for name, parameter in self.copies.items():
            parameter.copy_(self.full[name])
