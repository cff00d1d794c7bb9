"""Which figures there are for the tables that were asked for: look-ups, torch-free. eval/figures.py draws them.

Figure 1 of the paper sets the vanilla loss against PSO; its other qualitative figures (3 to 9) show rows of its tables
and tasks, and which ones is our choice: the rows of one table with one number of steps, or those of one task.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.runs import metric_missing, metrics

KINDS = ("png", "pdf", "tex")  # files of every figure
FEW = 8  # steps at most of a distilled model
NAIVE = "baselines.diffusion"  # module of the vanilla loss
JUDGES = ("pick_score", "image_reward", "hps_v21")  # shown first: what rows are trained on, then what none is
MANY_ROWS = 16  # of a matrix of rows
CHOICE = "which rows the paper's own figures show is open, these are our choice."


@dataclass(frozen=True)
class Grid:
    """Samples of rows for the same prompts and noise; `shows` says which rows, for the foot line."""

    name: str
    table: str
    eval_set: str
    rows: tuple[Row, ...]
    shows: str


@dataclass(frozen=True)
class Curves:
    """What the probes measured while rows of one model were tuned."""

    name: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Cost:
    """Scores of one model's rows, tuned on the grid on which they are sampled, against what their tuning took."""

    name: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]  # the untuned one too, where the tables have it
    eval_sets: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """How often each row scores above each other; `shows` says which rows."""

    name: str
    table: str
    eval_set: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    shows: str


def left_out(table: TableEntry) -> int:
    return len(table.all_rows) - len(table.shown_rows)


def short(label: str) -> str:
    """A row's label without the model that it stands on: `RPO w/ SDXL-DMD2` -> `RPO`."""
    return re.sub(r" w/ .*$", "", label)


def short_labels(rows: Sequence[Row]) -> list[str]:
    """Labels without the model, where none of them would stand twice."""
    names = [short(row.label) for row in rows]
    return [row.label if names.count(name) > 1 else name for name, row in zip(names, rows, strict=True)]


def figure_names(config: Config) -> list[str]:
    return [figure.name for figure in [*grids(config), *curves(config), *costs(config), *matrices(config)]]


def grids(config: Config) -> list[Grid]:
    found: dict[str, Grid] = {}
    for name in config.tables:
        table = config.table_entries[name]
        every = _concept_grids(name, table) if table.subjects else _table_grids(config, name, table)
        for grid in every:
            if grid.name in found:  # another table of the same model
                grid = Grid(f"{grid.name}_{name}", *list(vars(grid).values())[1:])
            found[grid.name] = grid
    return list(found.values())


def _concept_grids(name: str, table: TableEntry) -> list[Grid]:
    rows = tuple(table.shown_rows)
    shows = f"Two pictures of each subject, then one sample of each row of {name}; {CHOICE}"
    return [
        Grid(f"samples_{table.task}_{eval_set}", name, eval_set, rows, shows) for eval_set in table.eval_sets if rows
    ]


def _table_grids(config: Config, name: str, table: TableEntry) -> list[Grid]:
    found, rows = [], table.shown_rows
    few = sorted({row.steps for row in rows if row.steps <= FEW}, reverse=True)
    many = [row for row in rows if row.steps > FEW]
    prefix = _prefix(table.task)
    for steps in few:
        here = [row for row in rows if row.steps == steps]
        model = _family(here, name)
        what = f"{prefix}samples_{model}_{steps}step{'s' * (steps > 1)}"
        own = [row for row in here if row in table.rows]
        if own:
            shows = f"The rows of {name} with {steps} step{'s' * (steps > 1)}; {CHOICE}"
            found += [Grid(f"{what}_{one}", name, one, tuple(own), shows) for one in table.eval_sets]
        first = table.eval_sets[0]
        extra = [row for row in here if row in table.extra_rows]
        untuned = [row for row in here if row.method == UNTUNED and row.model == model]
        naive = [row for row in here if _is_naive(config, row)]
        if [row for row in extra if row not in naive]:
            more = _ordered(config, [*untuned, *(row for row in extra if row not in untuned)])
            found.append(Grid(f"{what}_more_{first}", name, first, more, f"Extra rows of {name} beside the untuned."))
        pso = [row for row in here if _is_pso(config, row)]
        if naive and pso and steps == few[0]:
            together = _ordered(config, [*untuned, *naive, *pso])
            shows = "The vanilla diffusion loss against PSO, as in the paper's Figure 1."
            found.append(Grid(f"{prefix}naive_against_pso_{model}_{first}", name, first, together, shows))
        if many and pso and steps == few[0]:
            against = (*many, *_ordered(config, [*untuned, *pso]))
            shows = f"Multi-step rows of {name} and {steps}-step rows with PSO; {CHOICE}"
            found.append(Grid(f"{prefix}many_steps_against_{model}_{first}", name, first, against, shows))
    return found


def _prefix(task: str) -> str:
    return "" if task == "preference" else f"{task}_"


def _family(rows: list[Row], table: str) -> str:
    """The models that are tuned in these rows, or the only model, or else the table's name."""
    models = sorted({row.model for row in rows if row.method != UNTUNED} or {row.model for row in rows})
    return "_and_".join(models) if len(models) < 3 else table


def _is_naive(config: Config, row: Row) -> bool:
    return row.method != UNTUNED and config.methods[row.method].module == NAIVE


def _is_pso(config: Config, row: Row) -> bool:
    return row.method != UNTUNED and config.methods[row.method].module.startswith("pso.")


def _ordered(config: Config, rows: list[Row]) -> tuple[Row, ...]:
    """What was not tuned, the vanilla loss, other methods, PSO."""

    def place(row: Row) -> int:
        if row.method == UNTUNED:
            return 0
        return 1 if _is_naive(config, row) else 3 if _is_pso(config, row) else 2

    return tuple(sorted(rows, key=place))


def curves(config: Config) -> list[Curves]:
    """One figure for each task and tuned model; rows that differ in steps alone are one run."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    tasks: dict[str, tuple[str, ...]] = {}
    for name in config.tables:
        table = config.table_entries[name]
        tasks[table.task] = tuple(dict.fromkeys([*tasks.get(table.task, ()), *table.tasks]))
        for row in table.shown_rows:
            if row.method != UNTUNED:
                found.setdefault((table.task, row.model), {}).setdefault(row.method, row)
    return [
        Curves(f"{_prefix(task)}curves_{model}", tasks[task], _ordered(config, [*rows.values()]))
        for (task, model), rows in found.items()
    ]


def judges(measured: list[str]) -> tuple[str, ...]:
    """Two of the metrics that have numbers: a preference judge that is trained on and one that is not, if there are."""
    first = [name for name in JUDGES if name in measured]
    return tuple([*first, *(name for name in measured if name not in first)][:2])


def costs(config: Config) -> list[Cost]:
    """One figure for each task and tuned model of which there are two rows to compare."""
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    sets: dict[tuple[str, str], list[str]] = {}
    for name in config.tables:
        table = config.table_entries[name]
        for row in table.shown_rows:
            if row.steps != config.models[row.model].tuned_steps:
                continue
            key = table.task, row.model
            rows.setdefault(key, {}).setdefault(row.method, row)
            sets[key] = [one for one in sets.get(key, table.eval_sets) if one in table.eval_sets]
    tasks = {shown.name: shown.tasks for shown in curves(config)}
    found = []
    for (task, model), those in rows.items():
        of, ordered = tasks.get(f"{_prefix(task)}curves_{model}"), _ordered(config, [*those.values()])
        shown = judges(metrics(config, task))
        if of and len(ordered) > 1 and sets[task, model] and shown:
            found.append(Cost(f"{_prefix(task)}cost_{model}", of, ordered, tuple(sets[task, model]), shown))
    return found


def matrices(config: Config) -> list[Matrix]:
    """One figure for each table; where it has many rows of its few-step rows, or one for each of their models."""
    found = []
    for name in config.tables:
        table = config.table_entries[name]
        rows, first = table.shown_rows, table.eval_sets[0]
        shown = judges([m for m in [*table.metrics, *table.extra_metrics] if not metric_missing(config, table, m)])
        groups = [(f"win_rates_{name}", rows, f"All rows of {name} with images")]
        few = [row for row in rows if row.steps <= FEW]
        if len(rows) > MANY_ROWS:
            groups = [(f"win_rates_{name}", few, f"The rows of {name} with at most {FEW} steps")]
        if len(rows) > MANY_ROWS < len(few):
            models = dict.fromkeys(row.model for row in few)
            of = {model: [row for row in few if row.model == model] for model in models}
            groups = [(f"win_rates_{name}_{m}", r, f"The rows of {name} on {m}") for m, r in of.items()]
        for what, those, shows in groups:
            if len(those) > 1 and shown:
                found.append(Matrix(what, name, first, tuple(those), shown, shows))
    return found
