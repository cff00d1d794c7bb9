"""Networks with random weights for the benchmarks, drawn on the device that they run on; nothing is read.

As pso/rehearsal.py draws them: norms near 1, matrices that keep the size of what goes through them. Never zeros, which
cost less power and so flatter the clock: the LoRA's second matrices are noise too. What such weights cannot tell is
whether a fast path keeps a trained network's pictures.
"""

import argparse
import contextlib
import functools
import math
from types import ModuleType

import torch
from diffusers import AutoencoderTiny, EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from torch import Tensor, nn

from pso import flops
from pso.entries import ModelEntry, Speed
from pso.mdp import SDXL_SCHEDULE, Ancestral, Chain, Renoise
from pso.policy import Conditioning, Policy
from pso.provenance import UserError
from pso.rehearsal import BIAS, NETWORKS

RANK = 16
LORA_B = 0.02  # std; a new adapter's is 0
TIMES = [999, 749, 499, 249]  # of the four steps of SDXL-DMD2 and SDXL-Turbo
SIZES = {"full": "published", "tiny": "small"}
SAMPLERS = {
    "renoise": (Renoise, LCMScheduler),
    "ancestral": (Ancestral, lambda **kw: EulerAncestralDiscreteScheduler(**kw, timestep_spacing="trailing")),
}
TARGETS = ModelEntry.model_fields["lora_targets"].default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that every benchmark of networks has."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full" if gpu else "tiny", help="of the networks")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each variant takes")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the report")


def check_arguments(args: argparse.Namespace, *numbers: str) -> torch.device:
    for name in ("rounds", *numbers):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one < 1:
                raise UserError(f"--{name} is {one}; expected numbers of at least 1.")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("events are known of CUDA alone")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--device is {args.device!r} ({reason}); expected cpu, or cuda where there is one.") from error
    return device


def short(device: torch.device) -> torch.dtype:
    """What networks run in: float32 on a CPU, where bfloat16 may be emulated."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# ---- networks ----


@torch.no_grad()
def filled(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A network of the meta device with random numbers in it. Buffers are not drawn: none of them is used here."""
    model = nn.Module.to(model, dtype).to_empty(device=device).requires_grad_(False).eval()  # diffusers' own warns
    rng = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng, device=device))
        if parameter.ndim > 1:
            parameter.div_(math.sqrt(math.prod(parameter.shape[1:])))
        elif name.endswith("weight"):
            parameter.mul_(0.1).add_(1)
        else:
            parameter.mul_(BIAS)
    return model


def networks(size: str) -> ModuleType:
    return NETWORKS[SIZES[size]]


def new_policy(
    size: str,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    sampler: str = "renoise",
    rank: int = RANK,
    speed: Speed | None = None,
) -> tuple[Policy, Chain]:
    """A tuned model of random weights with its sampler of four steps, the same ones whatever `speed` is. It has no
    tokenizers: `condition` draws texts."""
    nets = networks(size)
    kind, scheduler = SAMPLERS[sampler]
    one, two = nets.text_encoders()
    pipeline = StableDiffusionXLPipeline(
        vae=new_vae(size, device, dtype),
        text_encoder=filled(one, device, dtype),
        text_encoder_2=filled(two, device, dtype),
        tokenizer=None,
        tokenizer_2=None,
        unet=filled(nets.unet(), device, dtype),
        scheduler=scheduler(**SDXL_SCHEDULE),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    policy = Policy(pipeline, resolution, speed=speed)
    policy.add_lora(rank, TARGETS, seed=0)
    rng = torch.Generator(device).manual_seed(1)
    state = {
        name: LORA_B * torch.randn(value.shape, generator=rng, device=device) if ".lora_B." in name else value
        for name, value in sorted(policy.lora_state().items())
    }
    policy.set_lora_state(state)
    return policy, kind(TIMES)


def new_vae(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return filled(networks(size).vae(), device, dtype)


def new_tiny_vae(size: str, device: torch.device, dtype: torch.dtype) -> AutoencoderTiny:
    """TAESD's architecture, which is TAESDXL's too: another function, not a faster VAE."""
    return filled(networks(size).tiny_vae(), device, dtype)


def condition(policy: Policy, count: int, seed: int = 2) -> Conditioning:
    """Texts of unit variance, in the policy's own numbers."""
    hidden, pooled = _widths(policy.unet)
    rng = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(count, *shape, generator=rng) for shape in ((flops.TOKENS, hidden), (pooled,)))
    return Conditioning(*(value.to(policy.device, policy.unet.dtype) for value in drawn))


def _widths(unet: nn.Module) -> tuple[int, int]:
    """Of a text's tokens, and of the whole text."""
    config = unet.config
    return config.cross_attention_dim, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


# ---- their work ----


@functools.cache
def call_flops(size: str, side: int, rank: int | None = RANK) -> int:
    """Of one call of the UNet on a picture of `side` px, with a LoRA."""
    unet = networks(size).unet().requires_grad_(False)
    if rank is not None:
        with torch.device("meta"):
            unet.add_adapter(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False))
    hidden, pooled = _widths(unet)
    latents = _meta(1, 4, *[side // latent_px(size)] * 2)
    told = {"text_embeds": _meta(1, pooled), "time_ids": _meta(1, 6)}
    with torch.no_grad():
        text = _meta(1, flops.TOKENS, hidden)
        return flops.count(lambda: unet(latents, _meta(1), text, added_cond_kwargs=told)).total


@functools.cache
def vae_flops(size: str, side: int, way: str, tiny: bool = False) -> int:
    """Of one picture; `way`: decode or encode."""
    vae = networks(size).tiny_vae() if tiny else networks(size).vae()
    shape = (1, 3, side, side) if way == "encode" else (1, 4, *[side // latent_px(size)] * 2)
    with torch.no_grad():
        return flops.count(lambda: getattr(vae, way)(_meta(*shape))).total


def latent_px(size: str) -> int:
    """px of a picture per latent."""
    return 2 ** (len(networks(size).vae().config.block_out_channels) - 1)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def default_side(size: str) -> int:
    return 1024 if size == "full" else 32


@contextlib.contextmanager
def without_denormals():
    """Numbers next to zero cost a CPU many cycles; random weights make more of them than trained ones."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
