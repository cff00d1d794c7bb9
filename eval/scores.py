"""Scores as eval/score.py left them on disk: read, checked, pooled over training seeds, paired. No torch.

A file holds one eval set of one run: parquet with columns image_id, prompt_id, image_seed, score, and
the schema metadata key `pso_bench`: JSON with metric, spec (describes the scorer), model, method,
eval_set, steps, num_images (images to be scored) and dropped (reason -> images left without a score).
From here on scores are in the unit that tables print: metrics.yaml's scale times the stored score.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pso import paths
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.provenance import UserError, digest

COLUMNS = ["image_id", "prompt_id", "image_seed", "score"]
METADATA_KEY = "pso_bench"
IMAGE = ["prompt_id", "image_seed"]  # what makes images of two rows a pair
MANY_SUBJECTS = 10  # from so many on, subjects are what is resampled


@dataclass(frozen=True)
class Scores:
    """One row's scores on one eval set: a line per image, the runs of all training seeds together."""

    label: str
    metric: str
    frame: pd.DataFrame  # COLUMNS, run_seed and subject (missing where a task has none)
    spec: dict
    dropped: dict[str, int]

    @property
    def run_seeds(self) -> list[int]:
        return sorted(int(seed) for seed in self.frame["run_seed"].unique())

    @cached_property
    def per_image(self) -> pd.Series:
        """Mean over training seeds of every image: every comparison with another row begins with it."""
        return _means(self, self.frame)


def table_entry(config: Config, name: str) -> TableEntry:
    if name not in config.table_entries:
        close = difflib.get_close_matches(name, config.table_entries, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(config.table_entries)}."
        raise UserError(f"--table is {name!r}, which has no entry in tables.yaml; {hint}")
    return config.table_entries[name]


def find_row(table: TableEntry, label: str) -> Row:
    return next(row for row in table.all_rows if row.label == label)


def metric_title(config: Config, metric: str) -> str:
    return config.metrics[metric].title if metric in config.metrics else metric.replace("_", " ")


def run_folders(config: Config, results: Path, task: str, row: Row) -> dict[int, Path]:
    """Training seed -> folder of the run. Nothing was trained in an untuned row: it has one run."""
    seeds = [0] if row.method == UNTUNED else config.seeds
    return {seed: paths.run_dir(config.scale, task, row.model, row.method, seed, results) for seed in seeds}


def units(frame: pd.DataFrame) -> dict[str, pd.Series | None]:
    """What eval.stats averages over and resamples: `clusters`, and the `strata` that they lie in.

    Prompts; where there are subjects, subjects if they are many, else prompts within subjects.
    """
    subjects = frame["subject"]
    if subjects.isna().all():
        return {"clusters": frame["prompt_id"], "strata": None}
    if subjects.nunique() >= MANY_SUBJECTS:
        return {"clusters": subjects, "strata": None}
    return {"clusters": frame["prompt_id"], "strata": subjects}


def score_command(config: Config, results: Path, row: Row) -> str:
    elsewhere = "" if results == paths.RESULTS else f" --results {results}"
    return f'`python -m eval.score --model {row.model} --set \'{{"scale": "{config.scale}"}}\'{elsewhere}`'


def read_scores(
    config: Config, results: Path, row: Row, eval_set: str, metric: str, tasks: Sequence[str] = ("preference",)
) -> Scores:
    """A row's scores, of all subjects if its table has them; a prompt's id then begins with its subject.

    UserError if a file is not there, not complete or not what its place says.
    """
    parts = []
    again = score_command(config, results, row)
    folders = [(t, *found) for t in tasks for found in run_folders(config, results, t, row).items()]
    for task, seed, folder in folders:
        path = paths.scores_file(folder, eval_set, row.steps, metric)
        frame, told = read_file(path, again)
        if problems := _problems(config, frame, told, row, eval_set, metric, seed):
            raise UserError(f"{path} holds {'; '.join(problems)}; delete it and make it again with {again}.")
        parts.append((task, seed, frame, told))
    return pooled(row.label, metric, parts, config.metrics[metric].scale)


def pooled(label: str, metric: str, parts: Sequence[tuple[str, int, pd.DataFrame, dict]], scale: float) -> Scores:
    """Task, training seed, lines and metadata of each file of a row, as one."""
    frames, specs, dropped = [], {}, {}
    for task, seed, lines, told in parts:
        subject, frame = paths.subject_of(task), lines
        if subject:
            frame = lines.assign(prompt_id=subject + "/" + lines["prompt_id"].astype(str))
        frames.append(frame.assign(run_seed=seed, subject=subject))
        specs[digest(told["spec"])] = told["spec"]
        for reason, count in told.get("dropped", {}).items():
            dropped[reason] = dropped.get(reason, 0) + count
    if len(specs) > 1:
        raise UserError(_other_scorer(metric, f"the runs of {label!r}", specs))
    frame = pd.concat(frames, ignore_index=True)
    frame["score"] = frame["score"].astype(float) * scale
    scores = Scores(label, metric, frame, next(iter(specs.values())), dropped)
    per_image(scores)  # refuses training seeds with different images
    return scores


class ScoreFiles:
    """Scores of rows, each read once: tables, maps and sections of a page ask for the same ones many times."""

    def __init__(self, config: Config, results: Path) -> None:
        self.config, self.results = config, results
        self.read: dict[tuple, Scores] = {}

    def __call__(self, row: Row, eval_set: str, metric: str, tasks: Sequence[str] = ("preference",)) -> Scores:
        key = row.label, row.model, row.method, row.steps, eval_set, metric, tuple(tasks)
        if key not in self.read:
            self.read[key] = read_scores(self.config, self.results, row, eval_set, metric, tasks)
        return self.read[key]


def read_file(path: Path, again: str) -> tuple[pd.DataFrame, dict]:
    """Lines and metadata of a file; again: the command that makes it."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with {again}.") from None
    except (OSError, pa.ArrowInvalid) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({first_line}); delete it and make it again with {again}.") from None
    told = json.loads((table.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}"))
    absent = [column for column in COLUMNS if column not in table.column_names]
    absent += [key for key in ("metric", "spec", "num_images") if key not in told]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; delete it and make it again with {again}.")
    return table.select(COLUMNS).to_pandas(), told


def _problems(
    config: Config, frame: pd.DataFrame, told: dict, row: Row, eval_set: str, metric: str, seed: int
) -> list[str]:
    """What is wrong with a file's content, if anything."""
    place = {"metric": metric, "model": row.model, "method": row.method, "eval_set": eval_set, "steps": row.steps}
    place |= {"seed": seed} if "seed" in told else {}
    wrong = [key for key, value in place.items() if told.get(key) != value]
    problems = [f"{key} {told.get(key)!r} instead of {place[key]!r}" for key in wrong]
    num_bad = int((~frame["score"].between(-1e300, 1e300)).sum())  # NaN is not between anything
    if num_bad:
        problems.append(f"{num_bad} of {len(frame)} scores that are not finite")
    for columns in (["image_id"], IMAGE):
        if repeated := int(frame.duplicated(columns).sum()):
            problems.append(f"{repeated} repeated {' and '.join(columns)}")
    num_dropped = sum(told.get("dropped", {}).values())
    if len(frame) + num_dropped != told["num_images"]:
        problems.append(f"{len(frame)} scores and {num_dropped} dropped images of {told['num_images']}")
    entry = config.datasets[eval_set]
    known = entry.num_rows if entry.format != "dreambooth" else None  # there a row is a subject
    num_prompts = known or frame["prompt_id"].nunique()
    if not num_dropped and told["num_images"] != num_prompts * entry.num_seeds:
        problems.append(f"{told['num_images']} images for {num_prompts} prompts with {entry.num_seeds} seeds each")
    return problems


def _other_scorer(metric: str, where: str, specs: dict[str, dict]) -> str:
    keys = sorted({key for spec in specs.values() for key in spec})
    differing = [key for key in keys if len({digest(spec.get(key)) for spec in specs.values()}) > 1]
    return (
        f"{metric} of {where} comes from different scorers ({', '.join(specs)}; they differ in "
        f"{', '.join(differing)}); delete the older {metric}.parquet files and score those images again."
    )


def check_same_scorer(scores: list[Scores]) -> None:
    """Rows are comparable only if one scorer scored them."""
    specs = {digest(s.spec): s.spec for s in scores}
    if len(specs) > 1:
        labels = " and ".join(repr(s.label) for s in {digest(s.spec): s for s in scores}.values())
        raise UserError(_other_scorer(scores[0].metric, labels, specs))


def per_image(scores: Scores, run_seed: int | None = None) -> pd.Series:
    """Mean over training seeds (or one of them) of every image; index prompt_id, image_seed."""
    if run_seed is None:
        return scores.per_image
    return _means(scores, scores.frame[scores.frame["run_seed"] == run_seed])


def _means(scores: Scores, frame: pd.DataFrame) -> pd.Series:
    images = frame.groupby(IMAGE)["score"]
    num_seeds = frame["run_seed"].nunique()
    incomplete = int((images.size() != num_seeds).sum())
    if incomplete:
        raise UserError(
            f"{incomplete} of {images.ngroups} images of {scores.label!r} have no {scores.metric} for some of its "
            f"{num_seeds} training seeds; score the missing ones, or nothing can be compared."
        )
    return images.mean()


def pair(left: Scores, right: Scores, run_seed: int | None = None) -> pd.DataFrame:
    """Columns prompt_id, subject, left, right: the same images on both sides. run_seed: of each row that has it."""
    check_same_scorer([left, right])
    sides = {"left": left, "right": right}
    means = {side: per_image(s, run_seed if run_seed in s.run_seeds else None) for side, s in sides.items()}
    both = pd.concat(means, axis=1)
    only_right, only_left = (int(both[side].isna().sum()) for side in ("left", "right"))
    if only_left or only_right:
        raise UserError(
            f"{left.metric} of {left.label!r} and {right.label!r} does not pair up: {only_left} images only in the "
            f"first, {only_right} only in the second, {len(both) - only_left - only_right} in both; "
            "score the missing images, nothing is compared without them."
        )
    subjects = left.frame.drop_duplicates("prompt_id").set_index("prompt_id")["subject"]
    return both.reset_index().join(subjects, on="prompt_id")[["prompt_id", "subject", "left", "right"]]
