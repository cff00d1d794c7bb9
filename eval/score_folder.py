"""Scores of anyone's pictures: a folder or a parquet file and their prompts in, one parquet out.

    python -m eval.score --images DIR_OR_PARQUET --prompts FILE --metrics pick_score,clip_score --hub WEIGHTS

A folder holds PNG, JPEG or WebP files, found at any depth; a parquet file (or a folder of them, as results/ has) a
column `png` or `image` with bytes or with {bytes, path}, as `datasets` writes it. Prompts are a .txt (a line each, in
the order of the sorted file names or of the rows), or a .json list, .jsonl, .csv or .tsv with file_name and prompt
(or text), and where known prompt_id and seed; without --prompts they are a folder's metadata.jsonl or a column
`prompt`. Every picture needs a prompt and every prompt a picture.
"""

import argparse
import csv
import io
import json
import logging
import re
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from eval.pictures import (
    COLUMNS,
    EncodedRows,
    Pictures,
    Tally,
    is_text,
    open_parquet,
    prompts_told,
    read_columns,
    real_pictures,
    said,
)
from eval.scoring import METADATA_KEY, Progress, default_device, score_pictures
from pso.checks import known
from pso.config import published
from pso.data import read_text, text_id
from pso.dreambooth import IMAGE_SUFFIXES
from pso.entries import Config
from pso.hub import Hub, hub_dir
from pso.imagefolder import METADATA
from pso.models import load_metric
from pso.provenance import Meter, UserError, atomic, record

log = logging.getLogger("score")
TODO = "make or fetch it again, or take it out of the pictures and of the prompts"
DOWNLOAD = "hf download REPOSITORY --local-dir FOLDER/REPOSITORY"
METRICS, OUT = "pick_score,clip_score", Path("scores.parquet")
ENCODED = ("png", "image")  # columns that may hold pictures
PROMPT = ("prompt", "text", "caption")
LINE = '{"file_name": "0001.png", "prompt": "a red circle"}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="score these: a folder of pictures, or a parquet file")
    parser.add_argument("--prompts", type=Path, help="their prompts: .txt, .json, .jsonl, .csv or .tsv")
    parser.add_argument("--metrics", help=f"names of metrics.yaml, with commas; default: {METRICS}")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    parser.add_argument("--hub", type=Path, help="folder with repositories by id; default: the scale's stand-ins")
    untuned = (
        "the untuned model's pictures under the same names, for drift; with --model no value: its untuned rows alone"
    )
    parser.add_argument("--untuned", type=Path, nargs="?", const=True, help=untuned)
    parser.add_argument("--pictures", type=Path, help="real pictures of the subject, for dino and clip_i")


# ---- pictures ----


def open_pictures(path: Path) -> Pictures:
    """The pictures of a folder or parquet file, each under a name of its own; none is decoded yet."""
    if not path.exists():
        raise UserError(f"{path} is not there; expected a folder of pictures or a parquet file.")
    if path.is_file():
        return _of_parquet([path])
    files = sorted(found for found in path.rglob("*") if found.is_file())
    named = {found.relative_to(path).as_posix(): found for found in files if found.suffix.lower() in IMAGE_SUFFIXES}
    shards = [found for found in files if found.suffix.lower() == ".parquet"]
    if shards and not named:
        return _of_parquet(sorted(shards, key=lambda found: (len(found.name), found.name)))
    if not named or shards:
        what = "pictures and parquet files" if shards else f"no file that ends in {', '.join(IMAGE_SUFFIXES)}"
        raise UserError(f"{path} holds {what}; expected a folder of pictures, or a parquet file.")
    if left := len(files) - len(named) - sum(found.name == METADATA for found in files):
        log.info("%d files of %s with other endings than %s were left out", left, path, ", ".join(IMAGE_SUFFIXES))
    names = sorted(named)
    return Pictures(pd.DataFrame({"image_id": names}), lambda row: named[names[row]].read_bytes(), TODO)


def _of_parquet(paths: list[Path]) -> Pictures:
    with open_parquet(paths[0], TODO) as file:
        there = file.schema_arrow.names
    column = next((name for name in ENCODED if name in there), None)
    if column is None:
        raise UserError(f"{paths[0]} has no column {' or '.join(ENCODED)}, only {', '.join(there) or 'none'}; "
                        "expected one with the bytes of encoded pictures.")  # fmt: skip
    text = next((name for name in PROMPT if name in there), None)
    wanted = {"image_id": "image_id", "prompt_id": "prompt_id", "image_seed": "image_seed", "prompt": text}
    wanted = {name: source for name, source in wanted.items() if source in there}
    lines: dict[str, list] = {name: [] for name in wanted}
    read = EncodedRows(paths, column, TODO)
    for path in paths:
        found = read_columns(path, list(wanted.values()), TODO)
        for name, source in wanted.items():
            lines[name] += found[source]
    frame = pd.DataFrame(lines, index=range(read.count), dtype=object)  # null stays null, and 1 stays 1
    if "image_id" not in frame:
        frame["image_id"] = [str(row) for row in range(len(frame))]
    if frame["image_id"].isna().any():
        raise UserError(f"{paths[0]} has rows without an image_id; expected one for each, or no such column.")
    frame["image_id"] = frame["image_id"].astype(str)
    if frame.empty or frame["image_id"].duplicated().any():
        what = "no row" if frame.empty else "rows with the same image_id"
        raise UserError(f"{paths[0]} has {what}; expected at least one, each with an id of its own.")
    return Pictures(frame, read, TODO)


# ---- prompts ----


def read_prompts(path: Path) -> pd.DataFrame:
    """A line for each prompt: prompt, and where the file has them file_name, prompt_id, image_seed (as given)."""
    readers = {".txt": _lines, ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}
    if not path.is_file():
        raise UserError(f"{path} is not there; --prompts is a file that ends in {', '.join(readers)}.")
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; expected {', '.join(readers)}.")
    found = readers[path.suffix.lower()](path)
    if not found:
        raise UserError(f"{path} holds no prompt; expected one for each picture.")
    rows = [dict(row) if isinstance(row, dict) else {} for row in found]
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in PROMPT if key in row), None)
        if not isinstance(text, str) or (path.suffix.lower() != ".txt" and not isinstance(row.get("file_name"), str)):
            raise UserError(f"{path} item {number} has no text in file_name and prompt; expected such as {LINE}.")
        row["prompt"], row["image_seed"] = text, row.get("image_seed", row.get("seed"))
    keys = [key for key in ("file_name", "prompt", "prompt_id", "image_seed") if any(key in row for row in rows)]
    return pd.DataFrame({key: [row.get(key) for row in rows] for key in keys}, dtype=object)


def _text(path: Path) -> str:
    return read_text(path).removeprefix("\ufeff").replace("\r\n", "\n")


def _lines(path: Path) -> list[dict]:
    text = _text(path)
    return [{"prompt": line} for line in text.removesuffix("\n").split("\n")] if text else []


def _json(path: Path) -> list:
    content = _parsed(_text(path), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path} holds {type(content).__name__}; expected a list of items such as {LINE}.")
    return content


def _jsonl(path: Path) -> list:
    lines = enumerate(_text(path).split("\n"), 1)
    return [_parsed(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); expected items such as {LINE}.") from None


def _csv(path: Path) -> list[dict]:
    """Tabs without quoting: a quoted word at the beginning of a prompt is part of it, as in PartiPrompts."""
    tabs = path.suffix.lower() == ".tsv"
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), **options)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} cannot be read ({error}); correct the line.") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path} row {number} has not one field for each of {reader.fieldnames}; correct the row.")
    return rows


def with_prompts(pictures: Pictures, path: Path | None) -> Pictures:
    """The pictures with the columns COLUMNS complete."""
    frame = pictures.frame
    if path is not None:
        frame = _matched(frame, read_prompts(path), path)
    elif "prompt" not in frame:
        raise UserError("the pictures come without prompts; give --prompts.")
    texts = frame["prompt"].tolist()
    if bad := [name for name, text in zip(pictures.names, texts, strict=True) if not is_text(text)]:
        raise UserError(f"{len(bad)} pictures have no text as their prompt, the first is {bad[0]}; correct it.")
    ids = frame["prompt_id"].tolist() if "prompt_id" in frame else [None] * len(frame)
    ids = [text_id(text) if _absent(given) else str(given) for given, text in zip(ids, texts, strict=True)]
    if bad := [name for name, own in zip(pictures.names, ids, strict=True) if not (is_text(own) and is_text(name))]:
        raise UserError(f"{len(bad)} pictures have a name or prompt_id that is no text, the first is {bad[0]!a}.")
    seeds = frame["image_seed"].tolist() if "image_seed" in frame else [None] * len(frame)
    seeds = [_seed(seed, name) for seed, name in zip(seeds, pictures.names, strict=True)]
    told = {"image_id": pictures.names, "prompt_id": ids, "prompt": texts, "image_seed": pd.array(seeds, "Int64")}
    return Pictures(pd.DataFrame(told)[COLUMNS], pictures.read, pictures.todo)


def _absent(given) -> bool:
    return given is None or given == "" or given != given


def _seed(seed, name: str) -> int | None:
    if _absent(seed):
        return None
    try:
        number = int(seed)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or str(number) != str(seed).removesuffix(".0") or abs(number) >= 2**63:
        raise UserError(f"the seed of picture {name} is {str(seed)[:40]!r}; expected a whole number.")
    return number


def _natural(name: str) -> list:
    """By what a name counts: 2 before 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


def _matched(frame: pd.DataFrame, prompts: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The prompts' columns in the pictures' order: by file_name, or line by line."""
    names = frame["image_id"].tolist()
    if "file_name" not in prompts:
        if len(prompts) != len(names):
            raise UserError(f"{path} has {len(prompts)} lines for {len(names)} pictures; give one for each.")
        by_number = sorted(names, key=_natural)
        if names == sorted(names) != by_number:
            at = next(i for i, (one, other) in enumerate(zip(names, by_number, strict=True)) if one != other)
            raise UserError(
                f"line {at + 1} of {path} would be of {names[at]} by letters, of {by_number[at]} by numbers; give the "
                "numbers leading zeros, or the prompts as .csv with file_name and prompt."
            )
        return prompts.assign(image_id=names)
    given = prompts["file_name"].tolist()
    if repeated := prompts["file_name"][prompts["file_name"].duplicated()].tolist():
        raise UserError(f"{path} names {len(repeated)} pictures more than once, the first is {repeated[0]}; "
                        "expected one prompt for each.")  # fmt: skip
    if extra := sorted(set(given) - set(names)):
        raise UserError(f"{path} names {len(extra)} pictures that are not there, the first is {extra[0]}; "
                        "add them or take their lines away.")  # fmt: skip
    if missing := sorted(set(names) - set(given)):
        raise UserError(f"{len(missing)} of {len(names)} pictures have no prompt in {path}, the first is "
                        f"{missing[0]}; add their lines or take them away.")  # fmt: skip
    return prompts.set_index("file_name").loc[names].reset_index(names="image_id")


# ---- the command ----


def run(config: Config, args: argparse.Namespace) -> None:
    """Score and write; everything that can be wrong with names is said before a scorer is loaded."""
    args.out = args.out or OUT
    meter, names = Meter(), [name.strip() for name in (args.metrics or METRICS).split(",")]
    for name in names:
        known("--metrics", name, config.metrics)
    check_out(args)
    found = open_pictures(args.images)
    beside = args.images / METADATA
    pictures = with_prompts(found, args.prompts or (beside if beside.is_file() else None))
    untuned = None if args.untuned is None else _same_names(open_pictures(args.untuned), pictures, args.untuned)
    real = None if args.pictures is None else _real(args.pictures)
    if args.hub is None:
        hub, entries, scale = Hub(hub_dir(config.scale, args.results)), config.metrics, config.scale
        log.warning("scorers: the stand-ins of scale %s, no published weights; --hub names a folder of those", scale)
    else:  # the published files, with their hashes
        hub, entries, scale = Hub(args.hub, DOWNLOAD), published("metrics", args.set, args.config_dir), None
    scorers = {name: load_metric(name, entries[name], hub, default_device()) for name in names}
    tally, frame = Tally(), pictures.frame
    prompts = frame["prompt"].tolist()
    scores = score_pictures(pictures, prompts, scorers, prompt_ids=frame["prompt_id"].tolist(), untuned=untuned,
                            real=real, names=pictures.names, tally=tally, progress=Progress(log.info))  # fmt: skip
    seen = tally.told() | {"eval_sets": {args.images.name: prompts_told(prompts, scorers)}}
    meter.counts = {"images": len(frame), "metrics": len(scorers)}
    settings = {"scale": scale, "metrics": {name: entries[name].model_dump() for name in names}}
    specs = {name: scorer.spec for name, scorer in scorers.items()}
    about = record("score", settings, hub.inputs(), meter, specs=specs, seen=seen)
    table = pa.Table.from_pandas(pd.concat([frame, scores], axis=1), preserve_index=False)
    with atomic(args.out) as part:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), part)
    for line in said(seen):
        log.info(line)
    print(summary(scores))
    print(f"{len(frame)} pictures -> {args.out}")


def check_out(args: argparse.Namespace) -> None:
    """--out can be written and is none of what is read: said before hours of scoring."""
    out = args.out.resolve()
    for option in ("images", "prompts", "untuned", "pictures"):
        given = getattr(args, option)
        if given is not None and (out == given.resolve() or given.resolve() in out.parents):
            raise UserError(f"--out {args.out} would be written over or into --{option} {given}; name another file.")
    if out.is_dir():
        raise UserError(f"--out {args.out} is a folder; expected a file such as {args.out / 'scores.parquet'}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written ({error.strerror}); name another file.") from None


def summary(scores: pd.DataFrame) -> str:
    """Mean, standard deviation and number of every metric, as stored: metrics.yaml's scale is not applied."""
    lines = scores.agg(["mean", "std", "count"]).T.reset_index(names="metric").astype({"count": int})
    return lines.rename(columns={"count": "n"}).to_markdown(index=False, floatfmt=".6f")


def _same_names(untuned: Pictures, pictures: Pictures, path: Path) -> Pictures:
    row = {name: i for i, name in enumerate(untuned.names)}
    lacking = [name for name in pictures.names if name not in row]
    if lacking or len(row) != len(pictures):
        first = lacking[0] if lacking else next(name for name in row if name not in set(pictures.names))
        raise UserError(
            f"{path} has {len(row)} pictures, {len(pictures) - len(lacking)} of them under the names of the "
            f"{len(pictures)} to be scored; expected the same names, the first that differs is {first}."
        )
    rows = [row[name] for name in pictures.names]
    for column in ("prompt", "image_seed"):  # names may be no more than row numbers
        if column in untuned.frame:
            theirs = [untuned.frame[column][i] for i in rows]
            ours = pictures.frame[column].astype(object).where(pictures.frame[column].notna(), None).tolist()
            differ = [n for n, a, b in zip(pictures.names, ours, theirs, strict=True) if not _absent(b) and a != b]
            if differ:
                raise UserError(
                    f"{len(differ)} pictures have another {column} in {path}, the first is {differ[0]}; expected the "
                    "same prompt and noise under the same name."
                )
    return untuned.at(rows, pictures.frame)


def _real(folder: Path) -> list:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no picture; --pictures is a folder with real pictures of the subject.")
    return real_pictures(paths)
