"""The form of what `eval.compare` reads of a tree: which keys and columns it needs, of which kind. No torch.

A file of another version of this project may lack some. That is said where the file is read, by its name and key.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pso.provenance import UserError, read_json

COUNTS = ("steps", "num_prompts", "num_images", "num_runs")  # from 1, of a row with numbers
COLUMNS = ("eval_set", "label", "model", "method", *COUNTS)
LONGEST = 40  # letters of a wrong value that are shown

Ends = Annotated[list[float], Field(min_length=2, max_length=2)]


class Form(BaseModel):
    model_config = ConfigDict(strict=True)


class Place(Form):
    eval_set: str
    label: str
    metric: str
    paper: str
    difference: float | None
    interval: Ends | None
    doubtful: bool
    verdict: str


class Direction(Place):
    base: str


class Cell(Place):
    ours: float | None


class Diff(Form):
    scale: str
    comparable: bool
    directions: list[Direction]
    cells: list[Cell]


class Printed(Form):
    verdict: str
    cells: list


class Scorer(Form):
    spec: dict


class Claim(Form):
    id: str
    group: str
    text: str
    table: str
    left: str
    right: str
    metric: str
    eval_sets: list[str]
    relation: str
    bound: float
    estimate: float | None
    interval: Ends | None
    verdict: str
    paper: Printed
    scorer: Scorer | None = None  # none where nothing was measured


def read_diff(path: Path) -> dict:
    """A {table}.diff.json."""
    return _read(path, Diff, f"`python -m eval.diff --table {path.name.partition('.')[0]}`")


def read_claims(path: Path) -> list[dict]:
    """A claims.json."""
    return _read(path, list[Claim], "`python -m eval.claims`")


def _read(path: Path, form: Any, again: str) -> Any:
    remedy = f"{again} makes it anew"
    content = read_json(path, remedy)
    try:
        TypeAdapter(form).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        said = f"{path} has no `{key}`"
        if first["type"] != "missing":
            place = f"{path}: `{key}`" if key else f"{path}"
            said = f"{place} is {repr(first['input'])[:LONGEST]}; expected another form ({first['msg']})"
        raise UserError(f"{said}, so it is of another version or was changed; {remedy}.") from None
    return content


def read_table(path: Path) -> pd.DataFrame:
    """A {table}.csv; what is not finite is no number."""
    again = "delete it and run `snakemake --cores 2` again"
    try:
        frame = pd.read_csv(path)
    except ValueError as error:  # pandas' own errors are such
        raise UserError(f"{path} is no table ({error}); {again}.") from None
    if absent := [column for column in COLUMNS if column not in frame]:
        raise UserError(f"{path} lacks {', '.join(absent)}; {again}.")
    metrics = metrics_of(frame)
    numbers = [*COUNTS, *(f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high"))]
    if text := [column for column in numbers if not pd.api.types.is_numeric_dtype(frame[column])]:
        raise UserError(f"{path} has text in {', '.join(text)}; expected numbers; {again}.")
    frame = frame.replace([np.inf, -np.inf], np.nan)
    measured = frame[metrics].notna().any(axis=1)
    for column in COUNTS:
        wrong = frame[measured & ~((frame[column] >= 1) & (frame[column] % 1 == 0))]
        if len(wrong):
            line = wrong.iloc[0]
            raise UserError(
                f"{path}: {column} of {line['label']}, {line['eval_set']} is {line[column]}, but the row has numbers; "
                f"expected a whole number from 1; {again}."
            )
    return frame


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """The columns of a table that have an interval."""
    columns = set(frame.columns)
    return [column for column in frame.columns if {f"{column}_low", f"{column}_high"} <= columns]
