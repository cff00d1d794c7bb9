"""One entry of models.yaml -> a loaded policy and its sampler."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from pso import mdp
from pso.config import ConfigError, import_module
from pso.entries import Checkpoint, MetricEntry, ModelEntry
from pso.hub import Hub
from pso.policy import Policy
from pso.provenance import UserError, fingerprint

SAMPLERS = {"renoise": mdp.Renoise, "ancestral": mdp.Ancestral, "ddim": mdp.Ddim, "euler": mdp.Euler}
# what the loaders raise on a missing, cut or foreign file
BROKEN = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
# a tokenizer's files, as far as a repository has them
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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


def load_policy(entry: ModelEntry, hub: Hub, dtype: torch.dtype = torch.float32, device=None) -> Policy:
    """The pipeline of an entry, from safetensors or a state dict read with weights_only; on the GPU if there is one."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one line per small file says nothing
    hub.repo(entry.base)  # asked for first: it is what an empty hub is told to lack
    parts = {}
    if entry.vae is not None:
        parts["vae"] = _pretrained(AutoencoderKL, entry.vae, hub, dtype=dtype)
    options = {"use_safetensors": True, "local_files_only": True, "add_watermarker": False}
    pipeline = _pretrained(StableDiffusionXLPipeline, entry.base, hub, dtype=dtype, **options, **parts)
    pipeline.set_progress_bar_config(disable=True)
    check_tokenizers(pipeline)
    if entry.unet is not None:
        load_unet(pipeline, hub, entry)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Policy(pipeline.to(device), entry.resolution, entry.guidance_scale)


def _pretrained(loader, repo: str, hub: Hub, **options):
    """loader.from_pretrained on a repository of the hub, or a sentence that names what is wrong with its files."""
    folder, weights = hub.repo(repo), hub.weights(repo)
    try:
        return loader.from_pretrained(folder, **options)
    except BROKEN as error:
        reason = _reason(error, weights)
        raise UserError(f"{repo} in the hub {hub.root} cannot be loaded ({reason}); fetch it again.") from error


def _reason(error: Exception, read: Iterable[Path]) -> str:
    """What a loader raised, in one line; not every loader says which file was cut off."""
    cut = next((path for path in read if path.suffix == ".safetensors" and not _opens(path)), None)
    return f"{cut} is cut off or empty" if cut else " ".join(str(error).split()).rstrip(".")


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def load_unet(pipeline: StableDiffusionXLPipeline, hub: Hub, entry: ModelEntry) -> None:
    """Put a distilled UNet's state dict in place of the base's; every key must match."""
    path = hub.file(entry.unet.repo, entry.unet.file)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        pipeline.unet.load_state_dict(state, strict=True)
    except BROKEN as error:
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
    """A scorer: `spec` and `score(images, prompts) -> Tensor [B]`; its spec tells its code and files by their hash.

    `model`: what it is to be a reward for. A head with {model} in its file is made for each of them.
    """
    module = import_module(entry.module, f"metrics.{name}.module")
    own, files = Hub(hub.root, hub.command), {}  # a hub that remembers the files of this scorer alone
    if entry.checkpoint is not None:
        files["model"] = _checkpoint(entry.checkpoint, own)
        files["processor"] = _processor(entry.checkpoint.processor or entry.checkpoint.repo, own)
    if entry.head is not None:
        if "{model}" in (entry.head.file or "") and model is None:
            raise ConfigError(f"metrics.{name} has a head for each model, so it can only be a method's reward.")
        files["head"] = _checkpoint(entry.head, own, model)
    try:
        scorer = module.load(files, device)
    except BROKEN as error:  # a file of another model, or a broken one
        reason = _reason(error, own.used.values())
        raise UserError(f"metrics.{name} cannot be loaded ({reason}); fetch its files again.") from error
    hub.used |= own.used
    spec = {**scorer.spec, "code": fingerprint(entry.module)}
    if own.used:
        spec["files"] = {f"{i['repo']}/{i['file']}": i["sha256"] for i in own.inputs()}
    scorer.spec = spec  # on the scorer: its class may share the old one with others
    return scorer


def _checkpoint(checkpoint: Checkpoint, hub: Hub, model: str | None = None) -> Path:
    if checkpoint.file is not None:
        return hub.file(checkpoint.repo, checkpoint.file.replace("{model}", model or ""))
    hub.files(checkpoint.repo, "model*.safetensors")  # as transformers names them; others lie beside them unread
    hub.file(checkpoint.repo, "config.json")
    return hub.repo(checkpoint.repo)


def _processor(repo: str, hub: Hub) -> Path:
    folder = hub.repo(repo)
    for name in TOKENIZER:
        if (folder / name).is_file():
            hub.file(repo, name)
    return folder
