"""What has to be run for the tables that were asked for: look-ups, torch-free."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from pso.config import ConfigError, load
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.paths import (
    LORA_FILE,
    RESULTS,
    images_dir,
    model_dir,
    reference_file,
    root_of,
    run_dir,
    scores_file,
    subject_of,
)


@dataclass(frozen=True, order=True)
class Job:
    """One run's images on one eval set."""

    task: str
    model: str
    method: str
    seed: int
    eval_set: str
    steps: int

    @property
    def subject(self) -> str | None:
        return subject_of(self.task)

    @property
    def untuned(self) -> "Job":
        """The same images before anything was tuned."""
        return replace(self, method=UNTUNED, seed=0)

    def folder(self, scale: str, results: Path = RESULTS) -> Path:
        return run_dir(scale, self.task, self.model, self.method, self.seed, results)

    def lora(self, scale: str, results: Path = RESULTS) -> Path | None:
        return None if self.method == UNTUNED else self.folder(scale, results) / "lora" / LORA_FILE

    def images(self, scale: str, results: Path = RESULTS) -> Path:
        return images_dir(self.folder(scale, results), self.eval_set, self.steps)

    def scores(self, scale: str, metric: str, results: Path = RESULTS) -> Path:
        return scores_file(self.folder(scale, results), self.eval_set, self.steps, metric)


def metric_missing(config: Config, table: TableEntry, metric: str) -> str | None:
    """Why a table's column has no numbers at this scale, if it has none."""
    if metric in table.missing_metrics:
        return table.missing_metrics[metric]
    only = config.metrics[metric].only_scales
    if only is not None and config.scale not in only:
        return f"exists only at scale {', '.join(only)}"
    if config.metrics[metric].compared_with is None:
        return None
    shown = _table_jobs(config, table)
    return next((why for job in sorted(shown) if (why := not_comparable(config, metric, job, shown))), None)


def not_comparable(config: Config, metric: str, job: Job, shown: set[Job]) -> str | None:
    """Why the images of a job have nothing that a metric could compare them with, if so; shown: all jobs."""
    needed = config.metrics[metric].compared_with
    if needed == "siblings" and config.datasets[job.eval_set].num_seeds < 2:
        return f"compares images of one prompt, and datasets.{job.eval_set}.num_seeds is 1"
    if needed == "untuned" and job.untuned not in shown:
        return f"compares with the untuned model's images, and no row shows {job.model} untuned at {job.steps} steps"
    if needed == "pictures" and job.subject is None:
        return "compares with the pictures of a subject, and the table has none"
    return None


def _table_jobs(config: Config, table: TableEntry, model: str | None = None) -> set[Job]:
    found = set()
    for row in table.shown_rows:
        if model in (None, row.model):
            seeds = [0] if row.method == UNTUNED else config.seeds
            for one, seed, eval_set in itertools.product(table.tasks, seeds, table.eval_sets):
                found.add(Job(one, row.model, row.method, seed, eval_set, row.steps))
    return found


def jobs(config: Config, model: str | None = None, task: str | None = None) -> list[Job]:
    """Every (run, eval set) whose images the tables need: all, or one model's, or one task's with all its subjects."""
    tables = [config.table_entries[name] for name in config.tables]
    return sorted({job for t in tables if task in (None, t.task) for job in _table_jobs(config, t, model)})


def jobs_asked_for(config: Config, model: str, task: str | None, untuned: bool = False) -> list[Job]:
    """The jobs of a command with --model, --task and --untuned, or a sentence if there are none."""
    found = jobs(config, model, task)
    if wanted := [job for job in found if job.method == UNTUNED or not untuned]:
        return wanted
    if found:
        raise ConfigError(f"--untuned is given, but no row of {', '.join(config.tables)} shows {model} untuned.")
    tables, tasks = ", ".join(config.tables), sorted({root_of(job.task) for job in jobs(config, model)})
    if not tasks:
        raise ConfigError(f"--model is {model!r}, but no row of {tables} shows it.")
    raise ConfigError(f"--task is {task!r}, but {model} has no row for it in {tables}; expected {' or '.join(tasks)}.")


def calibrated(config: Config) -> list[tuple[str, Row]]:
    """Task and row of every untuned row that the paper has too, of the tables asked for."""
    tables = [config.table_entries[name] for name in config.tables if reference_file(name).exists()]
    return [(t.task, row) for t in tables for row in t.rows if row.method == UNTUNED and row.missing is None]


def calibrations(config: Config, task: str, model: str, results: Path = RESULTS) -> list[Path]:
    """What has to say whether a model's untuned rows are the paper's before it is tuned for a task.

    Of that task; where it has no such row on the grid that is tuned, of the model's other tasks. Nothing where the
    weights or the judges are not the published ones.
    """
    if config.scale_entry.hub != "fetched":
        return []
    steps = config.models[model].tuned_steps
    tasks = {of for of, row in calibrated(config) if (row.model, row.steps) == (model, steps)}
    tasks = {root_of(task)} & tasks or tasks
    return [model_dir(config.scale, of, model, results) / "calibrate.json" for of in sorted(tasks)]


def off_before(config: Config, task: str, model: str, results: Path = RESULTS) -> list[str]:
    """What calibration found off, in sentences, for whoever tunes the model all the same."""
    found = [json.loads(path.read_text()) for path in calibrations(config, task, model, results) if path.exists()]
    return [f"warning: {model} untuned is off the paper's: {line}" for one in found for line in one["off"]]


def metrics(config: Config, task: str) -> list[str]:
    """Every metric that a table asked for can show of the images of a task (and its subjects), in order."""
    tables = [config.table_entries[name] for name in config.tables]
    columns = [(t, m) for t in tables if task == t.task for m in [*t.metrics, *t.extra_metrics]]
    return list(dict.fromkeys(m for table, m in columns if metric_missing(config, table, m) is None))


def where_results_lie(config: Config, results: Path = RESULTS) -> str:
    base = Path(results) / config.scale
    lines = [f"all of it on one page        {base}/report.html"]
    for table in config.tables:
        diff = f"  {base}/tables/{table}.diff.md" if reference_file(table).exists() else ""
        lines.append(f"table{' and diff to the paper' if diff else ' ' * 22}  {base}/tables/{table}.md{diff}")
    lines += [f"claims                       {base}/claims.md", f"figures                      {base}/figures/"]
    return "\n".join([*lines, f"cost of every job            {base}/cost.md"])


if __name__ == "__main__":
    print(where_results_lie(load()))
