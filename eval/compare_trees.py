"""A tree of results as `eval.compare` reads it: tables alone, or what of runs and scores is there too. No torch.

Of a tree that holds committed files only there are tables/*.csv, tables/*.diff.json and claims.json; beside them a tree
may have records (run.json, images.json, scores.json, hub/*.json) and scores of every image.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval.compare_forms import metrics_of, read_claims, read_diff, read_table
from eval.diff import stale
from eval.scores import Scores, pooled, read_file
from pso import paths
from pso.entries import Config
from pso.provenance import UserError, read_json

RECORDS = ("*/**/run.json", "*/**/images.json", "*/**/scores.json", "hub/*.json")
EXPECTED = "the folder of a scale (results/miniature), of all results (results), or the word paper"


@dataclass(frozen=True)
class Tree:
    folder: Path
    name: str
    scale: str
    caption: str | None  # of the scale, as its texts have it
    tables: dict[str, pd.DataFrame]  # {table}.csv
    diffs: dict[str, dict]  # {table}.diff.json, but for those that are stale
    stale: dict[str, list[str]]  # table -> cells of which its diff.json tells another number than its csv
    claims: dict[str, dict] | None  # by id
    scored_claims: list[dict]  # those that tell their scorer, of other tables too
    judged: dict[str, int]  # of all its claims, of other tables too: declared, measured
    records: dict[str, dict]  # by path

    def record(self, line: pd.Series, task: str, what: str) -> dict:
        """images.json or scores.json of a row's model, or nothing."""
        return self.records.get(f"{paths.root_of(task)}/{line['model']}/{what}.json", {})

    def metrics(self, table: str) -> list[str]:
        return metrics_of(self.tables[table])

    def why_no_directions(self, table: str, side: str) -> str | None:
        """A sentence, where there is no {table}.diff.json that goes with the table."""
        file, again = f"tables/{table}.diff.json", f"`python -m eval.diff --table {table}`"
        if cells := self.stale.get(table):
            return (
                f"{side} ({self.name}): {file} has other numbers than tables/{table}.csv ({len(cells)}, the first of "
                f"{cells[0]}), so one is older and nothing of {file} is used; {again} makes it anew."
            )
        if table not in self.diffs:
            return f"{side} ({self.name}) has no {file}, so its directions are not known; {again} makes it."
        return None

    def scores(self, config: Config, table: str, line: pd.Series, metric: str) -> tuple[Scores | None, str | None]:
        """A row's scores of every image in the unit that tables print; or why there are none."""
        if table not in config.table_entries or metric not in config.metrics:
            return None, f"workflow/config has no {table} with {metric}"
        parts, seeds = [], set()
        tasks = config.table_entries[table].tasks
        for task in tasks:
            for run in sorted((self.folder / task / str(line["model"]) / str(line["method"])).glob("seed*")):
                if not run.name.removeprefix("seed").isdigit():  # a copy that somebody made
                    continue
                path = paths.scores_file(run, line["eval_set"], int(line["steps"]), metric)
                if path.exists():
                    parts.append((task, int(run.name.removeprefix("seed")), *read_file(path, "`python -m eval.score`")))
                    seeds.add(parts[-1][1])
        if not parts:
            return None, "no scores of single images"
        expected = len(tasks) * int(line["num_runs"])
        if len(parts) != expected or len(seeds) * len(tasks) != expected:
            return None, f"scores of {len(parts)} of {expected} runs"
        return pooled(str(line["label"]), metric, parts, config.metrics[metric].scale), None


def folder_of(argument: str, scale: str | None, side: str) -> Path:
    """The folder of one scale that an argument means."""
    folder = Path(argument)
    if not folder.is_dir():
        raise UserError(f"{side} is {argument!r}, which is no folder; expected {EXPECTED}.")
    if _is_scale(folder):
        return folder
    found = sorted(child.name for child in folder.iterdir() if child.is_dir() and _is_scale(child))
    if scale in found:
        return folder / scale
    if not found:
        raise UserError(
            f"{side} is {argument!r}, which has no tables/*.csv, nor has a folder in it; expected {EXPECTED}. "
            "`snakemake --cores 2 --config scale=miniature` makes the tables of a scale."
        )
    if scale is not None or len(found) > 1:
        asked = f"--scale is {scale}, but " if scale else ""
        raise UserError(
            f"{asked}{side} is {argument!r}, which holds {' and '.join(found)}; give one of them, as "
            f"--scale {found[0]} or {folder / found[0]}."
        )
    return folder / found[0]


def _is_scale(folder: Path) -> bool:
    return any((folder / "tables").glob("*.csv"))


def names_of(*folders: Path) -> list[str]:
    """The last parts of each folder's path, two or as many as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = 2
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def read_tree(folder: Path, name: str, tables: list[str] | None = None, side: str = "A") -> Tree:
    """`tables`: those asked for; default all."""
    files = {path.stem: path for path in sorted((folder / "tables").glob("*.csv"))}
    if unknown := [table for table in tables or [] if table not in files]:
        raise UserError(
            f"--tables names {', '.join(unknown)}, which {side} ({name}) has not; it has {', '.join(files)}."
        )
    wanted = {table: path for table, path in files.items() if tables is None or table in tables}
    diffs = {table: folder / "tables" / f"{table}.diff.json" for table in wanted}
    claims = folder / "claims.json"
    records = {}
    for pattern in RECORDS:
        for path in sorted(folder.glob(pattern)):
            content = read_json(path)
            if isinstance(content, dict) and "schema_version" in content:  # hub/ has others' files too
                records[str(path.relative_to(folder))] = content
    found = {table: read_diff(path) for table, path in diffs.items() if path.exists()}
    frames = {table: read_table(path) for table, path in wanted.items()}
    old = {table: cells for table, told in found.items() if (cells := stale(told, frames[table]))}
    judged = read_claims(claims) if claims.exists() else None
    return Tree(
        folder=folder,
        name=name,
        scale=_scale(folder, found, records),
        caption=_caption(folder),
        tables=frames,
        diffs={table: told for table, told in found.items() if table not in old},
        stale=old,
        claims=None if judged is None else {claim["id"]: claim for claim in judged if claim["table"] in wanted},
        scored_claims=[claim for claim in judged or () if claim.get("scorer")],
        judged={
            "declared": len(judged or ()),
            "measured": sum(claim["estimate"] is not None for claim in judged or ()),
        },
        records=records,
    )


def _scale(folder: Path, diffs: dict[str, dict], records: dict[str, dict]) -> str:
    """As the files say it; a folder may have been renamed."""
    said = {diff["scale"] for diff in diffs.values()}
    said |= {record["config"]["scale"] for record in records.values() if "scale" in record.get("config", {})}
    if len(said) > 1:
        raise UserError(f"{folder} holds results of several scales ({', '.join(sorted(said))}); expected one of them.")
    return said.pop() if said else folder.resolve().name


def _caption(folder: Path) -> str | None:
    for path in [folder / "claims.md", *sorted((folder / "tables").glob("*.md"))]:
        if path.exists() and (found := re.search(r"^(?:- )?Scale [\w-]+: (.+)$", path.read_text(), re.MULTILINE)):
            return found[1]
    return None
