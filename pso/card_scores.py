"""The scores on a model card: rows of the tables asked for that show a run, beside its untuned model's. Torch-free."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from huggingface_hub import EvalResult

from pso.campaign import Run
from pso.entries import Config, Row, TableEntry
from pso.hub import recorded
from pso.paths import images_dir, reference_file, run_dir, scale_dir
from pso.provenance import UserError
from pso.runs import metric_missing
from pso.trained_on import trained_on

DIVERSITY = "diversity"
ARROWS = {True: "↑", False: "↓"}
DASH = "–"
SHARD_KEY = b"pso_bench"  # of eval/generate.py


@dataclass(frozen=True)
class Cell:
    """One metric: value and 95 % interval of the tuned and of the untuned row, where measured."""

    metric: str
    title: str
    tuned: tuple[float, float, float]
    untuned: tuple[float, float, float] | None


@dataclass(frozen=True)
class Block:
    """A run's row of one table on one eval set."""

    table: str
    eval_set: str
    dataset: str  # repository
    steps: int
    prompts: int
    images: int
    num_runs: int
    subjects: int
    cells: list[Cell]
    text: str
    dropped: list[str]
    over: str

    @property
    def means(self) -> str:
        """What they are means over."""
        told = f"{self.prompts} prompts and {self.images} pictures"
        if self.subjects:
            told += f" of {self.subjects} subjects, each with its own LoRA, of which this is one"
        if self.num_runs > 1:
            told += f"; tuned: also over {self.num_runs} training seeds, of which this is one"
        return told

    def diversity(self) -> str | None:
        """How much pictures of one prompt differ, beside the untuned model's, where measured."""
        cell = next((cell for cell in self.cells if cell.metric == DIVERSITY), None)
        if cell is None:
            return None
        where = f"{self.eval_set} with {self.steps} step{'s' if self.steps > 1 else ''}"
        told = f"Pictures of one prompt differ by {cell.tuned[0]:.3f} on {where}"
        if cell.untuned is None:
            return f"{told}; the untuned model was not measured."
        less = "less diverse than" if cell.tuned[0] < cell.untuned[0] else "not less diverse than"
        return f"{told}, the untuned model's by {cell.untuned[0]:.3f}: {less} before tuning."


def rows_of(table: TableEntry, run: Run) -> list[Row]:
    return [row for row in table.shown_rows if (row.model, row.method) == (run.model, run.method)]


def showing(config: Config, run: Run) -> list[str]:
    """Tables asked for whose numbers are of a run, or means over it and others."""
    if run.seed not in config.seeds:
        return []
    entries = {name: config.table_entries[name] for name in config.tables}
    return [name for name, table in entries.items() if run.task in table.tasks and rows_of(table, run)]


def blocks(config: Config, run: Run, results: Path, lora_sha256: str, without: Collection[str] = ()) -> list[Block]:
    """In the order of tables, rows and eval sets; UserError where pictures were drawn with another LoRA. `without`:
    tables that are left out."""
    found = []
    for name in showing(config, run):
        if name in without:
            continue
        table, frame = config.table_entries[name], read_table(config, results, name)
        for row in rows_of(table, run):
            for eval_set in table.eval_sets:
                check_drawn(config, run, row, eval_set, results, lora_sha256)
                found += _block(config, name, table, row, eval_set, frame)
    return found


def table_file(config: Config, results: Path, name: str) -> Path:
    return scale_dir(config.scale, results) / "tables" / f"{name}.csv"


def read_table(config: Config, results: Path, name: str) -> pd.DataFrame:
    path = table_file(config, results, name)
    if not path.is_file():
        raise UserError(f"{path} is not there; `snakemake --cores 2 {name} --config scale={config.scale}` makes it.")
    return pd.read_csv(path)


def check_drawn(config: Config, run: Run, row: Row, eval_set: str, results: Path, lora_sha256: str) -> None:
    """The pictures that were scored tell of the LoRA that drew them, as long as they are kept."""
    folder = run_dir(config.scale, run.task, run.model, run.method, run.seed, results)
    for shard in sorted(images_dir(folder, eval_set, row.steps).glob("shard*.parquet")):
        told = json.loads((pq.read_metadata(shard).metadata or {}).get(SHARD_KEY, b"{}"))
        if told.get("lora") != lora_sha256:
            raise UserError(
                f"{shard} was drawn with another LoRA than the one in {folder / 'lora'}, and so was what the tables "
                f"tell; `snakemake --cores 2 cards --config scale={config.scale}` draws and scores it anew."
            )


def _block(
    config: Config, name: str, table: TableEntry, row: Row, eval_set: str, frame: pd.DataFrame
) -> Iterator[Block]:
    here = frame[frame["eval_set"] == eval_set].set_index("label")
    base = table.untuned_of(row)
    before = None if base is None else base.label
    if absent := [label for label in (row.label, before) if label is not None and label not in here.index]:
        raise UserError(
            f"tables/{name}.csv has no row {absent[0]!r} on {eval_set}; `snakemake --cores 2 {name} --config "
            f"scale={config.scale}` makes it anew."
        )
    line = here.loc[row.label]
    untuned = None if before is None else here.loc[before]
    cells = []
    for metric in [*table.metrics, *table.extra_metrics]:
        if metric_missing(config, table, metric) is None and (value := _measured(line, metric)) is not None:
            other = None if untuned is None else _measured(untuned, metric)
            cells.append(Cell(metric, config.metrics[metric].title, value, other))
    if not cells:
        return
    dropped = line["dropped"]
    yield Block(
        name, eval_set, recorded(config.datasets[eval_set])["repo"], row.steps, int(line["num_prompts"]),
        int(line["num_images"]), int(line["num_runs"]), len(table.subjects), cells,
        markdown(config, cells, row, before),
        [] if pd.isna(dropped) else [f"Pictures without a score on {eval_set}: {dropped}."],
        over(config, name, table, int(line["num_runs"])),
    )  # fmt: skip


def _measured(line: pd.Series, metric: str) -> tuple[float, float, float] | None:
    values = [line.get(key) for key in (metric, f"{metric}_low", f"{metric}_high")]
    return None if any(pd.isna(value) for value in values) else tuple(map(float, values))


def over(config: Config, name: str, table: TableEntry, num_runs: int) -> str:
    """What the intervals cover, and what not."""
    what = f"subjects or their prompts (results/{config.scale}/tables/{name}.md)" if table.subjects else "prompts"
    runs = "of which there is one" if num_runs == 1 else f"of which there are {num_runs}"
    told = f"The intervals of {name} are bootstraps over {what}; they do not cover the training seed, {runs}."
    if reference_file(name).exists():
        told += f" Paired intervals between the paper's rows are in results/{config.scale}/tables/{name}.diff.md."
    return told


def markdown(config: Config, cells: list[Cell], row: Row, untuned: str | None) -> str:
    signs = [" ‡" if trained_on(config, row.method, cell.metric) else "" for cell in cells]
    frame = pd.DataFrame(
        {
            "": [f"{_arrow(config, c.metric)}{c.title}{sign}" for c, sign in zip(cells, signs, strict=True)],
            row.label: [printed(config, cell.metric, cell.tuned) for cell in cells],
            untuned or "untuned": [printed(config, cell.metric, cell.untuned) for cell in cells],
        }
    )
    return frame.to_markdown(index=False, disable_numparse=True, colalign=("left", "right", "right"))


def _arrow(config: Config, metric: str) -> str:
    """Nothing where a column only tells how far from the untuned model."""
    entry = config.metrics[metric]
    return "" if entry.compared_with == "untuned" else f"{ARROWS[entry.higher_is_better]} "


def printed(config: Config, metric: str, value: tuple[float, float, float] | None) -> str:
    if value is None:
        return DASH
    places = config.metrics[metric].decimals
    mean, low, high = (f"{number:z.{places}f}" for number in value)
    return f"{mean} [{low}, {high}]"


def eval_results(config: Config, shown: list[Block]) -> list[EvalResult]:
    """The tuned row as the Hub lists it; of a metric in two tables the first counts."""
    toy = "" if config.scale_entry.hub == "fetched" else f" (stand-in, scale {config.scale})"
    found: dict[tuple, EvalResult] = {}
    for block in shown:
        for cell in block.cells:
            key = (block.eval_set, block.steps, cell.metric)
            found.setdefault(
                key,
                EvalResult(
                    task_type="text-to-image",
                    task_name=f"Text-to-image{toy}",
                    dataset_type=block.dataset,
                    dataset_name=f"{block.eval_set}{toy}",
                    dataset_config=f"{block.eval_set}, {block.steps} steps",
                    dataset_args={"num_prompts": block.prompts, "num_images": block.images} | averaged(block),
                    metric_type=cell.metric,
                    metric_name=cell.title,
                    metric_value=rounded(cell.tuned[0]),
                    metric_args={"low_95": rounded(cell.tuned[1]), "high_95": rounded(cell.tuned[2])},
                ),
            )
    return list(found.values())


def averaged(block: Block) -> dict[str, int]:
    """How many LoRAs a number is the mean of, where it is not of this one alone."""
    found = {"num_subjects": block.subjects, "num_training_seeds": block.num_runs}
    return {key: number for key, number in found.items() if number > 1}


def rounded(value: float) -> float:
    """To more digits than an interval is wide."""
    return float(f"{value:.6g}")
