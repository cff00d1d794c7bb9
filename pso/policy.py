"""One frozen network with a LoRA: theta with the adapter, pre without it. Never a second copy.

Text encoding, guidance, autocast, the VAE, counting of network calls and the LoRA file all live
here, so that sampling and training run under the same numerics.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from pso import state_dicts
from pso.entries import Speed
from pso.masters import Masters
from pso.mdp import Chain
from pso.paths import LORA_FILE
from pso.provenance import UserError, atomic
from pso.speed import attention, compile_blocks
from pso.trees import with_lora_added, without_lora

ADAPTER = "theta"
SHORT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Conditioning:
    """SDXL's text condition of P prompts: hidden [P, L, D], pooled [P, D']."""

    hidden: Tensor
    pooled: Tensor

    def rows(self, index: Tensor | slice) -> "Conditioning":
        index = index.to(self.hidden.device, non_blocking=True) if isinstance(index, Tensor) else index
        return Conditioning(self.hidden[index], self.pooled[index])

    def followed_by(self, other: "Conditioning") -> "Conditioning":
        return Conditioning(torch.cat([self.hidden, other.hidden]), torch.cat([self.pooled, other.pooled]))

    def __len__(self) -> int:
        return len(self.hidden)


class Policy:
    """A loaded SDXL-type pipeline as a policy. `resolution` in px, `dtype` of the frozen weights.

    `guidance_embedding` is the guidance that a UNet with time_cond_proj_dim (SDXL-LCM's) is told of in every
    call; without it such a UNet would run silently wrong. `name`: the entry's in models.yaml. `speed`: the scale's.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        resolution: int,
        guidance_scale: float = 0.0,
        guidance_embedding: float | None = None,
        name: str = "<name>",
        speed: Speed | None = None,
    ):
        self.pipeline, self.resolution, self.guidance_scale = pipeline, resolution, guidance_scale
        self.timestep_cond = _timestep_cond(pipeline, guidance_embedding, name)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False).eval()
        self.speed = speed or Speed()
        self.previewed: tuple[str, AutoencoderTiny] | None = None
        self._pre = self._sampler = self.masters = None
        if self.speed.channels_last:
            for part in (pipeline.unet, pipeline.vae):
                part.to(memory_format=torch.channels_last)
        if self.speed.compile:
            compile_blocks(pipeline.unet)
            compile_blocks(pipeline.vae.decoder)
        size = float(resolution)
        self._time_ids = torch.tensor([size, size, 0.0, 0.0, size, size])
        self.unet_forwards = 0  # images through the network, guidance counted twice

    # -- sizes --

    @property
    def unet(self):
        return self.pipeline.unet

    @property
    def pre_unet(self):
        """The network without its adapter, for good: nothing is switched off for it and on again."""
        if self._pre is None:
            self._pre = without_lora(self.unet)
            if self.speed.compile:
                compile_blocks(self._pre)
        return self._pre

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipeline.vae_scale_factor
        return (self.unet.config.in_channels, side, side)

    @property
    def numerics(self) -> dict:
        """What the same numbers depend on beside weights and code, for run.json."""
        processors = {type(p).__name__ for p in self.unet.attn_processors.values()}
        return {
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "vae_dtype": str(self.pipeline.vae.dtype).removeprefix("torch."),
            "allow_tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
            "attention": sorted(processors),
            "speed": self.speed.model_dump(),
            **({} if self.previewed is None else {"preview_vae": self.previewed[0]}),
        }

    # -- text --

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], batch_size: int = 64) -> Conditioning:
        """SDXL's two text encoders, as the pipeline itself runs them (77 tokens, no negative prompt)."""
        parts = [
            self.pipeline.encode_prompt(prompts[i : i + batch_size], do_classifier_free_guidance=False)
            for i in range(0, len(prompts), batch_size)
        ]
        return Conditioning(torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts]))

    def truncated_prompts(self, prompts: list[str]) -> int:
        """How many prompts are longer than the tokenizer's window (they are cut, as diffusers does)."""
        tokenizer = self.pipeline.tokenizer
        lengths = [len(ids) for ids in tokenizer(prompts, truncation=False)["input_ids"]]
        return sum(length > tokenizer.model_max_length for length in lengths)

    # -- the network --

    def eps(self, chain: Chain, n: Tensor, x: Tensor, condition: Conditioning, pre: bool = False) -> Tensor:
        """eps_theta, or eps_pre with `pre`, at x_n.

        n [...] CPU, x [..., C, H, W], condition with one row per element of n (flattened order).
        Returns float32 (of a float64 network float64) of x's shape. pre runs without a graph.
        """
        shape, flat = x.shape, x.reshape(-1, *x.shape[-3:])
        t = chain.time(n).reshape(-1).to(flat.device, non_blocking=True)
        shown = chain.scale_input(n.reshape(-1), flat)
        with torch.no_grad() if pre else contextlib.nullcontext():
            eps = self._network(shown, t, condition, pre)
        return eps.to(torch.promote_types(eps.dtype, torch.float32)).reshape(shape)

    def guided_eps(self, chain: Chain, n: Tensor, x: Tensor, condition: Conditioning, pre: bool = False) -> Tensor:
        """What the sampler steps by: classifier-free guidance where guidance_scale > 1 (diffusers' rule), else eps.

        The negative condition is zeros, as SDXL's `force_zeros_for_empty_prompt` makes it.
        """
        if self.guidance_scale <= 1:
            return self.eps(chain, n, x, condition, pre)
        nothing = Conditioning(torch.zeros_like(condition.hidden), torch.zeros_like(condition.pooled))
        both = nothing.followed_by(condition)
        negative, positive = self.eps(chain, torch.cat([n, n]), torch.cat([x, x]), both, pre).chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _network(self, shown: Tensor, t: Tensor, condition: Conditioning, pre: bool = False) -> Tensor:
        network = self.pre_unet if pre else self.unet
        if self._sampler is not None and not pre and not torch.is_grad_enabled():
            network = self._sampler
        time_ids = self._time_ids.to(shown.device, non_blocking=True).expand(len(shown), 6)
        self.unet_forwards += len(shown)
        dtype = self.unet.dtype
        mixed = dtype in SHORT and self.speed.lora_compute == "float32"
        with torch.autocast(shown.device.type, dtype, enabled=mixed), attention(self.speed.attention):
            return network(
                shown.to(dtype),
                t,
                timestep_cond=self._told(shown, dtype),
                encoder_hidden_states=condition.hidden.to(shown.device, dtype),
                added_cond_kwargs={
                    "text_embeds": condition.pooled.to(shown.device, dtype),
                    "time_ids": time_ids.to(dtype),
                },
            ).sample

    def _told(self, shown: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The guidance embedding, one row per input."""
        if self.timestep_cond is None:
            return None
        return self.timestep_cond.to(shown.device, dtype, non_blocking=True).expand(len(shown), -1)

    # -- adapter --

    @property
    def has_adapter(self) -> bool:
        return ADAPTER in (getattr(self.unet, "peft_config", None) or {})

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, and without a graph, theta is one network with the LoRA added to its weights, where
        `speed.merge_lora` says so. The weights are added on entering: the LoRA must not change within."""
        if not (self.speed.merge_lora and self.has_adapter and self._sampler is None):
            yield
            return
        self._sampler = with_lora_added(self.unet, ADAPTER)
        try:
            yield
        finally:
            self._sampler = None

    def add_lora(self, rank: int, targets: list[str], seed: int) -> None:
        """A fresh adapter, alpha = rank, A gaussian and B zero: theta = pre. Float32 whatever the base is.

        ValueError where a target is no layer of the UNet; PEFT says so only if none of them is.
        """
        names = [f".{name}" for name, _ in self.unet.named_modules()]
        absent = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
        if absent:
            raise ValueError(f"it has no layer {' or '.join(absent)}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"), ADAPTER
            )
        for parameter in self.lora_parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if self.speed.lora_compute == "base" and self.unet.dtype in SHORT:
            self.masters = Masters(self._lora(), self.unet.dtype)
        self._adapted()

    def _adapted(self) -> None:
        """After layers were put around those of the network."""
        self._pre = None
        if self.unet.dtype not in SHORT:
            return
        if self.speed.lora_compute == "base":
            for _, parameter in self._lora():
                parameter.data = parameter.data.to(self.unet.dtype)
        for module in self.unet.modules():  # autocast rounds its weights: an input made longer for them is cut again
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False

    def gradient_checkpointing(self, on: bool) -> None:
        """Form most activations once more in the backward pass instead of keeping them."""
        (self.unet.enable_gradient_checkpointing if on else self.unet.disable_gradient_checkpointing)()

    def lora_parameters(self) -> list[torch.nn.Parameter]:
        """Float32: what is trained."""
        if self.masters is not None:
            return list(self.masters.full.values())
        return [p for _, p in self._lora()]

    def _lora(self) -> list[tuple[str, torch.nn.Parameter]]:
        """As the network holds it."""
        return [(name, p) for name, p in self.unet.named_parameters() if f".{ADAPTER}." in name]

    def lora_changed(self) -> None:
        """To be told after every step of the optimiser."""
        if self.masters is not None:
            self.masters.refresh()

    def lora_state(self) -> dict[str, Tensor]:
        """PEFT's names, for checkpoints."""
        if self.masters is not None:
            return {name.replace(f".{ADAPTER}.", "."): p.detach() for name, p in self.masters.full.items()}
        return get_peft_model_state_dict(self.unet, adapter_name=ADAPTER)

    @torch.no_grad()
    def set_lora_state(self, state: dict[str, Tensor]) -> None:
        if self.masters is not None:
            for name, parameter in self.masters.full.items():
                parameter.copy_(state[name.replace(f".{ADAPTER}.", ".")])
        result = set_peft_model_state_dict(self.unet, state, adapter_name=ADAPTER)
        if result is not None and result.unexpected_keys:
            raise ValueError(f"LoRA state has unknown keys, the first is {result.unexpected_keys[0]}")

    def save_lora(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` as `pipe.load_lora_weights(folder)` of diffusers reads it.

        PEFT's key names throughout: `convert_state_dict_to_diffusers` renames attention layers only, and
        of a file with both kinds of names the loader silently drops one.
        """
        with atomic(Path(folder) / LORA_FILE) as part:
            StableDiffusionXLPipeline.save_lora_weights(
                str(part.parent), unet_lora_layers=self.lora_state(), weight_name=part.name,
                save_function=lambda state, path: state_dicts.write(path, state, {"format": "pt"}),
            )  # fmt: skip

    def load_lora(self, folder: Path) -> None:
        """Through the pipeline's own door, as any user of the file; every tensor of it must arrive. A file like the one
        before, with the same tensors of the same shapes, takes its place without new layers."""
        if self._takes_place(Path(folder) / LORA_FILE):
            return
        self.unload_lora()
        self.pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=ADAPTER)
        self._adapted()
        with safe_open(Path(folder) / LORA_FILE, "pt") as file:
            stored = sum(key.endswith(".weight") for key in file.keys())  # noqa: SIM118
        if len(self.lora_state()) != stored:
            raise UserError(
                f"{folder}/{LORA_FILE} holds {stored} tensors, but diffusers loaded {len(self.lora_state())} of them; "
                "are its key names of two kinds, or is it for another model?"
            )

    def _takes_place(self, path: Path) -> bool:
        with safe_open(path, "pt") as file:
            state = {key.removeprefix("unet."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            own_scale = "lora_adapter_metadata" in (file.metadata() or {})
        held = self.lora_state() if self.has_adapter and self.masters is None else {}
        if own_scale or {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in held.items()}:
            return False
        self.set_lora_state(state)
        return True

    def unload_lora(self) -> None:
        self.masters = None
        if self.has_adapter:
            self.pipeline.delete_adapters(ADAPTER)

    # -- pixels --

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> uint8 images [B, H, W, 3] on the CPU, rounded as diffusers does."""
        return _pictures(self.pipeline.vae, latents)

    def preview_by(self, repo: str, vae: AutoencoderTiny) -> None:
        """Have rewards in training and probes look at pictures by this VAE of the repository."""
        self.previewed = repo, vae.requires_grad_(False).eval()

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """`decode` for rewards in training and for probes: by the preview VAE, where the model's entry names one."""
        if self.previewed is None:
            return self.decode(latents)
        return _pictures(self.previewed[1], latents)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images [B, H, W, 3] -> mean and std of the latent posterior, scaled, float32."""
        vae = self.pipeline.vae
        pixels = images.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        return tuple((v * vae.config.scaling_factor).float() for v in (posterior.mean, posterior.std))


def _pictures(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] -> uint8 [B, H, W, 3] on the CPU."""
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    unit = (decoded / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _timestep_cond(pipeline: StableDiffusionXLPipeline, guidance: float | None, name: str) -> Tensor | None:
    """diffusers' embedding [1, D] of guidance - 1 for a UNet that takes one."""
    dim, field = pipeline.unet.config.time_cond_proj_dim, f"models.{name}.guidance_embedding"
    if dim is None and guidance is not None:
        raise UserError(f"{field} is {guidance}, but this UNet takes none (no time_cond_proj_dim); leave it out.")
    if dim is None:
        return None
    if guidance is None:
        raise UserError(f"{field} is missing, but this UNet takes one (time_cond_proj_dim is {dim}); write 8.0, say.")
    return pipeline.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), embedding_dim=dim)


def to_images(batch: Tensor) -> list[Image.Image]:
    """uint8 [B, H, W, 3] -> Pillow images."""
    return [Image.fromarray(image.numpy()) for image in batch]
