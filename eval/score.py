"""Scores of pictures by several metrics in one process: each scorer is loaded once. Of a model's images in the DAG:

    python -m eval.score --model sdxl_dmd2 [--task preference] [--untuned]

Reads images.json and the shards it lists; a missing, changed or broken image stops the job, it never
shrinks a mean. Writes one parquet per run, eval set and metric: one row per image, the scorer's
description in the schema metadata. Where some images have changed, the scores of the others are taken over: those of
the same bytes and prompt by the same scorer. scores.json, written last, records the job. With --untuned the rows in
which nothing was trained alone, from untuned_images.json to untuned_scores.json.

Of anyone's pictures (eval/score_folder.py):

    python -m eval.score --images DIR --prompts FILE --metrics pick_score,clip_score --hub WEIGHTS --out scores.parquet

And from Python: score_pictures(pictures, prompts, scorers).
"""

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from eval import score_folder
from eval.pictures import Pictures, Tally, prompts_told, read_shards, real_pictures, said
from eval.scoring import METADATA_KEY, Progress, default_device, score_pictures
from pso.config import ConfigError, add_arguments, from_arguments
from pso.dreambooth import load_subject
from pso.entries import Config
from pso.hub import Hub, hub_dir
from pso.locks import locked
from pso.models import load_metric
from pso.paths import RESULTS, manifest, model_dir, root_of, scale_dir
from pso.provenance import Meter, UserError, atomic, record, sentences, sha256_of, write_json
from pso.runs import Job, jobs, jobs_asked_for, metrics, not_comparable

log = logging.getLogger("score")
LOCK = ".score.lock"  # in a model's folder
JUDGED = ("image_sha256", "prompt")  # what a score by itself depends on, beside its scorer


def pictures_of(config: Config, hub: Hub, job: Job) -> tuple[list[Image.Image] | None, list[str]]:
    """The real pictures of a job's subject and their sha256; none where it has no subject."""
    if job.subject is None:
        return None, []
    paths = load_subject(hub, config.datasets[job.eval_set], job.eval_set, job.subject).images
    return real_pictures(paths), [sha256_of(path) for path in paths]


def write_scores(path: Path, frame: pd.DataFrame, scores: pd.Series, about: dict) -> None:
    columns = frame[["image_id", "prompt_id", "prompt", "image_seed", "image_sha256"]].assign(score=scores)
    table = pa.Table.from_pandas(columns, preserve_index=False)
    with atomic(path) as part:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), part)


def read_whole(path: Path) -> tuple[pa.Table | None, dict]:
    """A file's scores and what it says of them; None where it is not there or not whole."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            whole = file.read()
        return whole, json.loads((whole.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return None, {}


def is_current(path: Path, about: dict) -> bool:
    """Whether a file is there, whole, and of this scorer and these images."""
    table, told = read_whole(path)
    return table is not None and told == json.loads(json.dumps(about))


def taken_over(path: Path, spec: dict, frame: pd.DataFrame) -> np.ndarray:
    """For each image its score by the same scorer, of the same bytes and prompt, in the file of before; else NaN."""
    table, told = read_whole(path)
    same = told.get("spec") == json.loads(json.dumps(spec))
    if table is None or not same or not {*JUDGED, "score"} <= {*table.column_names}:
        return np.full(len(frame), np.nan)
    *judged, scores = (table[name].to_pylist() for name in (*JUDGED, "score"))
    before = dict(zip(zip(*judged, strict=True), scores, strict=True))
    return np.array([before.get(key, np.nan) for key in zip(*(frame[name] for name in JUDGED), strict=True)])


class Scoring:
    """All images of one model's jobs of one task, its subjects together, by the metrics that its tables show.

    untuned: of its untuned jobs alone.
    """

    def __init__(self, config: Config, model: str, task: str, results: Path, untuned: bool = False):
        self.config, self.model, self.task, self.results = config, model, task, results
        self.hub, self.folder = Hub(hub_dir(config.scale, results)), model_dir(config.scale, task, model, results)
        only = " --untuned" if untuned else ""
        self.again = f'`python -m eval.generate --model {model}{only} --set \'{{"scale": "{config.scale}"}}\'`'
        names, device = metrics(config, task), default_device()
        self.scorers = {name: load_metric(name, config.metrics[name], self.hub, device) for name in names}
        self.images_file, self.out = (manifest(self.folder, what, untuned) for what in ("images", "scores"))
        self.manifest = _manifest(self.images_file, self.again)
        self.shown = set(jobs(config, model, task))
        self.tally, self.prompts = Tally(), {}
        self.made = self.kept = 0  # scores; kept: taken over

    def listed(self, job: Job) -> list[dict]:
        """The shards of a job."""
        for entry in self.manifest:
            if {k: entry[k] for k in asdict(job)} == asdict(job):
                return entry["shards"]
        raise UserError(f"{self.images_file} does not list {job.method} on {job.eval_set}; run {self.again}.")

    def images(self, job: Job) -> tuple[Pictures, list[str]]:
        """What the manifest lists of a job, and the sha256 of its shards."""
        listed = self.listed(job)
        root = scale_dir(self.config.scale, self.results)
        return read_shards(listed, root, self.again), [shard["sha256"] for shard in listed]

    def run(self, job: Job) -> int:
        """Score one run on one eval set where that was not done yet; how many images it has."""
        pictures, digests = self.images(job)
        self.prompts.setdefault(job.eval_set, {}).update(dict.fromkeys(pictures.frame["prompt"]))
        real, shown = pictures_of(self.config, self.hub, job)
        about = {**asdict(job), "images": digests, "pictures": shown, "num_images": len(pictures), "dropped": {}}
        todo = {}
        for name, scorer in self.scorers.items():
            if not_comparable(self.config, name, job, self.shown):
                continue
            told = about | {"metric": name, "spec": scorer.spec}
            if scorer.compared_with == "untuned":
                told["untuned"] = [shard["sha256"] for shard in self.listed(job.untuned)]
            if not is_current(job.scores(self.config.scale, name, self.results), told):
                todo[name] = told
        self._make(job, pictures, real, todo)
        return len(pictures)

    def _make(self, job: Job, pictures: Pictures, real: list[Image.Image] | None, todo: dict[str, dict]) -> None:
        scorers = {name: self.scorers[name] for name in todo}
        untuned = None
        if any(scorer.compared_with == "untuned" for scorer in scorers.values()):
            untuned = pictures if job == job.untuned else same_noise(pictures, self.images(job.untuned)[0], self.again)
        known, frame = {}, pictures.frame
        if todo:
            frame = frame.assign(
                image_sha256=[sha256(pictures.read(row) or b"").hexdigest() for row in range(len(frame))]
            )
        for name in (name for name, scorer in scorers.items() if scorer.compared_with is None):
            path = job.scores(self.config.scale, name, self.results)
            known[name] = taken_over(path, todo[name]["spec"], frame)
        # also with nothing to score: every picture is decoded, counted, and refused if it is broken
        found = score_pictures(pictures, frame["prompt"].tolist(), scorers, prompt_ids=frame["prompt_id"].tolist(),
                               untuned=untuned, real=real, names=pictures.names, tally=self.tally,
                               progress=Progress(log.info), known=known)  # fmt: skip
        for name, about in todo.items():
            write_scores(job.scores(self.config.scale, name, self.results), frame, found[name], about)
        kept = sum(int((~np.isnan(scores)).sum()) for scores in known.values())
        self.made, self.kept = self.made + len(frame) * len(todo) - kept, self.kept + kept


def same_noise(pictures: Pictures, untuned: Pictures, again: str) -> Pictures:
    """The untuned model's pictures in the order of a run's, by prompt and seed."""
    keys = [list(zip(p.frame["prompt_id"], p.frame["image_seed"], strict=True)) for p in (pictures, untuned)]
    row = {key: i for i, key in enumerate(keys[1])}
    if lacking := [key for key in keys[0] if key not in row]:
        raise UserError(
            f"the untuned model has no image of prompt {lacking[0][0]} with seed {lacking[0][1]} "
            f"({len(lacking)} of {len(pictures)} are missing); make them with {again}."
        )
    return untuned.at([row[key] for key in keys[0]], pictures.frame)


def score(config: Config, model: str, results: Path, task: str | None = None, untuned: bool = False) -> None:
    todo = jobs_asked_for(config, model, task, untuned)
    for root in sorted({root_of(job.task) for job in todo}):
        with locked(model_dir(config.scale, root, model, results) / LOCK):
            scoring = Scoring(config, model, root, results, untuned)
            score_task(scoring, [job for job in todo if root_of(job.task) == root])


def score_task(scoring: Scoring, todo: list[Job]) -> None:
    meter, config = Meter(), scoring.config
    began, count = time.monotonic(), 0
    for number, job in enumerate(todo, 1):
        images = scoring.run(job)
        count += images
        left = (time.monotonic() - began) / number * (len(todo) - number)
        log.info("%d/%d %s %s seed%d: %d images x %d metrics  left %d:%02d", number, len(todo), job.method,
                 job.eval_set, job.seed, images, len(scoring.scorers), *divmod(math.ceil(left), 60))  # fmt: skip
    scorers = scoring.scorers
    meter.counts = {"images": count, "metrics": len(scorers)}
    meter.counts |= {"scores_made": scoring.made, "scores_taken_over": scoring.kept}
    settings = {"scale": config.scale, "metrics": {n: config.metrics[n].model_dump() for n in scorers}}
    specs = {name: scorer.spec for name, scorer in scorers.items()}
    seen = scoring.tally.told() | {"eval_sets": {n: prompts_told(p, scorers) for n, p in scoring.prompts.items()}}
    for line in said(seen):
        log.info(line)
    found = record("score", settings, scoring.hub.inputs(), meter, specs=specs, seen=seen)
    write_json(scoring.out, found)


def _manifest(path: Path, again: str) -> list[dict]:
    if not path.exists():
        raise UserError(f"{path} is missing; {again} makes the images and lists them there.")
    return json.loads(path.read_text())["images"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", help="score this model's images in the results folder")
    parser.add_argument("--task", help="one task alone, with all its subjects; default: all tasks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    score_folder.add_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("score"):
        if (args.model is None) == (args.images is None):
            given = "neither --model nor --images is" if args.model is None else "--model and --images are both"
            raise UserError(f"{given} given; expected --model for its images in --results, or --images for your own.")
        theirs = ("prompts", "metrics", "out", "hub", "untuned", "pictures") if args.images is None else ("task",)
        given = {option: getattr(args, option) for option in theirs}
        given |= {"untuned": None} if given.get("untuned") is True else {}  # of --model it names no folder
        if foreign := [f"--{option}" for option, value in given.items() if value is not None]:
            mode = "--model" if args.images is None else "--images"
            raise UserError(f"{', '.join(foreign)} given with {mode}, which takes no such option; leave it out.")
        if args.images is not None and args.untuned is True:
            raise UserError("--untuned is given without a value; with --images it names the untuned model's pictures.")
        config = from_arguments(args)
        if args.images is not None:
            score_folder.run(config, args)
            return
        if args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        score(config, args.model, args.results, args.task, args.untuned is True)


if __name__ == "__main__":
    main()
