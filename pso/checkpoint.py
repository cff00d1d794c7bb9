"""Checkpoints of a run: state/update{k}/, written whole or not at all, the last two kept."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pso.policy import Policy
from pso.provenance import UserError, digest

KEPT = 2


class Checkpoints:
    """Saves LoRA, optimiser, source and counts; everything else is a function of seed and update."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = Path(folder), digest(settings)
        self.resumed_at: list[int] = []
        self.earlier_forwards = 0

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("update[0-9]*"))

    def save(self, update: int, policy: Policy, optimizer, source) -> None:
        final = self.folder / f"update{update:07d}"
        part = self.folder / f".update{update:07d}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            save_file({k: v.contiguous() for k, v in policy.lora_state().items()}, part / "lora.safetensors")
            torch.save(optimizer.state_dict(), part / "optimizer.pt")
            if hasattr(source, "state"):
                save_file({k: v.contiguous() for k, v in source.state().items()}, part / "source.safetensors")
            progress = {
                "update": update,
                "settings": self.settings,
                "resumed_at": self.resumed_at,
                "unet_forwards": self.earlier_forwards + policy.unet_forwards,
            }
            (part / "progress.json").write_text(json.dumps(progress))
            for file in part.iterdir():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            os.replace(part, final)
        except OSError as error:
            raise UserError(
                f"could not write the checkpoint {final}: {error.strerror or error}; the one before is kept. "
                "Make room, then run the same command again."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def restore(self, policy: Policy, optimizer, source) -> int:
        """Load the newest checkpoint; its update, or 0 if there is none."""
        found = self._all()
        if not found:
            return 0
        newest = found[-1]
        progress = json.loads((newest / "progress.json").read_text())
        if progress["settings"] != self.settings:
            raise UserError(
                f"{newest} was written with other settings; remove {self.folder} to start this run anew, "
                "or put the settings back."
            )
        policy.set_lora_state(load_file(newest / "lora.safetensors"))
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", map_location=policy.device, weights_only=True))
        if hasattr(source, "set_state"):
            source.set_state(load_file(newest / "source.safetensors"))
        self.resumed_at = [*progress["resumed_at"], progress["update"]]
        self.earlier_forwards = progress["unet_forwards"]
        return progress["update"]
