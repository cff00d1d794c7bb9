"""Files of tensors that others published: read without running their code, every key accounted for.

What is wrong with a file is a ValueError that names file and key; who asked for the file says what to do. Shapes are
compared before a network is made, with tensors on the meta device in place of those of the file.
"""

import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

NOT_A_STATE_DICT = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip
VARIANTS = (None, "fp16")  # of a network's files, the first that lies there; None: as they were trained
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---- files ----


def stored(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of safetensors or of torch, or of one entry of the latter, as they are stored."""
    if path.suffix == ".safetensors":
        return tensors([path])
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except NOT_A_STATE_DICT as error:
        raise ValueError(_refused(path, error)) from error
    if entry is not None:
        found = found.get(entry) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        where = f"{path}, entry {entry!r}," if entry else str(path)
        raise ValueError(f"{where} is no state dict: expected tensors by their names")
    return found


def _refused(path: Path, error: Exception) -> str:
    """What torch.load raised, in words; of its own it names the code of a pickle in the middle of ten lines."""
    said = str(error).strip()
    if code := re.search(r"GLOBAL ([\w.]+)", said):
        return (
            f"{path} is not a file of tensors alone but a pickle with code: it asks for {code[1]}, which was not run; "
            "take the publisher's own file, or one of safetensors, and load this one with nothing else"
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"{path} is not a file of tensors alone: it is cut off, or a pickle of something else"
    return f"{path} is not a file of tensors alone: {next(iter(said.splitlines()), type(error).__name__)}"


def write(path: Path, found: Mapping[str, Tensor], told: dict[str, str] | None = None) -> None:
    """As safetensors, into this very file: its own save_file writes another one beside it, which a kill would leave."""
    Path(path).write_bytes(save({name: value.contiguous() for name, value in found.items()}, told))


def read(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, in float32."""
    found = stored(path, entry)
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def tensors(paths: list[Path], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of safetensors files; one after the other into `dtype`, so that no second copy is held."""
    return _each(paths, lambda file, key: _in(file.get_tensor(key), dtype))


def headers(paths: list[Path]) -> dict[str, Tensor]:
    """Names, shapes and types of safetensors files, as tensors without memory."""
    return _each(paths, lambda file, key: _described(file.get_slice(key)))


def _described(part) -> Tensor:
    return torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta")


def _in(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def _each(paths: list[Path], take: Callable) -> dict[str, Tensor]:
    found = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                part = {key: take(file, key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is cut off, empty or no file of safetensors") from error
        if twice := sorted(found.keys() & part.keys()):
            raise ValueError(f"{path} has {twice[0]}, which another shard has too")
        found |= part
    return found


def read_json(path: Path) -> dict:
    """A mapping from a JSON file, or a ValueError."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a mapping of names to values")
    return found


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a network in its folder: whole or in shards, as trained or else its fp16 variant."""
    for variant in VARIANTS:
        mark = f".{variant}" if variant else ""
        whole, index = folder / f"{stem}{mark}.safetensors", folder / f"{stem}.safetensors.index{mark}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ValueError(f"{index} has no weight_map, which says what lies in which shard")
            shards = [folder / name for name in sorted(set(places.values()))]
            if absent := [path.name for path in shards if not path.is_file()]:
                raise ValueError(f"{index} names {absent[0]}, which does not lie beside it ({len(absent)} missing)")
            return shards
    if shards := sorted(folder.glob(f"{stem}*-of-*.safetensors")):
        raise ValueError(f"{folder} has the shard {shards[0].name} and no {stem}.safetensors.index.json")
    raise ValueError(f"{folder} has neither {stem}.safetensors nor {stem}.fp16.safetensors, whole or in shards")


# ---- every key ----


def check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Both have the same names and shapes and numbers of a kind, or a ValueError with the first that differ."""
    refuse(wanted.keys() - state.keys(), state.keys() - wanted.keys(), path)
    if others := sorted(key for key in wanted if state[key].shape != wanted[key].shape):
        key = others[0]
        raise ValueError(
            f"{path} has {key} of shape {[*state[key].shape]}; expected {[*wanted[key].shape]}"
            + (f" ({len(others)} keys are of another shape)" if len(others) > 1 else "")
        )
    refuse_types({key: state[key] for key, value in wanted.items() if value.is_floating_point()}, path)


def refuse_types(state: Mapping[str, Tensor], path: Path) -> None:
    """A ValueError where weights are not floating-point numbers: of a quantised file, which would be cast."""
    if others := sorted(key for key, value in state.items() if value.dtype not in FLOATS):
        kind = str(state[others[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{path} has {others[0]} as {kind}; expected floating-point numbers of 16 bits or more ({len(others)} such)"
        )


def refuse(missing, unknown, path: Path) -> None:
    """A ValueError that names the first of the keys that a file lacks, and of those that have no place."""
    parts = []
    for keys, words in ((sorted(missing), "lacks {}"), (sorted(unknown), "has {} in excess")):
        if keys:
            first = f" (the first 3 of {len(keys)})" if len(keys) > 3 else ""
            parts.append(words.format(keys[:3]) + first)
    if parts:
        raise ValueError(f"{path} {' and '.join(parts)}")


# ---- networks of transformers ----


def transformers_files(folder: Path) -> list[Path]:
    """The files of its weights: safetensors, or the one of torch that older repositories have alone."""
    old = folder / "pytorch_model.bin"
    if old.is_file() and not any(folder.glob("model*.safetensors")):
        return [old]
    return weight_files(folder, "model")


def from_transformers(of: type, folder: Path, dtype: torch.dtype, forgiven: str = "", **options):
    """A network of the class `of` from its folder, no tensor of it drawn at random and none of the file left over,
    unless its name ends in `forgiven`. options: of its config or of the class."""
    kind = of.config_class.model_type
    if (found := read_json(folder / "config.json").get("model_type", kind)) != kind:
        raise ValueError(f"{folder}/config.json is of a {found}; expected {kind}")
    config, options = of.config_class.from_pretrained(folder, return_unused_kwargs=True, **options)
    paths = transformers_files(folder)
    state = stored(paths[0]) if paths[0].suffix == ".bin" else tensors(paths)
    state = {key: value for key, value in state.items() if not (forgiven and key.endswith(forgiven))}
    refuse_types({key: value for key, value in state.items() if not key.endswith("position_ids")}, folder)
    model, info = of.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        **options,
    )  # fmt: skip
    refuse(info["missing_keys"], info["unexpected_keys"], folder)
    if others := sorted((key, [*found], [*wanted]) for key, found, wanted in info["mismatched_keys"]):
        key, found, wanted = others[0]
        raise ValueError(f"{folder} has {key} of shape {found}; expected {wanted} ({len(others)} of another shape)")
    return model
