"""One entry of models.yaml -> a loaded policy and its sampler."""

import inspect
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

from pso import mdp, state_dicts, weights
from pso.config import ConfigError, import_module
from pso.entries import Checkpoint, MetricEntry, ModelEntry, Speed, UNetSource
from pso.hub import Hub
from pso.lora_files import fuse_loras
from pso.policy import Policy
from pso.provenance import UserError, fingerprint, sha256_of
from pso.weights import BROKEN

SAMPLERS = {"renoise": mdp.Renoise, "ancestral": mdp.Ancestral, "ddim": mdp.Ddim, "euler": mdp.Euler}
# bfloat16 keeps 8 bits of a pixel; the mended VAE was made for float16, which keeps 11
VAE_DTYPES = {torch.bfloat16: torch.float16}
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
    entry: ModelEntry,
    hub: Hub,
    dtype: torch.dtype = torch.float32,
    device=None,
    name: str = "<name>",
    speed: Speed | None = None,
) -> Policy:
    """The pipeline of an entry, from safetensors or a state dict read with weights_only; on the GPU if there is one.

    `name`: the entry's in models.yaml, for sentences. A composition is added up in float32 and rounded once.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one line per small file says nothing
    hub.repo(entry.base)  # asked for first: it is what an empty hub is told to lack
    source = entry.unet or UNetSource(repo=entry.base, subfolder="unet")
    unet = weights.load_unet(hub, source, entry.base, torch.float32 if entry.deltas or entry.loras else dtype)
    vae = (entry.base, "vae") if entry.vae is None else (entry.vae, None)
    parts = {
        "unet": unet,
        "vae": weights.load_vae(hub, *vae, VAE_DTYPES.get(dtype, dtype)),
        **weights.load_text_encoders(hub, entry.base, dtype),
    }
    pipeline = weights.from_hub(entry.base, hub, partial(_assembled, hub.repo(entry.base), parts))
    pipeline.set_progress_bar_config(disable=True)
    weights.check_tokenizers(pipeline)
    weights.check_base(pipeline, hub, entry.base, vae[0])
    for i, delta in enumerate(entry.deltas):
        weights.add_delta(unet, hub, delta, f"models.{name}.deltas[{i}]")
    fuse_loras(pipeline, hub, entry.loras, f"models.{name}.loras")
    if pipeline.unet.dtype != dtype:
        pipeline.unet.to(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    guidance = entry.guidance_scale, entry.guidance_embedding
    return Policy(pipeline.to(device), entry.resolution, *guidance, name, speed)


def _assembled(folder: Path, parts: dict) -> StableDiffusionXLPipeline:
    """The pipeline's tokenizers and scheduler, with networks that are loaded already."""
    of = StableDiffusionXLPipeline
    if (found := state_dicts.read_json(folder / "model_index.json").get("_class_name")) != of.__name__:
        raise ValueError(f"{folder}/model_index.json is of a {found}; expected {of.__name__}")
    return of.from_pretrained(folder, local_files_only=True, add_watermarker=False, **parts)


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
        reason = " ".join(str(error).split()).rstrip(".")
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
    hub.file(checkpoint.repo, "config.json")
    folder = hub.repo(checkpoint.repo)
    hub.read(checkpoint.repo, weights.from_hub(checkpoint.repo, hub, state_dicts.transformers_files, folder))
    return folder


def _processor(repo: str, hub: Hub) -> Path:
    folder = hub.repo(repo)
    for name in TOKENIZER:
        if (folder / name).is_file():
            hub.file(repo, name)
    return folder
