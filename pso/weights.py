"""The networks of a pipeline from the hub's files, every tensor of which has its place; LoRAs are in pso/lora_files.py.

diffusers and transformers warn where a file lacks a tensor, draw it at random and go on. So the files are read here:
their names, shapes and types are compared with the network's on the meta device before any weight is.
"""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from pso import state_dicts
from pso.entries import Delta, UNetSource
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE
from pso.provenance import UserError

# what the loaders raise on a missing, cut or foreign file
BROKEN = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
STEM = "diffusion_pytorch_model"  # diffusers' name of a network's file
DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of a VAE's attention


def from_hub(repo: str, hub: Hub, load: Callable, *arguments):
    """load(...), or a sentence that names the repository and what is wrong with its files."""
    try:
        return load(*arguments)
    except UserError:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{repo} in the hub {hub.root} cannot be loaded ({reason}); fetch it again.") from error


# ---- networks of diffusers ----


def on_meta(of: type[ModelMixin], folder: Path) -> ModelMixin:
    """A network of the sizes in its folder's config.json, without memory. ValueError where it is of another class."""
    config = state_dicts.read_json(folder / "config.json")
    if (found := config.get("_class_name")) != of.__name__:
        raise ValueError(f"{folder}/config.json is of a {found}; expected {of.__name__}")
    with torch.device("meta"):
        return of.from_config(config)


def filled(network: ModelMixin, state: dict[str, Tensor]) -> ModelMixin:
    """The meta network with these tensors as its own; they were checked."""
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def network(of: type[ModelMixin], folder: Path, dtype: torch.dtype | None) -> ModelMixin:
    """From a folder of diffusers."""
    empty, paths = on_meta(of, folder), state_dicts.weight_files(folder, STEM)
    found = state_dicts.headers(paths)
    names = present_names(found, empty)
    state_dicts.check({names[key]: value for key, value in found.items()}, empty.state_dict(), folder)
    return filled(empty, {names[key]: value for key, value in state_dicts.tensors(paths, dtype).items()})


def present_names(found: Iterable[str], network: ModelMixin) -> dict[str, str]:
    """A file's names -> the network's: the attention of VAEs had others before 2023."""
    own, found = network.state_dict().keys(), set(found)

    def present(key: str) -> str:
        place, _, kind = key.rpartition(".")
        block, _, part = place.rpartition(".")
        renamed = f"{block}.{DEPRECATED.get(part, part)}.{kind}"
        return renamed if key not in own and renamed in own and renamed not in found else key

    return {key: present(key) for key in found}


def load_vae(hub: Hub, repo: str, subfolder: str | None, dtype: torch.dtype) -> AutoencoderKL:
    return _in_hub(AutoencoderKL, hub, repo, subfolder, dtype)


def load_preview_vae(hub: Hub, repo: str, dtype: torch.dtype, px: int) -> AutoencoderTiny:
    """A tiny VAE of the pipeline's latents, which are `px` pixels wide and not scaled once more."""
    found = _in_hub(AutoencoderTiny, hub, repo, None, dtype)
    config = found.config
    own = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
    if (own, config.latent_channels, config.scaling_factor) != (px, 4, 1.0):
        raise UserError(
            f"the preview VAE {repo} makes {own} px of a latent of {config.latent_channels} channels, scaled by "
            f"{config.scaling_factor}; expected {px} px of 4 channels, scaled by 1: take one of SDXL's latents."
        )
    return found


def load_unet(hub: Hub, source: UNetSource, base: str, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """A folder with its own config, or a state dict on the UNet of the pipeline `base`. dtype None: as stored."""
    if source.file is None:
        return _in_hub(UNet2DConditionModel, hub, source.repo, source.subfolder, dtype)
    folder = _folder(hub, base, "unet")
    empty = from_hub(base, hub, on_meta, UNet2DConditionModel, folder)
    hub.read(base, [folder / "config.json"])
    path = hub.file(source.repo, source.file)
    try:
        state = state_dicts.stored(path)
        state_dicts.check(state, empty.state_dict(), path)
    except ValueError as error:
        raise UserError(f"{path} is not a state dict of the base's UNet ({error}); fetch it again.") from error
    return filled(empty, {key: value if dtype is None else value.to(dtype) for key, value in state.items()})


def _in_hub(of: type[ModelMixin], hub: Hub, repo: str, subfolder: str | None, dtype: torch.dtype | None) -> ModelMixin:
    folder = _folder(hub, repo, subfolder)
    found = from_hub(repo, hub, network, of, folder, dtype)
    hub.read(repo, [folder / "config.json", *state_dicts.weight_files(folder, STEM)])
    return found


def _folder(hub: Hub, repo: str, subfolder: str | None) -> Path:
    return hub.repo(repo) if subfolder is None else hub.folder(repo, subfolder)


@torch.no_grad()
def add_delta(unet: UNet2DConditionModel, hub: Hub, delta: Delta, field: str) -> None:
    """Add scale * (plus - minus); what only this UNet has, as LCM's guidance embedding, stays as it is."""
    source = UNetSource(repo=delta.minus, subfolder="unet")
    plus, minus = (load_unet(hub, one, delta.minus).state_dict() for one in (delta, source))
    own = unet.state_dict()
    for key in sorted(plus.keys() ^ minus.keys()):
        raise UserError(f"{field} is a difference of UNets of two kinds: only one of them has {key}.")
    for key, value in plus.items():
        if key not in own or not own[key].shape == value.shape == minus[key].shape:
            raise UserError(f"{field} does not fit the model's UNet: {key} is missing or of another shape.")
        own[key].add_(delta.scale * (value.float() - minus[key].float()))


# ---- a pipeline ----


def load_text_encoders(hub: Hub, base: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    found = {}
    for name, of in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        folder = hub.folder(base, name)
        found[name] = from_hub(base, hub, state_dicts.from_transformers, of, folder, dtype, "position_ids")
        hub.read(base, [folder / "config.json", *state_dicts.transformers_files(folder)])
    return found


def check_base(pipeline: StableDiffusionXLPipeline, hub: Hub, base: str, vae: str) -> None:
    """The samplers have SDXL's schedule and its prediction built in; another model would load and draw noise."""
    found = pipeline.scheduler.config
    assumed = {**SDXL_SCHEDULE, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None}
    for key, value in assumed.items():
        if found.get(key, value) != value:
            raise UserError(
                f"{key} in scheduler/scheduler_config.json of {base} is {found[key]!r}, and the samplers here assume "
                f"{value!r}; take a base model of SDXL's schedule, or fetch this one again."
            )
    scale, own = pipeline.vae.config.scaling_factor, _scaling_factor(hub.repo(base) / "vae")
    if own not in (None, scale):
        raise UserError(
            f"scaling_factor of the VAE {vae} is {scale}, and {base} was trained with {own}; "
            "take a VAE of the same latents, or fetch it again."
        )
    told, unet = pipeline.text_encoder_2.config.projection_dim, pipeline.unet.config
    if unet.addition_time_embed_dim is not None:
        told += 6 * unet.addition_time_embed_dim
    if told != unet.projection_class_embeddings_input_dim:
        raise UserError(
            f"text_encoder_2 of {base} and six sizes make {told} numbers, and the UNet is told "
            f"{unet.projection_class_embeddings_input_dim} (projection_class_embeddings_input_dim); the two do not "
            "belong together: fetch the base model again."
        )


def _scaling_factor(folder: Path) -> float | None:
    path = folder / "config.json"
    return state_dicts.read_json(path).get("scaling_factor") if path.is_file() else None


def check_tokenizers(pipeline: StableDiffusionXLPipeline) -> None:
    """A missing vocabulary loads silently as a tokenizer of two words; its text encoder knows better."""
    for kind in ("", "_2"):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{kind}"), getattr(pipeline, f"text_encoder{kind}")
        if len(tokenizer) != encoder.config.vocab_size:
            raise UserError(
                f"tokenizer{kind} has {len(tokenizer)} tokens and text_encoder{kind} has {encoder.config.vocab_size}; "
                "a file of the tokenizer is missing or from another model: fetch the base model again."
            )
