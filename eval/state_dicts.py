"""Plain state dicts that others published as .pt files: read without running their code, every key accounted for."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

NOT_A_STATE_DICT = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


def read(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or of one entry of it; in float32. ValueError for anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except NOT_A_STATE_DICT as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a file of tensors alone: {first}") from error
    if entry is not None:
        found = found.get(entry) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        where = f"{path}, entry {entry!r}," if entry else str(path)
        raise ValueError(f"{where} is no state dict: expected tensors by their names")
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def read_json(path: Path) -> dict:
    """A mapping from a JSON file, or a ValueError."""
    found = json.loads(path.read_text())  # its errors are ValueErrors
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a mapping of names to values")
    return found


def check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Both have the same names and shapes, or a ValueError with the first that differ."""
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"{path} lacks {missing[:3]} and has {unknown[:3]} in excess "
            f"(the first of {len(missing)} and {len(unknown)})"
        )
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise ValueError(f"{path} has {key} of shape {[*state[key].shape]}; expected {[*value.shape]}")
