"""What has to be run for the tables that were asked for: look-ups, torch-free."""

from dataclasses import dataclass
from pathlib import Path

from pso.config import load
from pso.entries import UNTUNED, Config, TableEntry
from pso.paths import LORA_FILE, RESULTS, images_dir, run_dir, scores_file


@dataclass(frozen=True, order=True)
class Job:
    """One run's images on one eval set."""

    task: str
    model: str
    method: str
    seed: int
    eval_set: str
    steps: int

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
    return f"exists only at scale {', '.join(only)}" if only is not None and config.scale not in only else None


def jobs(config: Config, model: str | None = None) -> list[Job]:
    """Every (run, eval set) whose images the tables need, of one model or of all."""
    found = set()
    for name in config.tables:
        table = config.table_entries[name]
        for row in [*table.rows, *table.extra_rows]:
            if row.missing is None and model in (None, row.model):
                seeds = [0] if row.method == UNTUNED else config.seeds
                for seed in seeds:
                    for eval_set in table.eval_sets:
                        found.add(Job(table.task, row.model, row.method, seed, eval_set, row.steps))
    return sorted(found)


def metrics(config: Config) -> list[str]:
    """Every metric that a table asked for can show, in order."""
    tables = [config.table_entries[name] for name in config.tables]
    columns = [(table, m) for table in tables for m in [*table.metrics, *table.extra_metrics]]
    return list(dict.fromkeys(m for table, m in columns if metric_missing(config, table, m) is None))


def where_results_lie(config: Config, results: Path = RESULTS) -> str:
    base = Path(results) / config.scale
    lines = [f"table and diff to the paper  {base}/tables/{t}.md  {base}/tables/{t}.diff.md" for t in config.tables]
    lines += [f"claims                       {base}/claims.md", f"sample grids and curves      {base}/figures/"]
    return "\n".join([*lines, f"cost of every job            {base}/cost.md"])


if __name__ == "__main__":
    print(where_results_lie(load()))
