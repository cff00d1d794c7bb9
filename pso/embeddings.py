"""Unit embeddings of a data set's pairs by a metric's CLIP, made once: for objectives that compare pair with pair.

    python -m pso.embeddings --metric clip_score --dataset pickapic_v2

One vector per caption and one per picture, in the order of the latents (pso/caches.py), of any model.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pso.caches import SIDES, PairCache
from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import iter_pairs, parse_image
from pso.entries import Config
from pso.hub import Hub, hub_dir
from pso.models import load_metric
from pso.paths import RESULTS, scale_dir
from pso.provenance import Meter, UserError, atomic, record, sentences, write_json

log = logging.getLogger("embeddings")
BATCH = 64


def embeddings_file(scale: str, metric: str, dataset: str, results: Path = RESULTS) -> Path:
    return scale_dir(scale, results) / "cache" / metric / f"{dataset}.safetensors"


class PairEmbeddings:
    """The embeddings of a PairCache's pairs."""

    def __init__(self, scale: str, metric: str, dataset: str, pairs: PairCache, results: Path = RESULTS):
        path = embeddings_file(scale, metric, dataset, results)
        command = f"`python -m pso.embeddings --metric {metric} --dataset {dataset}`"
        if not path.exists():
            raise UserError(f"{path} is missing; {command} makes it.")
        self.tensors, self.prompt_index = load_file(path), pairs.prompt_index
        about = json.loads(path.with_suffix(".json").read_text())
        if about["prompts"] != pairs.prompts or len(self.tensors["target"]) != len(pairs):
            raise UserError(f"{path} is of other pairs than the cached latents; {command} makes it anew.")

    def rows(self, index: list[int], device) -> dict[str, Tensor]:
        """Unit vectors [B, D] of captions and of both pictures, float32."""
        found = {side: self.tensors[side][index] for side in SIDES}
        found["text"] = self.tensors["text"][self.prompt_index[index]]
        return {k: F.normalize(v.to(device).float(), dim=-1) for k, v in found.items()}  # the file has 16 bits


def build(config: Config, metric: str, dataset: str, results: Path) -> None:
    meter, hub = Meter(), Hub(hub_dir(config.scale, results))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip, entry = load_metric(metric, config.metrics[metric], hub, device), config.datasets[dataset]
    if not (hasattr(clip, "image_features") and hasattr(clip, "text_features")):
        raise ConfigError(f"--metric is {metric!r}, which embeds no captions and pictures; expected one with a CLIP.")
    reader = iter_pairs(hub.files(entry.repo, entry.files), entry, dataset)
    found: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    prompts, batch = {}, []

    def flush() -> None:
        for side in SIDES:
            pictures = [parse_image(getattr(pair, side)) for pair in batch]
            found[side].append(clip.image_features(pictures).half().cpu())
        batch.clear()

    for pair in reader:
        prompts.setdefault(pair.prompt)
        batch.append(pair)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    texts = list(prompts)
    if not texts:
        raise UserError(f"datasets.{dataset} has no usable pair in {entry.repo}: {reader.counts.sentence()}.")
    tensors = {side: torch.cat(parts) for side, parts in found.items()}
    parts = [clip.text_features(texts[i : i + BATCH]).half().cpu() for i in range(0, len(texts), BATCH)]
    path = embeddings_file(config.scale, metric, dataset, results)
    with atomic(path) as part:
        save_file({**tensors, "text": torch.cat(parts)}, part)
    settings = {"scale": config.scale, "metric": {metric: config.metrics[metric].model_dump()}}
    settings["dataset"] = {dataset: entry.model_dump()}
    about = {"spec": clip.spec, "prompts": texts, "counts": reader.counts.as_dict()}
    write_json(path.with_suffix(".json"), {**record("embeddings", settings, hub.inputs(), meter), **about})
    log.info("%s", reader.counts.sentence())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("embeddings"):
        config = from_arguments(args)
        for kind, name in (("metrics", args.metric), ("datasets", args.dataset)):
            known = getattr(config, kind)
            if name not in known:
                raise ConfigError(f"--{kind[:-1]} is {name!r}; expected one of {', '.join(known)}.")
        build(config, args.metric, args.dataset, args.results)


if __name__ == "__main__":
    main()
