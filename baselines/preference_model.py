"""SPO's step-aware preference model (SPM): PickScore that knows at which time its picture was predicted.

Liang et al. 2024, arXiv 2406.04314. A vision layer h -> h + attention(norm(h)), h + mlp(norm(h)) becomes

    h + gate_1(t) attention( norm(h) (1 + scale_1(t)) + shift_1(t) ),   the same for mlp,

and so does the last norm (without a gate). scale and shift begin at 0, gates at 1: at initialisation it is
PickScore, to the bit, for any t. Everything of PickScore stays frozen.

Two scorers, `score(images, prompts, t)` = logit_scale cos, entries of metrics.yaml:
  lite       PickScore itself, t ignored
  distilled  trained by baselines/preference_training.py on a distilled model's own predictions at the few times
             its sampler's forks are scored; at a time where that did not beat `lite` ("no-go") it is `lite`
The authors' own weights: baselines/released_preference_model.py.

Deviations of `distilled` (the authors train every layer's modulation on sinusoidal t = 0..999 of the multi-step
model): a table of the sampler's times, and only the last layers. Time 0 is a finished picture, which PickScore
judges by definition of the labels, so its row is fixed at zero and, without biases, nothing is modulated there.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPModel

from eval.clip_model import ClipScorer, load_clip
from pso.provenance import UserError

REPOSITORY = "SPO-Diffusion-Models/Step-Aware_Preference_Models"  # where the authors' weights lie, and ours
GO, NO_GO = "go", "no-go"
TIE = 0.1  # of |p_0 - p_1| under PickScore on the clean pictures: the authors' for SDXL


# ---- the network ----


class TimeConditioning(nn.Module):
    """Adaptive norms on the last `layers` of a CLIPModel's vision layers and on its last norm."""

    def __init__(self, clip: CLIPModel, times: list[int], layers: int):
        super().__init__()
        vision = clip.config.vision_config
        if 0 not in times or len(set(times)) != len(times):
            raise ValueError(f"times is {times}; expected different times, and 0 among them")
        self.times, width = list(times), vision.hidden_size
        self.time = nn.Embedding(len(times), width, padding_idx=times.index(0))
        count = min(layers, vision.num_hidden_layers)
        self.adaptive = nn.ModuleList(nn.Linear(width, 6 * width, bias=False) for _ in range(count))
        self.last = nn.Linear(width, 2 * width, bias=False)
        for linear in (*self.adaptive, self.last):
            nn.init.zeros_(linear.weight)

    def image_features(self, clip: CLIPModel, x: Tensor, row: Tensor) -> Tensor:
        """Unit vectors [B, D] of CLIP's input x [B, 3, S, S]; row [B] in the table of times."""
        time, plain = F.silu(self.time(row)), len(clip.vision_model.encoder.layers) - len(self.adaptive)
        gates = time.new_tensor([0, 0, 1, 0, 0, 1])[:, None]  # gates begin at 1
        adaptive = [adapt(time).unflatten(-1, (6, -1)) + gates for adapt in self.adaptive]
        return modulated_features(clip, x, [None] * plain + adaptive, self.last(time))


def modulated_features(clip: CLIPModel, x: Tensor, layers: list[Tensor | None], last: Tensor) -> Tensor:
    """Unit vectors [B, D] of CLIP's input x [B, 3, S, S] with every layer and the last norm modulated.

    layers: [B or 1, 6, W] each: shift, scale, gate of attention, then of mlp; None for a layer that is not modulated.
    last [B or 1, 2 W]: shift, scale.
    """
    vision = clip.vision_model
    h = vision.pre_layrnorm(vision.embeddings(x))
    for layer, modulation in zip(vision.encoder.layers, layers, strict=True):
        if modulation is None:
            h = layer(h, None)
            continue
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unsqueeze(2).unbind(1)
        attended, _ = layer.self_attn(layer.layer_norm1(h) * (1 + scale_1) + shift_1, attention_mask=None)
        h = h + gate_1 * attended
        h = h + gate_2 * layer.mlp(layer.layer_norm2(h) * (1 + scale_2) + shift_2)
    shift, scale = last.chunk(2, -1)
    pooled = vision.post_layernorm(h[:, 0]) * (1 + scale) + shift
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def preference_loss(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy over the two pictures of a pair [B, 2], less its floor: a perfect tie costs 0.

    label [B]: 1, 0 or, for a tie, 0.5, the share of the first; weight [B] need not sum to 1.
    """
    wanted = torch.stack([label, 1 - label], 1)
    floor = torch.special.entr(wanted).sum(1)
    losses = F.cross_entropy(logits, wanted, reduction="none") - floor
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def labels(logits: Tensor, tie: float = TIE) -> Tensor:
    """PickScore's verdicts on clean pairs [B, 2] as shares of the first: 1, 0, or 0.5 if it is not sure."""
    first = logits.softmax(1)[:, 0]
    return torch.where((2 * first - 1).abs() < tie, 0.5, (first > 0.5).float())


# ---- the scorers ----


class StepScorer:
    """PickScore, and at the times in `used` with a TimeConditioning."""

    step_aware = True

    def __init__(self, base: ClipScorer, spec: dict, conditioning: TimeConditioning | None = None, used=()):
        self.base, self.conditioning, self.used = base, conditioning, set(used)
        self.scale = base.model.logit_scale.detach().exp()
        self.spec = {**base.spec, **spec, "output": "logit_scale x cosine"}

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str], t: int = 0) -> Tensor:
        """[B], for pictures that were all predicted at time t (0: finished)."""
        return self.scale * (self._features(images, t) * self.base.text_features(prompts)).sum(-1)

    def _features(self, images: list[Image.Image], t: int) -> Tensor:
        base, model = self.base, self.conditioning
        if model is not None and t not in model.times:
            known = ", ".join(map(str, model.times))
            raise UserError(f"the preference model was trained for times {known}, not {t}; train one for this model.")
        if t not in self.used:
            return base.image_features(images)
        x = base.pixels(images)
        row = torch.full((len(x),), model.times.index(t), device=x.device)
        return model.image_features(base.model, x, row)


def pick_score(files: dict[str, Path], device) -> ClipScorer:
    return ClipScorer(load_clip(files["model"], "gelu", device), files["processor"], "clip_pil224", {})


def load_lite(files: dict[str, Path], device) -> StepScorer:
    return StepScorer(pick_score(files, device), {})


def load_distilled(files: dict[str, Path], device) -> StepScorer:
    """The trained model where its training ended with "go", else `lite`; the spec says so, for run.json."""
    base, path = pick_score(files, device), files["head"]
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["spm"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        conditioning = TimeConditioning(base.model, about["times"], about["layers"])
        conditioning.load_state_dict(state, strict=True)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no preference model on this PickScore ({first}); train it again") from error
    used = [t for t in about["times"] if about["agreement"].get(str(t), {}).get("verdict") == GO]
    scored_by = {str(t): "spm_distilled" if t in used else "spm_lite" for t in about["times"]}
    spec = {"scored_by": scored_by, "agreement": about["agreement"]}
    return StepScorer(base, spec, conditioning.to(device).eval().requires_grad_(False), used)


lite, distilled = (SimpleNamespace(load=f) for f in (load_lite, load_distilled))
