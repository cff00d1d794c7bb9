"""One entry of models.yaml -> a loaded policy and its sampler."""

import inspect
import pickle
from collections.abc import Iterable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pso import mdp
from pso.config import ConfigError, import_module
from pso.entries import Checkpoint, Delta, Lora, MetricEntry, ModelEntry, UNetSource
from pso.hub import Hub
from pso.policy import Policy
from pso.provenance import UserError, fingerprint, sha256_of

SAMPLERS = {"renoise": mdp.Renoise, "ancestral": mdp.Ancestral, "ddim": mdp.Ddim, "euler": mdp.Euler}
# what the loaders raise on a missing, cut or foreign file
BROKEN = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
# a tokenizer's files, as far as a repository has them
TOKENIZER = (
    *("vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


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


def load_policy(
    entry: ModelEntry, hub: Hub, dtype: torch.dtype = torch.float32, device=None, name: str = "<name>"
) -> Policy:
    """The pipeline of an entry, from safetensors or a state dict read with weights_only; on the GPU if there is one.

    `name`: the entry's in models.yaml, for sentences. A composition is added up in float32 and rounded once.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one line per small file says nothing
    hub.repo(entry.base)  # asked for first: it is what an empty hub is told to lack
    parts = {}
    if entry.vae is not None:
        parts["vae"] = _pretrained(AutoencoderKL, entry.vae, hub, dtype=dtype)
    options = {"use_safetensors": True, "local_files_only": True, "add_watermarker": False}
    exact = {"unet": torch.float32, "default": dtype} if entry.deltas or entry.loras else dtype
    pipeline = _pretrained(StableDiffusionXLPipeline, entry.base, hub, dtype=exact, **options, **parts)
    pipeline.set_progress_bar_config(disable=True)
    check_tokenizers(pipeline)
    if entry.unet is not None:
        load_unet(pipeline, hub, entry.unet)
    for i, delta in enumerate(entry.deltas):
        add_delta(pipeline, hub, delta, f"models.{name}.deltas[{i}]")
    fuse_loras(pipeline, hub, entry.loras, f"models.{name}.loras")
    if pipeline.unet.dtype != dtype:
        pipeline.unet.to(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Policy(pipeline.to(device), entry.resolution, entry.guidance_scale, entry.guidance_embedding, name)


def _pretrained(loader, repo: str, hub: Hub, **options):
    """loader.from_pretrained on a repository of the hub, or a sentence that names what is wrong with its files."""
    folder, weights = hub.repo(repo), hub.weights(repo, options.get("subfolder") or "")
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


# ---- another UNet, differences of UNets, LoRAs ----


def load_unet(pipeline: StableDiffusionXLPipeline, hub: Hub, source: UNetSource) -> None:
    """Put a distilled UNet in place of the base's: a state dict, every key of which must match, or a folder."""
    if source.file is None:
        pipeline.register_modules(unet=_unet(source, hub, pipeline.unet.dtype))
        return
    path, state = _state_dict(source, hub)
    try:
        pipeline.unet.load_state_dict(state, strict=True)
    except BROKEN as error:
        raise _not_a_unet(path, error) from error


def _unet(source: UNetSource, hub: Hub, dtype: torch.dtype) -> UNet2DConditionModel:
    options = {"use_safetensors": True, "local_files_only": True}
    if source.subfolder is not None:
        options["subfolder"] = source.subfolder
    return _pretrained(UNet2DConditionModel, source.repo, hub, dtype=dtype, **options)


def _state_dict(source: UNetSource, hub: Hub) -> tuple[Path, dict[str, Tensor]]:
    path = hub.file(source.repo, source.file)
    try:
        if path.suffix == ".safetensors":
            return path, load_file(path)
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise _not_a_unet(path, error) from error


def _not_a_unet(path: Path, error: Exception) -> UserError:
    first = str(error).strip().splitlines()[0]
    return UserError(f"{path} is not a state dict of the base's UNet ({first}); fetch it again.")


@torch.no_grad()
def add_delta(pipeline: StableDiffusionXLPipeline, hub: Hub, delta: Delta, field: str) -> None:
    """Add scale * (plus - minus); what only the pipeline's UNet has, as LCM's guidance embedding, stays as it is."""
    minus = _unet(UNetSource(repo=delta.minus, subfolder="unet"), hub, torch.float32).state_dict()
    plus = _unet(delta, hub, torch.float32).state_dict() if delta.file is None else _state_dict(delta, hub)[1]
    own = pipeline.unet.state_dict()
    for key in sorted(plus.keys() ^ minus.keys()):
        raise UserError(f"{field} is a difference of UNets of two kinds: only one of them has {key}.")
    for key, value in plus.items():
        if key not in own or not own[key].shape == value.shape == minus[key].shape:
            raise UserError(f"{field} does not fit the model's UNet: {key} is missing or of another shape.")
        own[key].add_(delta.scale * (value.float() - minus[key]))


def fuse_loras(pipeline: StableDiffusionXLPipeline, hub: Hub, loras: list[Lora], field: str) -> None:
    """Through the pipeline's own door, which applies each file's alpha; then into the weights, so that pre has them."""
    names = [f"part{i}" for i in range(len(loras))]
    for i, (lora, name) in enumerate(zip(loras, names, strict=True)):
        path = hub.file(lora.repo, lora.file)
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
            with safe_open(path, "pt") as file:
                stored = sum(key.endswith(".weight") for key in file.keys())  # noqa: SIM118
        except BROKEN as error:
            raise UserError(f"{field}[{i}] cannot be loaded ({_reason(error, [path])}); fetch it again.") from error
        found = len(get_peft_model_state_dict(pipeline.unet, adapter_name=name))
        if found != stored:
            raise UserError(
                f"{field}[{i}] has {stored} tensors in {path}, but {found} fit the UNet; is it for another model?"
            )
    if names:
        pipeline.set_adapters(names, [lora.scale for lora in loras])
        pipeline.fuse_lora(components=["unet"], adapter_names=names)
        pipeline.unload_lora_weights()


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
    transformers.utils.logging.disable_progress_bar()  # one line per small file says nothing
    field = "module" if entry.implementation == "ours" else "implementation"
    module = import_module(entry.loader, f"metrics.{name}.{field}")
    own = Hub(hub.root, hub.command)  # a hub that remembers the files of this scorer alone
    files = metric_files(name, entry, own, model)
    if unknown := sorted(set(entry.settings) - set(inspect.signature(module.load).parameters)):
        raise ConfigError(f"metrics.{name}.settings has {unknown[0]!r}, which {entry.loader} does not take.")
    try:
        scorer = module.load(files, device, **entry.settings)
    except UserError:  # says itself what is wrong
        raise
    except BROKEN as error:  # a file of another model, or a broken one
        reason = _reason(error, own.used.values())
        raise UserError(f"metrics.{name} cannot be loaded ({reason}); fetch its files again.") from error
    hub.used |= own.used
    spec = {**scorer.spec, "metric": name, "code": fingerprint(entry.loader)}
    if own.used:
        spec["files"] = {f"{i['repo']}/{i['file']}": i["sha256"] for i in own.inputs()}
    scorer.spec = spec  # on the scorer: its class may share the old one with others
    scorer.compared_with = entry.compared_with
    if (entry.compared_with is not None) != ("others" in inspect.signature(scorer.score).parameters):
        raise ConfigError(
            f"metrics.{name}.compared_with is {entry.compared_with}, but score() of {entry.loader} takes "
            f"{'no ' if entry.compared_with else ''}others; expected one of pictures, untuned and siblings where it "
            "takes others, else none."
        )
    return scorer


def metric_files(name: str, entry: MetricEntry, hub: Hub, model: str | None = None) -> dict[str, Path]:
    """What a scorer's load() is given: `model`, `processor`, `head`, `architecture`, as far as the entry has them."""
    files = {}
    if entry.checkpoint is not None:
        files["model"] = _checkpoint(entry.checkpoint, hub)
        files["processor"] = _processor(entry.checkpoint.processor or entry.checkpoint.repo, hub)
    if entry.head is not None:
        if "{model}" in (entry.head.file or "") and model is None:
            raise ConfigError(f"metrics.{name} has a head for each model, so it can only be a method's reward.")
        files["head"] = _checkpoint(entry.head, hub, model)
    if entry.architecture is not None:
        files["architecture"] = _checkpoint(entry.architecture, hub)
    return files


def _checkpoint(checkpoint: Checkpoint, hub: Hub, model: str | None = None) -> Path:
    if checkpoint.file is not None:
        path = hub.file(checkpoint.repo, checkpoint.file.replace("{model}", model or ""))
        if checkpoint.sha256 not in (None, found := sha256_of(path)):
            raise UserError(f"{path} has sha256 {found}; expected {checkpoint.sha256}: fetch it again.")
        return path
    hub.files(checkpoint.repo, "model*.safetensors")  # as transformers names them; others lie beside them unread
    hub.file(checkpoint.repo, "config.json")
    return hub.repo(checkpoint.repo)


def _processor(repo: str, hub: Hub) -> Path:
    folder = hub.repo(repo)
    for name in TOKENIZER:
        if (folder / name).is_file():
            hub.file(repo, name)
    return folder
