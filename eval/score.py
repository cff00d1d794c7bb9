"""Scores of every image of one model by every metric, in one process: each scorer is loaded once.

    python -m eval.score --model sdxl_dmd2 [--task preference]

Reads images.json and the shards it lists; a missing, changed or broken image stops the job, it never
shrinks a mean. Writes one parquet per run, eval set and metric: one row per image, the scorer's
description in the schema metadata. scores.json, written last, records the job.
"""

import argparse
import io
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError

from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import parse_image
from pso.dreambooth import load_subject
from pso.entries import Config
from pso.hub import Hub, hub_dir
from pso.models import load_metric
from pso.paths import RESULTS, model_dir, root_of, scale_dir
from pso.provenance import Meter, UserError, atomic, record, sentences, sha256_of, write_json
from pso.runs import Job, jobs_asked_for, metrics

log = logging.getLogger("score")
METADATA_KEY = b"pso_bench"
BATCH = 64


def read_shards(listed: list[dict], root: Path, again: str) -> pd.DataFrame:
    """Rows image_id, prompt_id, prompt, image_seed, image (decoded), checked against the manifest."""
    frames = []
    for shard in listed:
        path = root / shard["file"]
        if not path.exists():
            raise UserError(f"{path} is listed in images.json but is not there; make it again with {again}.")
        if sha256_of(path) != shard["sha256"]:
            raise UserError(
                f"{path} is not the file that images.json lists (its sha256 differs); delete it and run {again}."
            )
        frames.append(pq.read_table(path).to_pandas())
    frame = pd.concat(frames, ignore_index=True)
    expected = sum(s["images"] for s in listed)
    if len(frame) != expected or frame["image_id"].duplicated().any():
        raise UserError(f"{len(frame)} images where images.json lists {expected}; delete the shards and run {again}.")
    frame["image"] = [decode(data, name, again) for data, name in zip(frame["png"], frame["image_id"], strict=True)]
    return frame.drop(columns="png")


def decode(data: bytes, name: str, again: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"image {name} cannot be decoded ({error}); delete its shard and run {again}.") from None


def score_images(scorer, frame: pd.DataFrame, pictures: list[Image.Image] | None = None) -> torch.Tensor:
    """One score per image [B], float32, in the frame's order. A scorer that asks for them gets a subject's pictures."""
    images, prompts = frame["image"].tolist(), frame["prompt"].tolist()
    more = [[pictures] * BATCH] if hasattr(scorer, "compared_with") else []
    batches = [(images[i : i + BATCH], prompts[i : i + BATCH]) for i in range(0, len(frame), BATCH)]
    return torch.cat([scorer.score(*batch, *(rows[: len(batch[0])] for rows in more)).cpu() for batch in batches])


def pictures_of(config: Config, hub: Hub, job: Job) -> tuple[list[Image.Image] | None, list[str]]:
    """The real pictures of a job's subject and their sha256; none where it has no subject."""
    if job.subject is None:
        return None, []
    paths = load_subject(hub, config.datasets[job.eval_set], job.eval_set, job.subject).images
    return [parse_image(path.read_bytes()) for path in paths], [sha256_of(path) for path in paths]


def write_scores(path: Path, frame: pd.DataFrame, scores: torch.Tensor, about: dict) -> None:
    if not torch.isfinite(scores).all():
        bad = frame["image_id"][int((~torch.isfinite(scores)).nonzero()[0])]
        raise UserError(f"{about['metric']} of image {bad} is not finite; is the checkpoint whole?")
    columns = frame[["image_id", "prompt_id", "image_seed"]].assign(score=scores.double().numpy())
    table = pa.Table.from_pandas(columns, preserve_index=False)
    with atomic(path) as part:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), part)


def is_current(path: Path, about: dict) -> bool:
    """Whether a file is there, whole, and of this scorer and these images."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return json.loads(metadata.get(METADATA_KEY, b"{}")) == json.loads(json.dumps(about))


def score_job(config: Config, job: Job, listed: list[dict], scorers: dict, hub: Hub, results: Path, again: str):
    """Score one run on one eval set where that was not done yet; (images, scores made)."""
    frame = read_shards(listed, scale_dir(config.scale, results), again)
    images = [shard["sha256"] for shard in listed]
    pictures, shown = pictures_of(config, hub, job)
    made = 0
    for name, scorer in scorers.items():
        about = {**asdict(job), "metric": name, "spec": scorer.spec, "images": images, "pictures": shown}
        about |= {"num_images": len(frame), "dropped": {}}
        path = job.scores(config.scale, name, results)
        if not is_current(path, about):
            write_scores(path, frame, score_images(scorer, frame, pictures), about)
            made += len(frame)
    return len(frame), made


def score(config: Config, model: str, results: Path, task: str | None = None) -> None:
    todo = jobs_asked_for(config, model, task)
    for root in sorted({root_of(job.task) for job in todo}):
        score_task(config, model, results, root, [job for job in todo if root_of(job.task) == root])


def score_task(config: Config, model: str, results: Path, task: str, todo: list[Job]) -> None:
    """All images of one task, its subjects together, by the metrics that its tables show."""
    meter, hub = Meter(), Hub(hub_dir(config.scale, results))
    again = f'`python -m eval.generate --model {model} --set \'{{"scale": "{config.scale}"}}\'`'
    scorers = {name: load_metric(name, config.metrics[name], hub, _device()) for name in metrics(config, task)}
    began, count, scored = time.monotonic(), 0, 0
    folder = model_dir(config.scale, task, model, results)
    manifest = _manifest(folder / "images.json", again)
    for job in todo:
        listed = _listed(manifest, job, folder, again)
        images, made = score_job(config, job, listed, scorers, hub, results, again)
        count, scored = count + images, scored + made
        log.info("%s %s seed%d: %d images x %d metrics  (%.0f s)", job.method, job.eval_set, job.seed, images,
                 len(scorers), time.monotonic() - began)  # fmt: skip
    meter.counts = {"images": count, "metrics": len(scorers), "scores_made": scored}
    settings = {"scale": config.scale, "metrics": {n: config.metrics[n].model_dump() for n in scorers}}
    specs = {name: scorer.spec for name, scorer in scorers.items()}
    write_json(folder / "scores.json", record("score", settings, hub.inputs(), meter, specs=specs))


def _manifest(path: Path, again: str) -> list[dict]:
    if not path.exists():
        raise UserError(f"{path} is missing; {again} makes the images and lists them there.")
    return json.loads(path.read_text())["images"]


def _listed(manifest: list[dict], job: Job, folder: Path, again: str) -> list[dict]:
    for entry in manifest:
        if {k: entry[k] for k in asdict(job)} == asdict(job):
            return entry["shards"]
    raise UserError(f"{folder}/images.json does not list {job.method} on {job.eval_set}; run {again}.")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", help="one task alone, with all its subjects; default: all tasks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("score"):
        config = from_arguments(args)
        if args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        score(config, args.model, args.results, args.task)


if __name__ == "__main__":
    main()
