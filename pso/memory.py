"""How many rows of an update go through the network at once, and whether it keeps its activations: by free memory.

Neither changes a result beyond the last bits, so the GPU decides and run.json tells. On a CPU the configured
micro-batch stands, which keeps the small scales the same to the bit on every machine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pso.mdp import Chain
from pso.policy import Conditioning, Policy

SPARE = 0.25  # of the free memory: gradients of a layer, workspaces, fragments; ours
SAMPLE_BYTES = 2.0e9  # of one picture of 1024 px while the VAE decodes it in 16 bits; ours


@dataclass(frozen=True)
class Plan:
    """micro_batch: rows of a network call with gradients."""

    micro_batch: int
    gradient_checkpointing: bool = False


def plan(rows: int, asked: int, room: int, kept: int, recomputed: int) -> Plan:
    """rows of an update, the configured bound, bytes to fill, and bytes per row: all activations, or few of them.

    Kept activations are fastest. Where an update does not fit with them, forming them again in one pass costs less
    than the two passes of smaller chunks; where that does not fit either, chunks as large as fit.
    """
    by_keeping, by_recomputing = (min(asked, room // per_row) for per_row in (kept, recomputed))
    if rows <= by_keeping or (by_keeping > 0 and by_recomputing < rows):
        return Plan(by_keeping)
    return Plan(max(1, by_recomputing), gradient_checkpointing=True)


def choose(policy: Policy, chain: Chain, condition: Conditioning, rows: int, asked: int) -> Plan:
    """The plan for this device, put into effect. condition: of at least one prompt."""
    if policy.device.type != "cuda":
        return Plan(asked)
    found = plan(rows, asked, _room(policy.device), *needs(policy, chain, condition))
    policy.gradient_checkpointing(found.gradient_checkpointing)
    return found


def sample_batch(policy: Policy, asked: int) -> int:
    """Pictures that are sampled, decoded and scored at a time."""
    if policy.device.type != "cuda":
        return asked
    return max(1, min(asked, int(_room(policy.device) / (SAMPLE_BYTES * (policy.resolution / 1024) ** 2))))


def _room(device: torch.device) -> int:
    """Bytes: what is free, and what torch holds without using it, less the spare part."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((1 - SPARE) * (free + unused))


def needs(policy: Policy, chain: Chain, condition: Conditioning) -> tuple[int, int]:
    """Bytes of one row: with all activations, and with few of them and the largest piece that is formed again. Of
    SDXL at 1024 px the latter is 0.8 GB, and what is kept beside it 0.5."""
    kept: dict[int, Tensor] = {}
    pieces = [0]

    def piece(module, *arguments):
        before = _size(kept)
        found = module(*arguments)
        pieces.append(_size(kept) - before)
        return found

    policy.unet.enable_gradient_checkpointing(piece)  # which keeps all of it, to be measured
    whole = saved_bytes(policy, chain, condition, kept)
    kept.clear()
    policy.gradient_checkpointing(True)
    return whole, saved_bytes(policy, chain, condition) + max(pieces)


def saved_bytes(policy: Policy, chain: Chain, condition: Conditioning, kept: dict[int, Tensor] | None = None) -> int:
    """What one row of the network keeps for its backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in policy.unet.parameters()}
    kept = {} if kept is None else kept  # by address, held so that none is used twice

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    calls, x = policy.unet_forwards, torch.zeros((1, *policy.latent_shape), device=policy.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.eps(chain, torch.tensor([chain.num_steps]), x, condition.rows(torch.tensor([0])))
    policy.unet_forwards = calls  # a measurement, not a part of the run
    return _size(kept)


def _size(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
