"""Whether a compiled policy still is the policy: looked at once, before a run uses it.

Compiled networks have been seen to ignore their adapters. The loss then stays at log 2, and looks fast.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pso.mdp import Chain
from pso.policy import Conditioning, Policy
from pso.provenance import UserError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the norm of eps


@torch.no_grad()
def check(policy: Policy, chain: Chain, condition: Conditioning, rows: int = 1) -> None:
    """A sentence unless, with a LoRA that is moved for the occasion, theta and pre are each what they are uncompiled,
    and not each other. condition: of at least one prompt; rows: of the call."""
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
def _moved(policy: Policy) -> Iterator[None]:
    """A LoRA that changes what the network says, for a moment."""
    before = {k: v.clone() for k, v in policy.lora_state().items()}
    noise = torch.Generator().manual_seed(0)
    state = {k: v + 0.3 * torch.randn(v.shape, generator=noise).to(v) for k, v in before.items()}
    policy.set_lora_state(state)
    try:
        yield
    finally:
        policy.set_lora_state(before)
