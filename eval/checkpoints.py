"""A scorer's network from a transformers folder, whole: scorers of one checkpoint share it."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

from pso.state_dicts import from_transformers

_loaded: WeakValueDictionary = WeakValueDictionary()  # class, files as they are, device -> model, while one is held


def whole(of: type[PreTrainedModel], folder: Path, device, forgiven: str = "", **options) -> PreTrainedModel:
    """Every weight from the checkpoint, in float32. ValueError where one is missing, which transformers would draw
    at random, or has no place in the network, unless its name ends in `forgiven`."""
    key = (of, *_files_as_they_are(folder), str(device))
    if key not in _loaded:
        model = from_transformers(of, folder, torch.float32, forgiven, **options)
        _loaded[key] = model = model.to(device).eval()
    return _loaded[key]


def _files_as_they_are(folder: Path) -> tuple:
    """Names, sizes and times of a folder's files: another checkpoint under the same path is another one."""
    files = sorted(path for path in Path(folder).resolve().iterdir() if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
