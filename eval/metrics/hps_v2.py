"""HPS v2 (Wu et al. 2023): cosine of a CLIP ViT-H-14 tuned on human choices; its benchmark prints it x 100.

The file holds open_clip's names; the architecture is that of the CLIP it was tuned from, so its config.json is read.
`transform` defaults to the one without antialias: the authors' code resizes a float tensor, which under the
torchvision of their benchmark (2023, below 0.17) meant none. Under a newer one the same code gives
"hps_letterbox224_aa", another score. Theirs runs in float16 on a GPU; this is float32 everywhere.
"""

from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from eval.clip_model import ClipScorer, as_open_clip
from eval.open_clip_weights import load_open_clip, to_open_clip
from pso import state_dicts


def load(files: dict[str, Path], device, transform: str = "hps_letterbox224_noaa") -> ClipScorer:
    state = state_dicts.read(files["model"], "state_dict")
    config = CLIPConfig.from_dict(state_dicts.read_json(files["architecture"]))
    for part in ("text_config", "vision_config"):
        if (found := getattr(config, part).hidden_act) != "gelu":
            raise ValueError(f"{part}.hidden_act in {files['architecture']} is {found!r}; expected 'gelu'")
    model = load_open_clip(state, config, files["model"], device)
    return ClipScorer(model, files["processor"], transform, {"output": "cosine"}, as_open_clip)


def published(model: CLIPModel) -> dict[str, dict[str, Tensor]]:
    """What a file for load() holds: open_clip's names, in half precision as the authors store them."""
    return {"state_dict": {key: value.half() for key, value in to_open_clip(model.state_dict()).items()}}
