"""Data as training wants it, made once and declared: clean latents of pairs, and their text conditions.

    python -m pso.caches --model sdxl_dmd2 --dataset pickapic_v2

Latents are kept as mean and std of the VAE's posterior, so that every visit draws a fresh sample.
Prompt sets are read here too, for whoever needs them.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import Prompt, iter_pairs, load_prompts, parse_image
from pso.entries import Config, DatasetEntry
from pso.hub import Hub, hub_dir
from pso.models import load_policy
from pso.paths import RESULTS, scale_dir
from pso.policy import Conditioning, Policy
from pso.provenance import Meter, UserError, atomic, record, sentences, sha256_of, write_json

log = logging.getLogger("caches")
BATCH = 64
SIDES = ("target", "reference")


def load_prompt_set(hub: Hub, entry: DatasetEntry, name: str) -> list[Prompt]:
    """The prompts of an entry of datasets.yaml, from the hub."""
    return load_prompts(hub.files(entry.repo, entry.files), entry, name)


def cache_file(scale: str, model: str, dataset: str, results: Path = RESULTS) -> Path:
    return scale_dir(scale, results) / "cache" / model / f"{dataset}.safetensors"


def read_cache(path: Path, command: str) -> tuple[dict[str, Tensor], dict, list[dict]]:
    """Tensors, what their .json tells, and the inputs for run.json: the cache and the files that it was made from."""
    again = f"`{command}` makes it"
    if not path.exists():
        raise UserError(f"{path} is missing; {again}.")
    sha256 = sha256_of(path)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} and its .json cannot be read ({error}); {again} anew.") from error
    if about.get("sha256") != sha256:  # written one after the other: a kill in between leaves two of different age
        raise UserError(f"{path} is not the file that its .json describes (its sha256 differs); {again} anew.")
    name = str(path.relative_to(path.parents[2]))  # from the scale's folder
    return tensors, about, [{"file": name, "sha256": sha256}, *about["inputs"]]


class PairCache:
    """Pairs of clean latents. `prompt_index` [P] points into `prompts` and `condition`.

    `inputs`: the cache itself and the files that it was made from, for run.json.
    """

    def __init__(self, scale: str, model: str, dataset: str, results: Path = RESULTS):
        path = cache_file(scale, model, dataset, results)
        command = f"python -m pso.caches --model {model} --dataset {dataset}"
        self.tensors, about, self.inputs = read_cache(path, command)
        self.prompts: list[str] = about["prompts"]
        self.counts: dict = about["counts"]
        self.prompt_index = self.tensors["prompt_index"]

    def __len__(self) -> int:
        return len(self.prompt_index)

    def latents(self, side: str, index: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and std of the posteriors [B, C, H, W], float32."""
        return self.tensors[f"{side}_mean"][index], self.tensors[f"{side}_std"][index]

    def condition(self, device) -> Conditioning:
        """Text condition of every prompt [len(prompts), ...]."""
        return Conditioning(self.tensors["hidden"].to(device), self.tensors["pooled"].to(device))


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Shorter side to `resolution` (bilinear) and centre crop: Diffusion-DPO's transform, without its flip."""
    if image.size == (resolution, resolution):
        return image
    scale = resolution / min(image.size)
    image = image.resize(tuple(max(resolution, round(s * scale)) for s in image.size), Image.Resampling.BILINEAR)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def encode(policy: Policy, images: list[bytes]) -> tuple[Tensor, Tensor]:
    """Encoded pictures -> posterior mean and std on the CPU."""
    pictures = [np.asarray(fit(parse_image(data), policy.resolution)) for data in images]
    mean, std = policy.encode_images(torch.from_numpy(np.stack(pictures)))
    return mean.cpu(), std.cpu()


def build(config: Config, model: str, dataset: str, results: Path) -> None:
    meter, hub = Meter(), Hub(hub_dir(config.scale, results))
    entry = config.datasets[dataset]
    policy = load_policy(config.models[model], hub, name=model)
    reader = iter_pairs(hub.files(entry.repo, entry.files), entry, dataset)
    found: dict[str, list[Tensor]] = {f"{side}_{kind}": [] for side in SIDES for kind in ("mean", "std")}
    rows, prompts, batch = [], {}, []

    def flush() -> None:
        for side in SIDES:
            mean, std = encode(policy, [getattr(pair, side) for pair in batch])
            found[f"{side}_mean"].append(mean)
            found[f"{side}_std"].append(std)
        batch.clear()

    for pair in reader:
        rows.append(prompts.setdefault(pair.prompt, len(prompts)))
        batch.append(pair)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    if not rows:
        raise UserError(f"datasets.{dataset} has no usable pair in {entry.repo}: {reader.counts.sentence()}.")
    condition = policy.encode_prompts(list(prompts))
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    tensors |= {"prompt_index": torch.tensor(rows), "hidden": condition.hidden.cpu(), "pooled": condition.pooled.cpu()}
    path = cache_file(config.scale, model, dataset, results)
    with atomic(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    about = {"prompts": list(prompts), "counts": reader.counts.as_dict(), "quarantine": reader.quarantine}
    settings = {"scale": config.scale, "model": model, "dataset": {dataset: entry.model_dump()}}
    about |= record("latents", settings, hub.inputs(), meter, sha256=sha256_of(path))
    write_json(path.with_suffix(".json"), about)
    log.info("%s", reader.counts.sentence())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("latents"):
        config = from_arguments(args)
        for kind, name in (("models", args.model), ("datasets", args.dataset)):
            known = getattr(config, kind)
            if name not in known:
                raise ConfigError(f"--{kind[:-1]} is {name!r}; expected one of {', '.join(known)}.")
        build(config, args.model, args.dataset, args.results)


if __name__ == "__main__":
    main()
