"""One entry of models.yaml -> a loaded policy and its sampler."""

import pickle

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from pso import mdp
from pso.config import ConfigError, import_module
from pso.entries import Checkpoint, MetricEntry, ModelEntry
from pso.hub import Hub
from pso.policy import Policy
from pso.provenance import UserError

SAMPLERS = {"renoise": mdp.Renoise, "ancestral": mdp.Ancestral, "ddim": mdp.Ddim, "euler": mdp.Euler}


def spaced_times(spacing: str, num_steps: int, num_train_steps: int = 1000) -> list[int]:
    """The falling grid of diffusers' `timestep_spacing`; "leading" with SDXL's steps_offset = 1."""
    if spacing == "leading":
        return [k * (num_train_steps // num_steps) + 1 for k in reversed(range(num_steps))]
    ratio = num_train_steps / num_steps
    return (np.round(np.arange(num_train_steps, 0, -ratio)).astype(int) - 1).tolist()  # with its rounding


def chain_for(name: str, entry: ModelEntry, num_steps: int) -> mdp.Chain:
    """The sampler with `num_steps` steps."""
    grid = entry.grids.get(num_steps)
    if grid is None:
        steps = ", ".join(map(str, entry.grids))
        raise ConfigError(f"models.{name}.grids has no grid for {num_steps} steps; it has {steps}.")
    times = spaced_times(grid, num_steps) if isinstance(grid, str) else grid
    if len(times) != num_steps:
        raise ConfigError(f"models.{name}.grids.{num_steps} has {len(times)} times; expected {num_steps}.")
    return SAMPLERS[entry.sampler](times)


def load_policy(entry: ModelEntry, hub: Hub, dtype: torch.dtype = torch.float32) -> Policy:
    """The pipeline of an entry, from safetensors or a state dict read with weights_only."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one line per small file says nothing
    base = hub.repo(entry.base)
    hub.weights(entry.base)
    parts = {}
    if entry.vae is not None:
        hub.weights(entry.vae)
        parts["vae"] = AutoencoderKL.from_pretrained(hub.repo(entry.vae), dtype=dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        base, dtype=dtype, use_safetensors=True, local_files_only=True, add_watermarker=False, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    check_tokenizers(pipeline)
    if entry.unet is not None:
        load_unet(pipeline, hub, entry)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Policy(pipeline.to(device), entry.resolution, entry.guidance_scale)


def load_unet(pipeline: StableDiffusionXLPipeline, hub: Hub, entry: ModelEntry) -> None:
    """Put a distilled UNet's state dict in place of the base's; every key must match."""
    path = hub.file(entry.unet.repo, entry.unet.file)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        pipeline.unet.load_state_dict(state, strict=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is not a state dict of {entry.base}'s UNet ({first}); fetch it again.") from error


def check_tokenizers(pipeline: StableDiffusionXLPipeline) -> None:
    """A missing vocabulary loads silently as a tokenizer of two words; its text encoder knows better."""
    for kind in ("", "_2"):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{kind}"), getattr(pipeline, f"text_encoder{kind}")
        if len(tokenizer) != encoder.config.vocab_size:
            raise UserError(
                f"tokenizer{kind} has {len(tokenizer)} tokens and text_encoder{kind} has {encoder.config.vocab_size}; "
                "a file of the tokenizer is missing or from another model: fetch the base model again."
            )


def load_metric(name: str, entry: MetricEntry, hub: Hub, device, model: str | None = None):
    """A scorer: `spec` and `score(images, prompts) -> Tensor [B]`.

    `model`: what it is to be a reward for. A head with {model} in its file is made for each of them.
    """
    module = import_module(entry.module, f"metrics.{name}.module")
    files = {}
    if entry.checkpoint is not None:
        files["model"] = _checkpoint(entry.checkpoint, hub)
        files["processor"] = hub.repo(entry.checkpoint.processor or entry.checkpoint.repo)
    if entry.head is not None:
        if "{model}" in (entry.head.file or "") and model is None:
            raise ConfigError(f"metrics.{name} has a head for each model, so it can only be a method's reward.")
        files["head"] = _checkpoint(entry.head, hub, model)
    try:
        return module.load(files, device)
    except (ValueError, OSError) as error:  # a file of another model, or a broken one
        raise UserError(f"metrics.{name} cannot be loaded: {error}") from error


def _checkpoint(checkpoint: Checkpoint, hub: Hub, model: str | None = None):
    if checkpoint.file is not None:
        return hub.file(checkpoint.repo, checkpoint.file.replace("{model}", model or ""))
    hub.weights(checkpoint.repo)
    return hub.repo(checkpoint.repo)
