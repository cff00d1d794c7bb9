"""Work of the published networks, counted by torch on the meta device: FLOPs of one sample, 2 for a multiply-add.

Linear layers, convolutions and attention's products are counted, nothing else. The backward pass of attention is
counted as its fused kernels do it, which form the scores once more: 5 products for the forward pass's 2.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pso import architectures as published
from pso.architectures import LATENT, POOLED_WIDTH, TEXT_WIDTH, TOKENS
from pso.entries import ModelEntry

WINDOW = 35  # tokens of ImageReward


@dataclass(frozen=True)
class Work:
    """FLOPs of a call; `attention`: those of its products of queries, keys and values."""

    total: int
    attention: int


def count(call: Callable[[], object]) -> Work:
    """A call on the meta device, where attention is made of batched products and nothing else is."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts().get("Global", {})
    return Work(sum(counts.values()), counts.get(torch.ops.aten.bmm, 0))


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _tokens(length: int) -> Tensor:
    return torch.zeros((1, length), dtype=torch.long, device="meta")


def _denoise(model, side: int) -> Tensor:
    """One call of SDXL's UNet on pictures of `side` px."""
    told = {"text_embeds": _empty(1, POOLED_WIDTH), "time_ids": _empty(1, 6)}
    time, latents = _empty(1), _empty(1, 4, side // LATENT, side // LATENT)
    return model(latents, time, _empty(1, TOKENS, TEXT_WIDTH), added_cond_kwargs=told).sample


def unet(side: int) -> Work:
    """The frozen UNet: pre's call, and a sampler's without LoRA."""
    with torch.no_grad():
        return count(lambda: _denoise(published.unet(), side))


@functools.cache  # seconds
def lora(side: int, rank: int, gradient_checkpointing: bool = False) -> tuple[Work, Work]:
    """(forward, backward) of theta's UNet with a LoRA on every attention layer; with checkpointing the backward pass
    forms most activations once more."""
    model = published.unet().requires_grad_(False)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    with torch.device("meta"):
        model.add_adapter(
            LoraConfig(r=rank, target_modules=ModelEntry.model_fields["lora_targets"].default, init_lora_weights=False)
        )
    found: list[Tensor] = []
    forward = count(lambda: found.append(_denoise(model, side)))
    backward = count(lambda: found[0].sum().backward())
    again = forward.attention // 2  # see the module's docstring: 5 products where 4 were counted
    return forward, Work(backward.total + again, backward.attention + again)


def decode(side: int) -> Work:
    with torch.no_grad():
        return count(lambda: published.vae().decode(_empty(1, 4, side // LATENT, side // LATENT)))


def encode(side: int) -> Work:
    with torch.no_grad():
        return count(lambda: published.vae().encode(_empty(1, 3, side, side)))


def prompt() -> Work:
    """SDXL's two text encoders."""
    with torch.no_grad():
        return count(lambda: [encoder(_tokens(TOKENS)) for encoder in published.text_encoders()])


def clip_image(name: str) -> Work:
    with torch.no_grad():
        return count(lambda: published.clip(name).get_image_features(pixel_values=_empty(1, 3, 224, 224)))


def clip_text(name: str) -> Work:
    with torch.no_grad():
        return count(lambda: published.clip(name).get_text_features(input_ids=_tokens(TOKENS)))


def dino() -> Work:
    with torch.no_grad():
        return count(lambda: published.dino()(pixel_values=_empty(1, 3, 224, 224)))


def image_reward() -> Work:
    vision, text = published.image_reward()

    def reward() -> None:
        seen = vision(pixel_values=_empty(1, 3, 224, 224)).last_hidden_state
        text(input_ids=_tokens(WINDOW), encoder_hidden_states=seen, is_decoder=False)

    with torch.no_grad():
        return count(reward)


def of(network: str, side: int = 0, rank: int = 0) -> int:
    """FLOPs of a call by the name that pso/work.py gives it."""
    if network in ("theta", "backward"):
        return lora(side, rank)[network == "backward"].total
    if network.endswith("_text"):
        return clip_text(network.removesuffix("_text")).total
    if network.startswith("clip_"):
        return clip_image(network).total
    sized = {"unet": unet, "decode": decode, "encode": encode}
    if network in sized:
        return sized[network](side).total
    return {"text": prompt, "image_reward": image_reward, "dino": dino}[network]().total
