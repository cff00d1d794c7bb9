"""What the scripts share: SDXL's UNet with a LoRA of PEFT in float32 under autocast, micro-batches whose gradients add
up, a VAE in float32. Written with diffusers, PEFT and torch alone.

An update of P pairs is P / `pairs` micro-batches, each with a forward and a backward pass of its own. `Form` is all
that differs between a peer as it was released and the same code tuned to a machine.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from torch import Tensor

from pso.evidence import Batch, Side
from pso.mdp import Ancestral, Chain
from pso.policy import SHORT, Conditioning

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Form:
    """pairs: of a micro-batch; it has to divide the pairs of an update."""

    pairs: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Pictures:
    """What a script's loader hands over: pictures of both sides [P, 3, H, W] from -1 to 1, captions, and the steps
    n [P, S] (on the CPU) to which they are noised."""

    target: Tensor
    reference: Tensor
    captions: list[str]
    n: Tensor

    def rows(self, part: slice) -> "Pictures":
        return Pictures(self.target[part], self.reference[part], self.captions[part], self.n[part])

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Schedule:
    """A sampler's numbers: t_n, alpha_bar and, of variance-exploding samplers, sigma at steps n; index 0 is clean."""

    times: Tensor
    alpha_bar: Tensor
    exploding: bool

    @classmethod
    def of(cls, chain: Chain) -> "Schedule":
        return cls(chain.times, chain.alpha_bar, isinstance(chain, Ancestral))

    def at(self, n: Tensor, like: Tensor) -> Tensor:
        """alpha_bar_n as [B, 1, 1, 1]."""
        return self.alpha_bar[n].to(like.device, like.dtype)[:, None, None, None]

    def noised(self, n: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        alpha_bar = self.at(n, clean)
        if self.exploding:
            return clean + ((1 - alpha_bar) / alpha_bar).sqrt() * noise
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def shown(self, n: Tensor, x: Tensor) -> Tensor:
        """What the network sees at x_n."""
        return self.at(n, x).sqrt() * x if self.exploding else x


class Script(ABC):
    """A peer's training step. `settings`: of the method's entry, its numbers alone. `steps`: of the sampler."""

    encodes_captions = True  # in every update; where not, the conditions are given
    vae_batch = 8  # pictures at a time

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        resolution: int,
        chain: Chain,
        settings: object,
        rank: int = 16,
    ):
        """pipeline: with a UNet that has no adapter yet."""
        self.pipeline, self.unet, self.resolution = pipeline, pipeline.unet, resolution
        self.settings, self.schedule = settings, Schedule.of(chain)
        self.dtype = self.unet.dtype
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False)
        if pipeline.vae.dtype in SHORT:
            pipeline.vae.to(torch.float32)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-6)
        self.permutations = torch.Generator().manual_seed(0)
        self.use(Form(1, gradient_checkpointing=False))

    def use(self, form: Form) -> None:
        """From here on."""
        self.form = form
        on = form.gradient_checkpointing
        (self.unet.enable_gradient_checkpointing if on else self.unet.disable_gradient_checkpointing)()

    # -- networks --

    def eps(self, n: Tensor, x: Tensor, text: Conditioning, network: torch.nn.Module | None = None) -> Tensor:
        """The network's answer at x_n [B, C, H, W], n [B], in float32 (of a float64 network float64)."""
        size = float(self.resolution)
        pooled, hidden = text.pooled.to(self.dtype), text.hidden.to(self.dtype)
        time_ids = pooled.new_tensor([[size, size, 0, 0, size, size]]).repeat(len(x), 1)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype in SHORT):
            found = (network or self.unet)(
                self.schedule.shown(n, x).to(self.dtype),
                self.schedule.times[n].to(x.device),
                encoder_hidden_states=hidden,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            ).sample
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The frozen model, without a graph."""
        self.unet.disable_adapters()
        with torch.no_grad():
            yield
        self.unet.enable_adapters()

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """A draw from the latent posterior of each picture."""
        vae = self.pipeline.vae
        parts = [vae.encode(part.to(vae.dtype)).latent_dist.sample() for part in pictures.split(self.vae_batch)]
        return torch.cat(parts) * vae.config.scaling_factor

    @torch.no_grad()
    def conditions(self, captions: list[str]) -> Conditioning:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        return Conditioning(hidden, pooled)

    # -- an update --

    def noised(self, pictures: Pictures, latents: Tensor, noise: Tensor) -> Batch:
        """Both sides at their steps: latents [2 P, C, H, W], noise [P, S, C, H, W], which a pair shares."""
        pairs, steps = pictures.n.shape
        n = pictures.n.reshape(-1)
        sides = []
        for clean in latents.chunk(2):
            repeated = clean.repeat_interleave(steps, 0)
            x = self.schedule.noised(n, repeated, noise.flatten(0, 1)).view_as(noise)
            sides.append(Side("forward", pictures.n, x, noise))
        return Batch(torch.arange(pairs), *sides)

    def encoded(self, pictures: Pictures) -> Batch:
        latents = self.latents(torch.cat([pictures.target, pictures.reference]))
        latents = latents.to(torch.promote_types(self.dtype, torch.float32))
        noise = torch.randn((*pictures.n.shape, *latents.shape[1:]), dtype=latents.dtype, device=latents.device)
        return self.noised(pictures, latents, noise)

    def update(self, given: Batch | Pictures, condition: Conditioning | None = None) -> float:
        """One step of the optimiser; the loss as it is logged. condition: of a batch's prompts, or of the captions
        where the script keeps them."""
        loss = self.backward(given, condition) if isinstance(given, Batch) else self.on_pictures(given, condition)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def on_pictures(self, pictures: Pictures, condition: Conditioning | None) -> float:
        loss = 0.0
        for part in self.parts(len(pictures)):
            shown = pictures.rows(part)
            text = self.conditions(shown.captions) if self.encodes_captions else condition.rows(part)
            loss += self.micro_batch(self.encoded(shown), text, self.share(len(pictures)))
        return loss

    def backward(self, batch: Batch, condition: Conditioning) -> float:
        """The gradients of a batch, added to the parameters; the loss."""
        loss = 0.0
        for part in self.parts(len(batch.prompts)):
            sides = [side.rows(part) for side in batch.sides]
            tied = None if batch.tied is None else batch.tied[part]
            shown = Batch(batch.prompts[part], *sides, tied=tied)
            loss += self.micro_batch(shown, condition.rows(shown.prompts), self.share(len(batch.prompts)))
        return loss

    def share(self, pairs: int) -> float:
        """Of a micro-batch in the update."""
        return self.form.pairs / pairs

    def parts(self, pairs: int) -> list[slice]:
        if pairs % self.form.pairs:
            raise ValueError(f"{pairs} pairs of an update are no multiple of a micro-batch's {self.form.pairs}")
        return [slice(start, start + self.form.pairs) for start in range(0, pairs, self.form.pairs)]

    @abstractmethod
    def micro_batch(self, batch: Batch, text: Conditioning, share: float) -> float:
        """Forward and backward of some pairs, text with a row for each; their part of the loss as it is logged."""


def log_probability(schedule: Schedule, n: Tensor, x: Tensor, eps: Tensor, following: Tensor) -> Tensor:
    """log p(x_{n-1} | x_n) [B] of the few-step kernel, the mean over latent elements, n >= 2.

    Renoise (DMD2): the clean latent is predicted and noised anew to the next level. Ancestral (Turbo): a step of Euler
    to sigma_down, noise sigma_up.
    """
    here, there = schedule.at(n, x), schedule.at(n - 1, x)
    if schedule.exploding:
        sigma, to = ((1 - here) / here).sqrt(), ((1 - there) / there).sqrt()
        std = (to**2 * (sigma**2 - to**2) / sigma**2).sqrt()
        mean = x + eps * ((to**2 - std**2).sqrt() - sigma)
    else:
        clean = (x - (1 - here).sqrt() * eps) / here.sqrt()
        mean, std = there.sqrt() * clean, (1 - there).sqrt()
    found = -((following - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return found.mean((1, 2, 3))
