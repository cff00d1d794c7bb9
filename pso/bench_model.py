"""A whole SDXL-type pipeline with random weights, made on its device: for benchmarks, whose time does not depend on
what the weights are as long as they are neither zero nor absurd.

Weights are drawn with a spread that keeps activations near 1, LoRA's B with a small one instead of zero: a network of
zeros draws less power and so runs faster than a real one.
"""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from pso import architectures, bench_size
from pso.bench_size import RESOLUTION
from pso.config import load
from pso.entries import Speed
from pso.mdp import SDXL_SCHEDULE
from pso.models import VAE_DTYPES
from pso.policy import Policy
from pso.provenance import UserError
from pso.tokenizer_files import merges_for, write_tokenizer

B_SPREAD = 1e-3  # of LoRA's B
SIZES = (RESOLUTION, 512, 1024)  # px


def networks(resolution: int) -> ModuleType:
    """Where the networks of a resolution are: 128 px is the size for CPUs."""
    if resolution not in SIZES:
        raise UserError(f"--resolution is {resolution}; expected one of {', '.join(map(str, SIZES))}.")
    return bench_size if resolution == RESOLUTION else architectures


@torch.no_grad()
def drawn(network: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A network from the meta device with weights; the same for a seed and a kind of device."""
    network = nn.Module.to(network, dtype).to_empty(device=device).eval().requires_grad_(False)  # diffusers' to() warns
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            spread = 0.02 if "embedding" in name and "time" not in name else fan_in(parameter) ** -0.5
            parameter.normal_(0, spread, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))  # of a norm
    for name, buffer in network.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"the buffer {name} of {type(network).__name__} has no value; expected position_ids alone")
        buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return network


def fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def tokenizer(vocabulary: int, pad: str) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), merges_for(vocabulary), pad)
        return CLIPTokenizer.from_pretrained(folder)


def random_pipeline(resolution: int, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    nets = networks(resolution)
    encoders = [drawn(one, device, dtype, seed=2 + i) for i, one in enumerate(nets.text_encoders())]
    pads = ("<|endoftext|>", "!")
    tokenizers = [tokenizer(one.config.vocab_size, pad) for one, pad in zip(encoders, pads, strict=True)]
    pipeline = StableDiffusionXLPipeline(
        vae=drawn(nets.vae(), device, VAE_DTYPES.get(dtype, dtype), seed=1),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=drawn(nets.unet(), device, dtype),
        scheduler=EulerDiscreteScheduler(**SDXL_SCHEDULE),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def policy_of(pipeline: StableDiffusionXLPipeline, resolution: int, rank: int, speed: Speed | None = None) -> Policy:
    """Ours on a pipeline, with a LoRA that is not zero."""
    policy = Policy(pipeline, resolution, speed=speed)
    policy.add_lora(rank, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    wake(policy.unet.named_parameters() if policy.masters is None else policy.masters.full.items())
    policy.lora_changed()
    return policy


def published_speed(device: torch.device) -> Speed:
    """How the scales run the networks: that of published weights on a GPU, that of stand-ins on a CPU."""
    return load({"scale": "miniature" if device.type == "cpu" else "paper"}).scale_entry.speed


@torch.no_grad()
def wake(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """LoRA's B small instead of zero."""
    for i, (_, parameter) in enumerate(one for one in named if "lora_B" in one[0]):
        generator = torch.Generator(parameter.device).manual_seed(i)
        parameter.normal_(0, B_SPREAD, generator=generator)
