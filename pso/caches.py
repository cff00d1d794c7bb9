"""Data as training wants it, made once: clean latents of pairs, and their text conditions.

Pairs are Pick-a-Pic's, or the captioned pictures of a folder (format imagefolder) as targets, each against one sample
of the untuned distilled model for its caption (style transfer, Appendix B.2).

    python -m pso.caches --model sdxl_dmd2 --dataset pickapic_v2

Latents are kept as mean and std of the VAE's posterior, so that every visit draws a fresh sample. Of a published set
only the pairs that the tables' runs visit are read (pso/visits.py); what is there already is kept (pso/parts.py).
Prompt sets are read here too, for whoever needs them.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pso import state_dicts
from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import Prompt, load_prompts, parse_image
from pso.entries import Config, DatasetEntry, ModelEntry
from pso.hub import Hub, hub_dir, is_outside, recorded
from pso.imagefolder import METADATA, ImageFolder
from pso.mdp import Chain
from pso.models import chain_for, load_policy
from pso.pairs import Visit, pairs_of
from pso.parts import Parts, convert, convert_texts
from pso.paths import RESULTS, scale_dir
from pso.policy import Conditioning, Policy
from pso.provenance import Meter, UserError, atomic, digest, fingerprint, record, sentences, sha256_of, write_json
from pso.rollout import rollout
from pso.visits import Plan, kept_pairs, kept_prompts, latents_plan

log = logging.getLogger("caches")
BATCH = 64  # pairs encoded together, fewer where pictures are larger than 256 px
TEXTS = 512  # prompts in one part
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
    return tensors, about, [{"file": name, "sha256": sha256, "made_from": about.get("made_from")}, *about["inputs"]]


class PairCache:
    """Pairs of clean latents. `prompt_index` [P] points into `prompts` and `condition`.

    Pairs in `left_out` could not be used. `inputs`: the cache itself and the files that it was made from, for run.json.
    """

    def __init__(self, scale: str, model: str, dataset: str, results: Path = RESULTS):
        path = cache_file(scale, model, dataset, results)
        self.command = f"python -m pso.caches --model {model} --dataset {dataset}"
        self.tensors, about, self.inputs = read_cache(path, self.command)
        self.prompts: list[str] = about["prompts"]
        self.counts: dict = about["counts"]
        self.left_out = tuple(about["left_out"])
        self.prompt_index, self.places, self.text_places = (
            self.tensors[name] for name in ("prompt_index", "places", "text_places")
        )
        folder = path.with_suffix("")
        self.pairs = Parts(folder / "pairs", about["parts"]["pairs"], self.command)
        self.texts = Parts(folder / "texts", about["parts"]["texts"], self.command)

    def __len__(self) -> int:
        return len(self.prompt_index)

    def require(self, seed: int, visits: int) -> None:
        """Stops before a run whose pairs are not all there."""
        check_visits(self.places[:, 0] >= 0, self.left_out, seed, visits, self.command)

    def latents(self, side: str, index: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and std of the posteriors [B, C, H, W], float32."""
        places = self.places[index]
        if (places < 0).any():
            raise UserError(f"the cached latents lack a pair of {index}; `{self.command}` with the run's own settings.")
        return tuple(self.pairs.rows(f"{side}_{kind}", places).float() for kind in ("mean", "std"))

    def condition(self, device) -> "KeptConditioning":
        """Text condition of every prompt, as [len(prompts), ...]."""
        return KeptConditioning(self.texts, self.text_places, device, self.command)


def check_visits(there: Tensor, left_out: tuple[int, ...], seed: int, visits: int, command: str) -> None:
    """`there` [P] bool: which pairs are kept."""
    wanted = torch.from_numpy(kept_pairs(Plan({seed: visits}), len(there), left_out))
    if lacking := int((wanted & ~there).sum()):
        raise UserError(
            f"the cache lacks {lacking} of {int(wanted.sum())} pairs that {visits} visits with seed {seed} need; "
            f"`{command}` adds those of all tables and seeds of its settings."
        )


class KeptConditioning:
    """A Conditioning whose rows stay in their files: those asked for are put on the device."""

    def __init__(self, texts: Parts, places: Tensor, device, command: str, more: Conditioning | None = None):
        self.texts, self.places, self.device, self.command, self.more = texts, places, device, command, more

    def __len__(self) -> int:
        return len(self.places) + (0 if self.more is None else len(self.more))

    def followed_by(self, other: Conditioning) -> "KeptConditioning":
        more = other if self.more is None else self.more.followed_by(other)
        return KeptConditioning(self.texts, self.places, self.device, self.command, more)

    def rows(self, index: Tensor) -> Conditioning:
        """Each different row is read once."""
        different, inverse = index.cpu().unique(return_inverse=True)
        count = len(self.places)
        own, more = different[different < count], different[different >= count] - count
        found = [self._read(own)] if len(own) else []
        found += [self.more.rows(more.to(self.more.hidden.device))] if len(more) else []
        whole = found[0] if len(found) == 1 else found[0].followed_by(found[1])
        return whole.rows(inverse.to(self.device))

    def _read(self, index: Tensor) -> Conditioning:
        places = self.places[index]
        if (places < 0).any():
            raise UserError(f"a prompt of this run has no cached text condition; `{self.command}` with its settings.")
        return Conditioning(*(self.texts.rows(name, places).to(self.device) for name in ("hidden", "pooled")))


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Shorter side to `resolution` (bilinear) and centre crop: Diffusion-DPO's transform, without its flip."""
    if image.size == (resolution, resolution):
        return image
    scale = resolution / min(image.size)
    image = image.resize(tuple(max(resolution, round(s * scale)) for s in image.size), Image.Resampling.BILINEAR)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def pixels(policy: Policy, images: Iterable[bytes]) -> Tensor:
    """Encoded pictures -> uint8 [B, H, W, 3] at the model's resolution."""
    return torch.from_numpy(np.stack([np.asarray(fit(parse_image(data), policy.resolution)) for data in images]))


def at_once(resolution: int) -> int:
    """How many pairs are encoded together."""
    return max(1, min(BATCH, BATCH * 256**2 // resolution**2))


Encode = Callable[[list[Visit]], dict[str, Tensor]]


def labelled(policy: Policy, dtype: torch.dtype) -> Encode:
    """Both pictures of pairs. A few are padded to a whole batch: what is computed does not depend on their number."""
    size = at_once(policy.resolution)

    def encode(visits: list[Visit]) -> dict[str, Tensor]:
        found = {}
        for k, side in enumerate(SIDES):
            images = [visit.pictures[k] for visit in visits]
            padded = np.stack(images + images[-1:] * (size - len(images)))
            found |= _posterior(policy, side, torch.from_numpy(padded), len(images), dtype)
        return found

    return encode


def against_samples(policy: Policy, chain: Chain, dtype: torch.dtype) -> Encode:
    """Each picture, and one sample of the model for its caption (their number is not stated in the paper): decoded,
    so that both sides go through the same encoder. The noise belongs to the picture's file name."""

    def encode(visits: list[Visit]) -> dict[str, Tensor]:
        texts = [visit.row.text for visit in visits]
        keys = [("reference", visit.row.id) for visit in visits]
        samples = policy.decode(rollout(policy, chain, policy.encode_prompts(texts), keys).x0)
        pictures = torch.from_numpy(np.stack([visit.pictures[0] for visit in visits]))
        targets = _posterior(policy, "target", pictures, len(visits), dtype)
        return targets | _posterior(policy, "reference", samples, len(visits), dtype)

    return encode


def _posterior(policy: Policy, side: str, pictures: Tensor, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    moments = policy.encode_images(pictures)
    return {f"{side}_{kind}": v[:count].to(dtype).cpu() for kind, v in zip(("mean", "std"), moments, strict=True)}


def image_folder(hub: Hub, entry: DatasetEntry, name: str) -> tuple[ImageFolder, list[dict]]:
    """The folder, in the hub or the user's own, and what run.json says of it."""
    root = Path(entry.repo) if is_outside(entry.repo) else hub.repo(entry.repo)
    folder, repo = ImageFolder(root / entry.files, entry, name), recorded(entry)["repo"]
    metadata = {"repo": repo, "file": f"{entry.files}/{METADATA}", "sha256": sha256_of(folder.metadata)}
    pictures = {"repo": repo, "file": f"{entry.files}: {len(folder.pictures)} pictures", "sha256": folder.digest()}
    return folder, [metadata, pictures]


def build(config: Config, model: str, dataset: str, results: Path) -> None:
    meter, hub = Meter(), Hub(hub_dir(config.scale, results))
    entry, model_entry = config.datasets[dataset], config.models[model]
    dtype = getattr(torch, config.scale_entry.dtype)
    kept = dtype if dtype == torch.float32 else torch.float16
    settings = {"scale": config.scale, "model": model, "dataset": {dataset: recorded(entry)}}
    speed = config.scale_entry.speed
    made_from = {"code": fingerprint("pso.caches"), "dtype": str(kept), "speed": speed.model_dump()}
    if entry.format == "imagefolder":
        (reader, found), chain = image_folder(hub, entry, dataset), sampler(model, model_entry)
        inputs, plan = (lambda: found), None
        policy = load_policy(model_entry, hub, dtype, name=model, speed=speed)
        encode = against_samples(policy, chain, kept)
        made_from["model"] = model_entry.model_dump(exclude={"title"})
    else:
        reader, inputs = pairs_of(hub, entry, dataset)
        policy = load_policy(model_entry, hub, dtype, name=model, speed=speed)
        plan, encode = latents_plan(config, model, dataset), labelled(policy, kept)
        made_from["model"] = model_entry.model_dump(include={"base", "vae", "resolution"})
    made_from["weights"] = weights = hub.inputs()
    path = cache_file(config.scale, model, dataset, results)
    folder = path.with_suffix("")

    def look(image: Image.Image) -> np.ndarray:
        return np.asarray(fit(image, policy.resolution))

    places, pairs = convert(reader, plan, folder / "pairs", made_from, look, encode, at_once(policy.resolution))
    check_some(places, reader, config, model, dataset)
    text_places, texts = _texts(policy, reader, plan, places[:, 0] >= 0, folder / "texts", made_from)
    parts = {"pairs": pairs, "texts": texts}
    tensors = {"prompt_index": reader.prompt_index, "places": places, "text_places": text_places}
    tensors = {name: torch.from_numpy(value).long() for name, value in tensors.items()}
    about = {"prompts": reader.prompts, "counts": reader.counts.as_dict(), "quarantine": reader.quarantine}
    about |= {"left_out": list(reader.left_out), "kept": int((places[:, 0] >= 0).sum()), "parts": parts}
    meter.counts = {"unet_forwards": policy.unet_forwards}
    keep(path, tensors, about, made_from, record("latents", settings, [*weights, *inputs()], meter))
    log.info("%s", reader.counts.sentence())


def keep(path: Path, tensors: dict[str, Tensor], about: dict, made_from: dict, told: dict) -> None:
    """The declared files. One that has only grown keeps its time: it holds the same for the runs made from it."""
    found, tell = digest([made_from, told["inputs"]]), path.with_suffix(".json")
    try:
        before = path.stat().st_mtime_ns if json.loads(tell.read_text())["made_from"] == found else None
    except (OSError, ValueError, KeyError):
        before = None
    with atomic(path) as part:
        state_dicts.write(part, tensors, {"parts": digest(about.get("parts"))})
    write_json(tell, {**about, **told, "made_from": found, "sha256": sha256_of(path)})
    if before is not None:
        os.utime(path, ns=(before, before))


def check_some(places: np.ndarray, reader, config: Config, what: str, dataset: str) -> None:
    """Something was kept."""
    if (places >= 0).any():
        return
    if reader.counts.pairs:
        raise ConfigError(
            f"no row of {', '.join(config.tables)} needs pairs of {dataset} for {what}, so none would be kept; ask for "
            "a table that does."
        )
    where = recorded(config.datasets[dataset])["repo"]
    raise UserError(f"datasets.{dataset} has no usable pair in {where}: {reader.counts.sentence()}.")


def _texts(policy: Policy, reader, plan: Plan | None, pairs: np.ndarray, folder: Path, made_from: dict):
    """Text conditions of the prompts that are needed: places [len(prompts), 2] and the parts."""
    kept = np.flatnonzero(kept_prompts(plan, pairs, reader.prompt_index, len(reader.prompts)))

    def encode(texts: list[str]) -> dict[str, Tensor]:
        condition = policy.encode_prompts(texts)
        return {"hidden": condition.hidden.cpu(), "pooled": condition.pooled.cpu()}

    places = np.full((len(reader.prompts), 2), -1, np.int64)
    places[kept], parts = convert_texts([reader.prompts[i] for i in kept], folder, made_from, encode, TEXTS)
    return places, parts


def sampler(name: str, entry: ModelEntry) -> Chain:
    if entry.tuned_steps is None:
        raise ConfigError(
            f"models.{name} has no tuned_steps; expected the grid on which it is sampled for the references."
        )
    return chain_for(name, entry, entry.tuned_steps)


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
