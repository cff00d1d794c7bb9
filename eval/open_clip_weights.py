"""open_clip's state dict of a ViT and a text tower <-> that of transformers' CLIPModel.

open_clip keeps queries, keys and values of a layer in one matrix and writes its projections transposed; all other
tensors are the same under other names. Nothing is rounded on the way.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pso.state_dicts import check

NAMES = (  # transformers' -> open_clip's, in this order
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
)
TRANSPOSED = ("visual.proj", "text_projection")


def open_clip_name(name: str) -> str:
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's state dict under open_clip's names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        parts.setdefault(open_clip_name(name), {})[name] = value
    found = {}
    for name, values in parts.items():
        joined = [values[key] for key in sorted(values, key=_place)]
        value = joined[0] if len(joined) == 1 else torch.cat(joined)
        found[name] = value.T.contiguous() if name in TRANSPOSED else value
    return found


def from_open_clip(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The other way; `names`: those of the CLIPModel. A missing one is a KeyError: check first."""
    found = {}
    for name in names:
        value = state[theirs := open_clip_name(name)]
        if theirs in TRANSPOSED:
            value = value.T
        if (place := _place(name)) >= 0:
            value = value.chunk(3)[place]
        found[name] = value.contiguous()
    return found


def _place(name: str) -> int:
    """Where a tensor stands in its joined matrix; -1 for one that stands alone."""
    found = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    return "qkv".index(found[1]) if found else -1


def load_open_clip(state: Mapping[str, Tensor], config: CLIPConfig, path: Path, device) -> CLIPModel:
    """A CLIPModel with exactly these weights, in float32; ValueError that names the file where they are others'."""
    with torch.device("meta"):
        names = CLIPModel(config).state_dict()
    check(state, to_open_clip(names), path)
    ours = from_open_clip(state, list(names))
    model = CLIPModel.from_pretrained(None, config=config, state_dict=ours, dtype=torch.float32)
    return model.to(device).eval()
