"""The stand-ins of the acceleration LoRAs: DMD2-LoRA and LCM-LoRA on the teacher.

Each starts as the truncated SVD of (student - teacher), layer by layer. That leaves out biases, norms and, for LCM,
the guidance embedding, which SDXL's UNet does not have; so it is then fitted to what the student answers along
its own trajectories. The files have the real ones' names, alpha and kinds of keys: DMD2's is what its
main/sdxl/extract_lora_module.py writes, LCM's is a file of diffusers.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pso.entries import Config
from pso.hub import Hub
from pso.mdp import Chain
from pso.miniature.common import DMD2_LORA, LCM_LORA, job, log, steps
from pso.miniature.distil import TEXTS, every_text, load_teacher
from pso.models import chain_for, load_policy
from pso.policy import ADAPTER, Policy
from pso.rollout import rollouts
from pso.standin_entries import Fit

RANK, ALPHA = 32, 4  # of the real files 64 and 8; the stand-in's layers have 48 channels and more
TARGETS = [  # DMD2's extract_lora_module.py
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
NUM_TRAJECTORIES = 512


@torch.no_grad()
def start_from_difference(policy: Policy, student: Policy) -> None:
    """Set the adapter to the best approximation of rank RANK of each layer's difference."""
    wanted = student.unet.state_dict()
    for name, module in policy.unet.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = module.get_base_layer().weight
        down, up = truncated(wanted[f"{name}.weight"] - weight, RANK)
        module.lora_A[ADAPTER].weight.copy_(down)
        module.lora_B[ADAPTER].weight.copy_(up)


def truncated(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down and up, of a linear layer or a convolution: up down is its truncated SVD; small layers have spare zeros."""
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    root, spare = s[:rank].sqrt(), max(0, rank - len(s))
    down = F.pad(root[:, None] * v[:rank], (0, 0, 0, spare))
    up = F.pad(u[:, :rank] * root, (0, spare))
    return down.reshape(rank, *difference.shape[1:]), up.reshape(len(up), rank, *(1,) * (difference.ndim - 2))


def fit_to(policy: Policy, student: Policy, chain: Chain, fit: Fit, seed: int, name: str) -> None:
    """Regress theta's clean latents on the student's along the student's trajectories."""
    every, rng = every_text(policy), torch.Generator().manual_seed(seed)
    rows = torch.randint(len(TEXTS), (NUM_TRAJECTORIES,), generator=rng)
    keys = [(name, seed, i) for i in range(NUM_TRAJECTORIES)]
    found = rollouts(student, chain, every.rows(rows), keys, micro_batch=64)
    states = torch.cat([trajectory.states for trajectory in found])
    for _, descend in steps(name, policy.lora_parameters(), fit):
        i = torch.randint(len(states), (fit.batch_size,), generator=rng)
        n = torch.randint(1, chain.num_steps + 1, (fit.batch_size,), generator=rng)
        x, condition = states[i, chain.num_steps - n], every.rows(rows[i])
        with torch.no_grad():
            wanted = chain.x0_hat(n, x, student.eps(chain, n, x, condition))
        error = (chain.x0_hat(n, x, policy.eps(chain, n, x, condition)) - wanted).pow(2).mean((1, 2, 3))
        descend((error + 1e-3).sqrt().mean())  # pseudo-Huber, as in the warm start of dmd2.py


def save_kohya(state: dict[str, Tensor], path) -> None:
    """PEFT's adapter of alpha = rank as a file of kohya's kind, in which alpha / rank of up down is added."""
    file = {}
    for key, value in state.items():
        layer, kind, _ = key.rsplit(".", 2)
        layer = "lora_unet_" + layer.replace(".", "_")
        down = kind == "lora_A"
        file[f"{layer}.lora_{'down' if down else 'up'}.weight"] = (value if down else value * RANK / ALPHA).half()
        file[f"{layer}.alpha"] = torch.tensor(ALPHA).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in file.items()}, path)


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    for k, (name, target) in enumerate({"sdxl_dmd2": DMD2_LORA, "sdxl_lcm": LCM_LORA}.items()):
        entry, seed = config.models[name], standin.seed + 100 + k
        policy, student = load_teacher(hub), load_policy(config.models[name], hub, name=name)
        policy.add_lora(RANK, TARGETS, seed)
        start_from_difference(policy, student)
        fit_to(policy, student, chain_for(name, entry, 4), standin.loras, seed, f"{name} LoRA")
        if target == DMD2_LORA:
            save_kohya(policy.lora_state(), hub.root / target[0] / target[1])
        else:
            policy.save_lora(hub.root / target[0])  # under the name that LCM-LoRA's file has too
        log.info("saved %s", "/".join(target))
    return {}


if __name__ == "__main__":
    job("loras", train)
