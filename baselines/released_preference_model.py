"""The step-aware preference model that SPO's authors published (Liang et al. 2024), as a reward.

Unlike ours (baselines/preference_model.py) it is a whole CLIP, trained on SDXL's predictions at all times: every
vision layer is modulated, t = 0..999 enters through a sinusoid and an MLP, gates multiply as they are (at their
initialisation they are 1), and the pictures are resized as tensors. Its file is a state dict with `model.` before every
key, read with weights_only; each key has to find its place.

Deviation: a picture is read from 8 bits, as every scorer here does; the authors hand over the decoder's floats.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from baselines.preference_model import modulated_features
from eval.clip_model import ClipScorer, load_clip
from eval.transforms import normalise, to_tensor
from pso import state_dicts

FORGIVEN = "position_ids"  # buffers of old files
FREQUENCIES = 256  # numbers of the sinusoid


class Modulation(nn.Module):
    """shift, scale and gate of every vision layer's attention and MLP, and shift and scale of the last norm."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        vision = clip.config.vision_config
        width = vision.hidden_size
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.adaptive = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(vision.num_hidden_layers))
        self.last = nn.Linear(width, 2 * width)

    def image_features(self, clip: CLIPModel, x: Tensor, t: int) -> Tensor:
        """Unit vectors [B, D] of CLIP's input x [B, 3, S, S]."""
        times = torch.tensor([float(t)], device=x.device)
        sinusoid = get_timestep_embedding(times, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = F.silu(self.time(sinusoid))
        layers = [adapt(time).unflatten(-1, (6, -1)) for adapt in self.adaptive]
        return modulated_features(clip, x, layers, self.last(time))


def resized(image: Image.Image, size: int) -> Tensor:
    """Shorter side to `size` by bicubic interpolation of the tensor, without antialias, then the centre; clamped."""
    x = to_tensor(image)
    scale = size / min(x.shape[1:])
    target = tuple(int(side * scale + 0.5) for side in x.shape[1:])
    x = F.interpolate(x[None], target, mode="bicubic", align_corners=False)[0]
    top, left = (round((side - size) / 2) for side in target)
    return normalise(x[:, top : top + size, left : left + size].clamp(0, 1))


class ReleasedScorer:
    """`score(images, prompts, t)` = logit_scale cos [B], for pictures that were all predicted at time t."""

    step_aware = True

    def __init__(self, base: ClipScorer, modulation: Modulation):
        self.base, self.modulation = base, modulation
        self.scale = base.model.logit_scale.detach().exp()
        logit_scale = round(self.scale.item(), 4)
        spec = {"output": "logit_scale x cosine", "transform": "spo_bicubic", "logit_scale": logit_scale}
        self.spec = {**base.spec, **spec}

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str], t: int = 0) -> Tensor:
        base = self.base
        x = torch.stack([resized(image, base.size) for image in images]).to(base.device)
        features = self.modulation.image_features(base.model, x, t)
        return self.scale * (features * base.text_features(prompts)).sum(-1)


def load(files: dict[str, Path], device) -> ReleasedScorer:
    """PickScore's architecture with the authors' weights in it; ValueError for a file of another model."""
    model = copy.deepcopy(load_clip(files["model"], "gelu", device))  # PickScore's own stays as it is
    base = ClipScorer(model, files["processor"], "clip_pil224", {})
    modulation = Modulation(base.model)
    path = files["head"]
    try:
        state = {key: value for key, value in state_dicts.read(path).items() if not key.endswith(FORGIVEN)}
        state_dicts.check(state, published(base.model, modulation), path)
    except ValueError as error:
        raise ValueError(f"{path} is not the authors' preference model ({error}); fetch it again") from error
    base.model.load_state_dict({key: state[f"model.{key}"] for key in base.model.state_dict()})
    modulation.load_state_dict({key: state[f"model.{their_name(key)}"] for key in modulation.state_dict()})
    return ReleasedScorer(base, modulation.to(device).eval().requires_grad_(False))


def published(clip: CLIPModel, modulation: Modulation) -> dict[str, Tensor]:
    """What the file holds, by its own names."""
    own = {their_name(key): value for key, value in modulation.state_dict().items()}
    return {f"model.{key}": value for key, value in {**clip.state_dict(), **own}.items()}


def their_name(key: str) -> str:
    """The authors' name of a tensor of Modulation."""
    if key.startswith("time."):
        return key.replace("time.", "t_embedder.mlp.")
    place = "vision_model."
    if key.startswith("adaptive."):
        place += f"encoder.layers.{key.split('.')[1]}."
    return f"{place}adaLN_modulation.1.{key.rpartition('.')[2]}"
