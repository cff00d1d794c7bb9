"""Files of data sets as they lie on disk: there, whole, the expected ones, in one order.

What is wrong ends in one sentence before any row is used. Torch-free.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pso.entries import DatasetEntry
from pso.provenance import UserError, sha256_of

BATCH_ROWS = 64  # rows of a shard in memory at once
KINDS = {  # what a column may hold -> the Arrow types that hold it
    "text": (pa.types.is_string, pa.types.is_large_string),
    "bytes": (pa.types.is_binary, pa.types.is_large_binary),
    "number": (pa.types.is_floating, pa.types.is_integer),
}


def check_file(path: Path, entry: DatasetEntry, name: str) -> None:
    """The file is there and, where the entry gives a digest, it is that file."""
    if not Path(path).is_file():
        raise UserError(
            f"{path} is missing; data set {name} needs it ({entry.files} of {entry.repo}): "
            "`snakemake hub` makes the stand-in, or fetch the real file to this place."
        )
    if entry.sha256 is not None and (found := sha256_of(path)) != entry.sha256:
        raise UserError(
            f"{path} has sha256 {found}, datasets.{name}.sha256 expects {entry.sha256}; "
            "fetch the file again (byte for byte, no line-end conversion) or correct the entry."
        )


def check_rows(found: int, where: str, entry: DatasetEntry, name: str) -> None:
    if entry.num_rows is not None and found != entry.num_rows:
        raise UserError(
            f"{where} holds {found} rows, datasets.{name}.num_rows expects {entry.num_rows}; "
            "fetch what is missing or correct the entry."
        )


def in_order(paths: Iterable[Path], entry: DatasetEntry, name: str) -> list[Path]:
    """Shards by file name, which has to name one shard."""
    shards = sorted(map(Path, paths), key=lambda path: path.name)
    if not shards:
        raise UserError(
            f"data set {name} has no file {entry.files} of {entry.repo}; `snakemake hub` makes the stand-in."
        )
    for one, other in zip(shards, shards[1:], strict=False):
        if one.name == other.name:
            raise UserError(
                f"data set {name} has two files called {one.name}; give each once in datasets.{name}.files."
            )
    totals = {match[1] for path in shards if (match := re.search(r"-\d{5}-of-(\d{5})", path.name))}
    if len(totals) > 1:
        raise UserError(
            f"{shards[0].parent} mixes shards of {' and of '.join(sorted(totals))} for data set {name}; "
            "expected those of one writing: remove the older ones."
        )
    if entry.sha256 is not None and len(shards) > 1:
        raise UserError(
            f"datasets.{name}.sha256 is the digest of one file, but {entry.files} fits {len(shards)} files; "
            "remove sha256 and give num_rows."
        )
    return shards


def open_parquet(path: Path, columns: dict[str, str], name: str) -> pq.ParquetFile:
    """An open file that has the columns, each of its kind."""
    try:
        # without read-ahead: a row group of Pick-a-Pic is hundreds of MB of images
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    hint = f"check datasets.{name}.repo and .files in datasets.yaml."
    if absent := [column for column in columns if column not in schema.names]:
        raise UserError(
            f"{path} has no column {', '.join(absent)}; expected {', '.join(columns)}, "
            f"found {', '.join(schema.names) or 'none'}: {hint}"
        )
    for column, kind in columns.items():
        if not any(fits(schema.field(column).type) for fits in KINDS[kind]):
            raise UserError(f"{path} column {column} is {schema.field(column).type}; expected {kind}: {hint}")
    return file


def damaged(path: Path, error: Exception) -> UserError:
    why = " ".join(str(error).split()).rstrip(".")
    return UserError(
        f"{path} is not a whole parquet file ({why}); fetch it again, or `snakemake hub` for the stand-in."
    )


def read_rows(path: Path, columns: list[str], kinds: dict[str, str], name: str) -> Iterator[dict[str, Any]]:
    """Rows of a shard in order, a few at a time."""
    with open_parquet(path, kinds, name) as file:
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(path, error) from None
