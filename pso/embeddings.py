"""Unit embeddings of a data set's pairs by a metric's CLIP, made once: for objectives that compare pair with pair.

    python -m pso.embeddings --metric clip_score --dataset pickapic_v2

One vector per caption and one per picture, in the order of the latents (pso/caches.py), of any model.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pso.caches import SIDES, PairCache, check_some, check_visits, keep, read_cache
from pso.config import ConfigError, add_arguments, from_arguments
from pso.entries import Config
from pso.hub import Hub, hub_dir, recorded
from pso.models import load_metric
from pso.pairs import Visit, pairs_of
from pso.params import scorer_params
from pso.parts import Parts, convert
from pso.paths import RESULTS, scale_dir
from pso.provenance import Meter, UserError, fingerprint, record, sentences
from pso.visits import embeddings_plan

log = logging.getLogger("embeddings")
BATCH = 64


def embeddings_file(scale: str, metric: str, dataset: str, results: Path = RESULTS) -> Path:
    return scale_dir(scale, results) / "cache" / metric / f"{dataset}.safetensors"


class PairEmbeddings:
    """The embeddings of a PairCache's pairs. `inputs`: the file and those that it was made from, for run.json."""

    def __init__(self, scale: str, metric: str, dataset: str, pairs: PairCache, results: Path = RESULTS):
        path = embeddings_file(scale, metric, dataset, results)
        self.command = f"python -m pso.embeddings --metric {metric} --dataset {dataset}"
        self.tensors, about, self.inputs = read_cache(path, self.command)
        self.prompt_index, self.place = pairs.prompt_index, self.tensors.pop("place")
        if about["prompts"] != pairs.prompts or len(self.place) != len(pairs):
            raise UserError(f"{path} is of other pairs than the cached latents; `{self.command}` makes it anew.")

    def require(self, seed: int, visits: int, left_out: tuple[int, ...]) -> None:
        """Stops before a run whose pairs are not all there."""
        check_visits(self.place >= 0, left_out, seed, visits, self.command)

    def rows(self, index: list[int], device) -> dict[str, Tensor]:
        """Unit vectors [B, D] of captions and of both pictures, float32."""
        place = self.place[index]
        if (place < 0).any():
            raise UserError(f"no embedding is kept of a pair of {index}; `{self.command}` with the run's own settings.")
        found = {side: self.tensors[side][place] for side in SIDES}
        found["text"] = self.tensors["text"][self.prompt_index[index]]
        return {k: F.normalize(v.to(device).float(), dim=-1) for k, v in found.items()}  # the file has 16 bits


def build(config: Config, metric: str, dataset: str, results: Path) -> None:
    meter, hub = Meter(), Hub(hub_dir(config.scale, results))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip, entry = load_metric(metric, config.metrics[metric], hub, device), config.datasets[dataset]
    if not (hasattr(clip, "image_features") and hasattr(clip, "text_features")):
        raise ConfigError(f"--metric is {metric!r}, which embeds no captions and pictures; expected one with a CLIP.")
    reader, inputs = pairs_of(hub, entry, dataset)
    settings = {"scale": config.scale, "metric": {metric: config.metrics[metric].model_dump()}}
    settings["dataset"] = {dataset: recorded(entry)}
    path, weights = embeddings_file(config.scale, metric, dataset, results), hub.inputs()
    made_from = {"code": fingerprint("pso.embeddings", config.metrics[metric].module), "weights": weights}
    made_from["metric"] = scorer_params(config, metric)

    def encode(visits: list[Visit]) -> dict[str, Tensor]:
        sides = ([visit.pictures[k] for visit in visits] for k in (0, 1))
        whole = [pictures + pictures[-1:] * (BATCH - len(visits)) for pictures in sides]  # as in pso/caches.py
        found = [clip.image_features(pictures)[: len(visits)].half().cpu() for pictures in whole]
        return dict(zip(SIDES, found, strict=True))

    plan, folder = embeddings_plan(config, metric, dataset), path.with_suffix("")
    places, listed = convert(reader, plan, folder, made_from, lambda image: image, encode, BATCH)
    check_some(places, reader, config, metric, dataset)
    parts, kept = Parts(folder, listed, "python -m pso.embeddings"), places[:, 0] >= 0
    tensors = {side: parts.rows(side, torch.from_numpy(places[kept])) for side in SIDES}
    texts = [reader.prompts[i : i + BATCH] for i in range(0, len(reader.prompts), BATCH)]
    tensors["text"] = torch.cat([clip.text_features(some).half().cpu() for some in texts])
    tensors["place"] = torch.from_numpy(np.where(kept, np.cumsum(kept) - 1, -1))
    about = {"spec": clip.spec, "prompts": reader.prompts, "counts": reader.counts.as_dict()}
    keep(path, tensors, about, made_from, record("embeddings", settings, [*weights, *inputs()], meter))
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
