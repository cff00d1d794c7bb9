"""What pre's error was: one number for each row of the forward process, shared by runs of one model, data set and seed.

    L = f( -(|eps - eps_theta|^2 - |eps - eps_pre|^2) )

The second term is a function of the frozen network, the clean latent, the noise, the time and the text: none of it
changes with beta, learning rate, rank or method. Runs that differ in those alone (or one that goes on) look it up
instead of calling pre, by the number that the source gives each row (`Side.keys`). Within one run of the paper's length
no pair comes twice, so the first run gains nothing: `tune.pre_memo` is false unless it is asked for.

With the memo evidence is made by the difference of two errors summed in float64, whether a number was found or just
made, and the KL is not measured. A folder holds the numbers of one model and data; each process of a run writes a file
of its own there, whole or not at all, and reads all of them once.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pso import state_dicts
from pso.config import ConfigError
from pso.entries import EvidenceConfig
from pso.mdp import Chain
from pso.policy import ADAPTER, Policy
from pso.provenance import atomic, digest, fingerprint, versions

log = logging.getLogger("tune")
OUR_SOURCES = "pso.sources"
CHUNK = 2**26  # bytes of a tensor that are hashed at a time


class Memo:
    """The numbers that are known, and those of this process."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.safetensors"
        self.keys, self.errors = _read_all(folder)
        self.own = _read(self.path)
        self.made: dict[int, float | None] = {}  # since this process started; None: still in `pending`
        self.pending: list[tuple[list[int], Tensor]] = []  # on their device: nothing here waits for the network
        self.hits, self.written = 0, 0

    def __call__(self, keys: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Errors of rows with these keys [R], float64; `make` is asked for those (by place) that are not known."""
        known = [self._known(key) for key in keys.tolist()]
        missing = torch.tensor([place for place, error in enumerate(known) if error is None], dtype=torch.long)
        self.hits += len(keys) - len(missing)
        found = torch.tensor([0.0 if error is None else error for error in known], dtype=torch.float64)
        if not len(missing):
            return found
        made, asked = make(missing).double(), keys[missing].tolist()
        self.pending.append((asked, made))
        self.made |= dict.fromkeys(asked)
        found = found.to(made.device)
        found[missing.to(made.device)] = made
        return found

    def _known(self, key: int) -> float | None:
        place = int(np.searchsorted(self.keys, key))
        if place < len(self.keys) and self.keys[place] == key:
            return float(self.errors[place])
        if key in self.made and self.made[key] is None:
            self._fetch()
        return self.made.get(key)

    def _fetch(self) -> None:
        for keys, errors in self.pending:
            self.made |= dict(zip(keys, errors.tolist(), strict=True))
        self.pending = []

    def write(self) -> None:
        """This process's file, with what it held before; nothing if there is nothing new."""
        if len(self.made) == self.written:
            return
        self._fetch()
        whole = {**self.own, **self.made}
        keys = torch.tensor(sorted(whole))
        errors = torch.tensor([whole[key] for key in keys.tolist()], dtype=torch.float64)
        with atomic(self.path) as part:
            state_dicts.write(part, {"keys": keys, "errors": errors})
        self.written = len(self.made)

    def counts(self) -> dict[str, int]:
        return {"pre_found": self.hits, "pre_made": len(self.made)}


def _read(path: Path) -> dict[int, float]:
    """A file's numbers; a file that cannot be read costs calls of pre and no more."""
    if not path.exists():
        return {}
    try:
        found = load_file(path)
        return dict(zip(found["keys"].tolist(), found["errors"].tolist(), strict=True))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        log.warning("%s cannot be read (%s); its numbers are made anew", path, error)
        return {}


def _read_all(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of all runs, sorted by key; of a key in two files the first file's, by name."""
    whole: dict[int, float] = {}
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        whole |= _read(path)
    keys = np.fromiter(whole, np.int64, len(whole))
    order = np.argsort(keys)
    return keys[order], np.fromiter(whole.values(), np.float64, len(whole))[order]


# ---- whose numbers they are ----


def identity(policy: Policy, chain: Chain, data: list, source: type, cfg: BaseModel) -> str:
    """Of all that pre's error depends on and a row's key does not say: the frozen network, the noising, the clean
    latents and texts, and by what the numbers are computed. data: what the caches and prompts are known by.

    Sources of this repository draw by their keys alone, so their methods share numbers; another's may draw as it likes.
    """
    own = source.__module__ == OUR_SOURCES
    elsewhere = None if own else [f"{source.__module__}:{source.__qualname__}", cfg.model_dump(mode="json")]
    return digest(
        {
            "source": elsewhere,
            "weights": weights(policy),
            "network": {"resolution": policy.resolution, "told": _plain(policy.timestep_cond)},
            "noising": [type(chain).__name__, chain.times.tolist(), chain.alphas_cumprod.double().tolist()],
            "data": data,
            "numerics": [policy.numerics, policy.device.type, _device(policy.device), versions().get("torch")],
            "code": fingerprint("pso.memo", OUR_SOURCES, source.__module__),
        }
    )


def weights(policy: Policy) -> str:
    """sha256 of the UNet's weights without the adapter, by name; file names say nothing of LoRAs that were merged."""
    found = hashlib.sha256()
    for name, tensor in sorted(_frozen(policy)):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(flat), CHUNK):
            found.update(flat[start : start + CHUNK].cpu().numpy().tobytes())
    return found.hexdigest()


def _frozen(policy: Policy) -> Iterable[tuple[str, Tensor]]:
    """PEFT's names of wrapped layers are those that they had before."""
    for name, tensor in policy.unet.state_dict().items():
        if f".{ADAPTER}." not in name:
            yield name.replace(".base_layer.", "."), tensor


def _plain(tensor: Tensor | None) -> list | None:
    return None if tensor is None else tensor.double().tolist()


def _device(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


# ---- where there is one ----


def refuse(method: str, module: ModuleType, source: type, cfg: EvidenceConfig) -> None:
    """A sentence where a method's evidence cannot be made of errors alone."""
    field = f"methods.{method}.tune.pre_memo is true, but"
    if not module.NEEDS_PRE:
        raise ConfigError(f"{field} {module.__name__} never asks for pre; write false.")
    if not hasattr(source, "keys"):
        raise ConfigError(
            f"{field} {source.__name__} samples with theta or gives its rows no keys; expected a method on labelled "
            'pairs (SOURCE = "PreferencePairs"), or write false.'
        )
    for name, wanted in (("omega", "one"), ("forward_coupling", "paper")):
        if (value := getattr(cfg, name, wanted)) != wanted:
            raise ConfigError(
                f"{field} methods.{method}.objective.{name} is {value}; expected {wanted}, because other evidence "
                "needs the whole prediction of pre, or write false."
            )
