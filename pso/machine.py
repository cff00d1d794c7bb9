"""What this machine has against what a scale needs: disk, GPUs, packages, data of the user's own."""

import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pso.download import free_bytes
from pso.entries import UNTUNED, Config
from pso.imagefolder import METADATA
from pso.provenance import ROOT
from pso.runs import jobs
from pso.steps import own_folders

# GiB at 1024 px and 16 bits: 5.13 GB of UNet and 1.6 of text encoders, VAE and activations of a batch of 8; tuning
# keeps about 5.6 GB of activations for each picture and time without checkpointing. Stated, not measured.
SAMPLING_GIB = 24
TUNING_GIB = 40


@dataclass
class Finding:
    """One thing; `reason` says why it stands in the way of a start."""

    what: str
    need: str
    there: str
    reason: str | None = None


def disk(needs: list[tuple[str, Path, float]]) -> list[Finding]:
    """Bytes by what and where; needs on one disk add up."""
    found, taken = [], {}
    for what, folder, need in needs:
        device = _existing(folder).stat().st_dev
        taken[device] = taken.get(device, 0) + need
        free = free_bytes(folder)
        reason = f"the disk lacks {(taken[device] - free) / 1e9:.1f} GB for {what}" if taken[device] > free else None
        found.append(Finding(f"disk for {what}", f"{need / 1e9:.2f} GB", f"{free / 1e9:.2f} GB free", reason))
    return found


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def gpus(config: Config, elsewhere: bool = False) -> list[Finding]:
    """The smallest GPU's memory against need; a stand-in world needs none."""
    random = config.scale_entry.random
    if config.scale_entry.hub == "standin" or (random is not None and random.sizes == "small"):
        return []
    tuned = any(job.method != UNTUNED for job in jobs(config))
    need = f"{SAMPLING_GIB} GiB" + (f", to tune {TUNING_GIB} GiB" if tuned else "")
    if elsewhere:
        return [Finding("GPU memory", need, "on other machines, as you say")]
    import torch

    if not torch.cuda.is_available():
        reason = "no GPU is seen (as it should be on a login node: `python -m pso.doctor --gpu-elsewhere`)"
        return [Finding("GPU memory", need, "no GPU", reason)]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    least = min(gpu.total_memory for gpu in found) / 2**30
    there = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in found)
    if tuned and SAMPLING_GIB <= least < TUNING_GIB:
        there += "; enough with gradient checkpointing"
    reason = f"a GPU has {least:.0f} GiB of the {SAMPLING_GIB} that sampling needs" if least < SAMPLING_GIB else None
    return [Finding("GPU memory", need, there, reason)]


def own_data(config: Config) -> list[Finding]:
    """Whether folders of the user's own hold what their data sets name; their paths are not told."""
    found = []
    for name in own_folders(config):
        entry = config.datasets[name]
        files = f"{entry.files}/{METADATA}" if entry.format == "imagefolder" else entry.files
        there = len(list(Path(entry.repo).glob(files)))
        reason = None if there else f"the folder of datasets.{name}.repo has no {files}"
        found.append(Finding(f"data {name}, your own", files, str(there or "none"), reason))
    return found


def packages(pyproject: Path = ROOT / "pyproject.toml") -> list[Finding]:
    """Those of pyproject.toml: one line for all that fit, one for each that does not."""
    wanted = [Requirement(text) for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]]
    wrong = []
    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or not one.specifier.contains(version, prereleases=True):
            reason = f"package {one.name} is {version or 'missing'}"
            wrong.append(Finding(f"package {one.name}", str(one.specifier), version or "missing", reason))
    return [Finding("packages", f"{len(wanted)} of pyproject.toml", f"{len(wanted) - len(wrong)} fit"), *wrong]
