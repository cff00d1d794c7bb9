"""Checkpoints of a run: state/update{k}/, written whole or not at all, the last two kept."""

import hashlib
import io
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pso.paths import finished_state
from pso.policy import Policy
from pso.provenance import Meter, UserError, digest, sha256_of

log = logging.getLogger("tune")
KEPT = 2
PROGRESS = "progress.json"


class NotWhole(ValueError):
    """A checkpoint with a file that is missing or not as it was written; the text is the file's name."""


class Checkpoints:
    """Saves LoRA, optimiser, source and cost; everything else is a function of seed and update.

    `made_from` holds what decides the numbers ("settings", "weights and data", "code"): a checkpoint made
    from anything else is refused. `meter` counts on from the sessions before.
    """

    def __init__(self, folder: Path, made_from: dict, meter: Meter):
        self.folder, self.meter = Path(folder), meter
        self.made_from = {name: digest(value) for name, value in made_from.items()}
        self.resumed_at: list[int] = []

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("update[0-9]*"))

    def _folder(self, update: int) -> Path:
        return self.folder / f"update{update:07d}"

    def save(self, update: int, policy: Policy, optimizer, source) -> None:
        """Everything goes to bytes first, so that a full disk shows as an OSError whatever the library. One that is
        there already is the same."""
        if self._folder(update).exists():
            return
        files = {"lora.safetensors": _tensors(policy.lora_state()), "optimizer.pt": _pickled(optimizer.state_dict())}
        if hasattr(source, "state"):
            files["source.safetensors"] = _tensors(source.state())
        progress = {
            "update": update,
            "made_from": self.made_from,
            "resumed_at": self.resumed_at,
            "cost": self.meter.cost(),
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        self._write(update, {**files, PROGRESS: json.dumps(progress).encode()})
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def _write(self, update: int, files: dict[str, bytes]) -> None:
        final = self._folder(update)
        part = final.with_name(f".{final.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, content in files.items():
                with open(part / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, final)
        except OSError as error:
            raise UserError(
                f"could not write the checkpoint {final}: {error.strerror or error}; earlier ones are kept. "
                "Make room, then run the same command again."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def restore(self, policy: Policy, optimizer, source) -> int:
        """Load the newest checkpoint that is whole; its update, or 0 if there is none."""
        self._take_back()
        found = self._all()
        for folder in reversed(found):
            try:
                progress = _read(folder)
            except NotWhole as error:
                log.warning("%s is not whole (%s is missing or damaged); it is removed.", folder, error)
                shutil.rmtree(folder)
                continue
            self._refuse_others(folder, progress["made_from"])
            policy.set_lora_state(load_file(folder / "lora.safetensors"))
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", policy.device, weights_only=True))
            if hasattr(source, "set_state"):
                source.set_state(load_file(folder / "source.safetensors"))
            self.resumed_at = [*progress["resumed_at"], progress["update"]]
            self.meter.earlier = progress["cost"]
            log.info("continuing after update %d", progress["update"])
            return progress["update"]
        if found:
            log.warning("%s holds no whole checkpoint; this run starts anew.", self.folder)
        return 0

    def _refuse_others(self, folder: Path, made_from: dict) -> None:
        other = ", ".join(name for name, value in self.made_from.items() if made_from.get(name) != value)
        if other:
            raise UserError(
                f"{folder} was written with other {other}; remove {self.folder} to start this run anew, "
                "or put back what differs and run the same command again."
            )

    def finish(self) -> None:
        """At the end of the run: out of the way, but there until the run's images are made. A workflow deletes the
        results of a job that was killed before it saw its end, and the run goes on from here then."""
        shutil.rmtree(self._done, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, self._done)

    def _take_back(self) -> None:
        """What a run of the same had finished with."""
        if not self._done.exists():
            return
        try:
            same = (
                not self.folder.exists() and _read(max(self._done.glob("update[0-9]*")))["made_from"] == self.made_from
            )
        except ValueError:  # nothing whole in it
            same = False
        if same:
            os.replace(self._done, self.folder)
        else:
            shutil.rmtree(self._done, ignore_errors=True)

    @property
    def _done(self) -> Path:
        return finished_state(self.folder.parent)


def _tensors(state: dict[str, Tensor]) -> bytes:
    return save({k: v.contiguous() for k, v in state.items()})


def _pickled(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _read(folder: Path) -> dict:
    """progress.json, once every file that it lists is seen to be what was written."""
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        listed = progress["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise NotWhole(PROGRESS) from error
    for name, sha256 in listed.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise NotWhole(name)
    return progress
