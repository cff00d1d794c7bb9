"""A scorer's network from a transformers folder, whole: scorers of one checkpoint share it."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

_loaded: WeakValueDictionary = WeakValueDictionary()  # class, files as they are, device -> model, while one is held


def whole(of: type[PreTrainedModel], folder: Path, device, forgiven: str = "", **options) -> PreTrainedModel:
    """Every weight from the checkpoint, in float32. ValueError where one is missing, which transformers would draw
    at random, or has no place in the network, unless its name ends in `forgiven`."""
    key = (of, *_files_as_they_are(folder), str(device))
    if key not in _loaded:
        model, info = of.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
        missing = sorted(info["missing_keys"])
        unknown = sorted(k for k in info["unexpected_keys"] if not (forgiven and k.endswith(forgiven)))
        if missing or unknown:
            raise ValueError(
                f"weights in {folder} lack {missing[:2]} and have {unknown[:2]} in excess (the first two of "
                f"{len(missing)} and {len(unknown)}); fetch the checkpoint again"
            )
        _loaded[key] = model = model.to(device).eval()
    return _loaded[key]


def _files_as_they_are(folder: Path) -> tuple:
    """Names, sizes and times of a folder's files: another checkpoint under the same path is another one."""
    files = sorted(path for path in Path(folder).resolve().iterdir() if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
