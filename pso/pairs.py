"""Preference pairs of Pick-a-Pic: an index from the small columns, and the pictures of those rows that are asked for.

The index reads no picture, so the 335 GB of the published set cost it seconds and a few hundred MB of memory. What
cannot be used is counted and named. Torch-free.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pso.data import BadImage, parse_image
from pso.entries import DatasetEntry
from pso.hub import Hub, recorded
from pso.provenance import UserError, sha256_of
from pso.shards import BATCH_ROWS, check_file, check_rows, damaged, in_order, open_parquet

PAIR_COLUMNS = {"caption": "text", "jpg_0": "bytes", "jpg_1": "bytes", "label_0": "number", "label_1": "number"}
INDEX_ROWS = 2**16  # rows of the small columns in memory at once
DECODERS = min(8, os.cpu_count() or 1)  # Pillow lets other threads work while it decodes
DROPS = (
    "tie",
    "bad_label",
    "missing_caption",
    "missing_image_0",
    "missing_image_1",
    "undecodable_image_0",
    "undecodable_image_1",
)


@dataclass(frozen=True)
class PreferencePair:
    """Two encoded pictures of one prompt; people preferred the target."""

    id: str
    prompt: str
    target: bytes
    reference: bytes


@dataclass(frozen=True)
class Visit:
    """A pair (or captioned picture) that was read: its position in the set, and its pictures as they were asked for."""

    position: int
    row: Any
    pictures: tuple


@dataclass
class Counts:
    """rows == pairs + everything dropped, each row under its first reason. Blank captions are kept.

    Only of pairs that were read it is known whether their pictures can be used.
    """

    rows: int = 0
    pairs: int = 0
    captions: int = 0  # different ones among the pairs
    blank_captions: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPS, 0))

    def as_dict(self) -> dict:
        return asdict(self)

    def sentence(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items() if count) or "none"
        return (
            f"{self.pairs} pairs of {self.rows} rows, {self.captions} different captions "
            f"({self.blank_captions} blank pairs); dropped: {reasons}"
        )


class Pairs:
    """The decided rows of Pick-a-Pic shards, label_0 exactly 0 or 1, in the order of names and rows.

    All shards are checked when this is made. A pair's position counts decided rows; `faults` says of those that cannot
    be used why, and grows while pictures are read: {position: (reason, detail)}.
    """

    def __init__(
        self, paths: Iterable[Path], entry: DatasetEntry, name: str, told: Callable[[Path], dict] | None = None
    ):
        self.name, self.shards = name, in_order(paths, entry, name)
        self._told = told or (lambda path: {"file": path.name, "sha256": sha256_of(path)})
        self.faults: dict[int, tuple[str, str]] = {}
        self.prompts: list[str] = []
        self._undecided: list[tuple[int, int, str]] = []  # shard, row, detail
        self._files: dict[int, dict] = {}
        self._ties = self._rows = self._next = 0  # ties and rows seen, position of the next decided row
        texts: dict[str, int] = {}
        parts = [self._indexed(shard, path, entry, texts) for shard, path in enumerate(self.shards)]
        where = f"{self.shards[0].parent} ({len(self.shards)} files)"
        check_rows(self._rows, where, entry, name)
        self.prompts = list(texts)
        self.starts = np.cumsum([0, *(len(part.row) for part in parts)])
        self.row, self.prompt_index, self.first_wins = (
            np.concatenate([getattr(part, k) for part in parts]) for k in ("row", "prompt", "first_wins")
        )
        self.ids = _unique_ids([part.ids for part in parts], [part.decided for part in parts])
        self._check_counts(where, entry)

    def __len__(self) -> int:
        return len(self.row)

    # -- the index --

    def _indexed(self, shard: int, path: Path, entry: DatasetEntry, texts: dict[str, int]) -> "_Indexed":
        check_file(path, entry, self.name)
        parts, first = [], 0
        with open_parquet(path, PAIR_COLUMNS, self.name) as file:
            columns = [*(c for c, kind in PAIR_COLUMNS.items() if kind != "bytes"), *_id_column(file.schema_arrow)]
            try:
                for batch in file.iter_batches(INDEX_ROWS, columns=columns, use_threads=False):
                    parts.append(self._decided(shard, first, batch, texts))
                    first += batch.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise damaged(path, error) from None
        self._rows += first
        return _Indexed.joined(parts)

    def _decided(self, shard: int, first: int, batch: pa.RecordBatch, texts: dict[str, int]) -> "_Indexed":
        """The decided rows of a few; the others are counted."""
        one, other = (_numbers(batch[f"label_{side}"]) for side in (0, 1))
        decided, tie = (one == 0) | (one == 1), (one == 0.5) & (other == 0.5)
        self._ties += int(tie.sum())
        for row in np.flatnonzero(~decided & ~tie):
            self._undecided.append((shard, first + int(row), _labels(batch, row)))
        rows, caption = np.flatnonzero(decided), batch["caption"]
        missing = caption.is_null().to_numpy(zero_copy_only=False)[rows]
        wrong = (one + other)[rows] != 1
        start = self._next
        for k in np.flatnonzero(wrong | missing):
            fault = ("bad_label", _labels(batch, rows[k])) if wrong[k] else ("missing_caption", "null")
            self.faults[start + int(k)] = fault
        self._next += len(rows)
        prompt = np.full(len(rows), -1, np.int32)
        prompt[~missing & ~wrong] = _numbered(caption.take(pa.array(rows[~missing & ~wrong])), texts)
        ids = _numbers_of_ids(batch)
        return _Indexed((first + rows).astype(np.int32), prompt, one[rows] == 1, ids, decided)

    def _check_counts(self, where: str, entry: DatasetEntry) -> None:
        found = {"num_pairs": (len(self), "decided pairs (label_0 is exactly 0 or 1)")}
        found["num_prompts"] = (len(self.prompts), "different captions of decided pairs")
        for key, (count, what) in found.items():
            expected = getattr(entry, key)
            if expected is not None and count != expected:
                raise UserError(
                    f"{where}, {entry.files} of {entry.repo}, holds {count} {what}, datasets.{self.name}.{key} expects "
                    f"{expected}; fetch the files again, or correct the entry if they are another edition."
                )

    # -- what cannot be used --

    @property
    def left_out(self) -> tuple[int, ...]:
        """Positions of decided rows that cannot be used."""
        return tuple(sorted(self.faults))

    @property
    def counts(self) -> Counts:
        usable = np.ones(len(self), bool)
        usable[list(self.left_out)] = False
        prompts = np.bincount(self.prompt_index[usable], minlength=len(self.prompts))
        blank = [i for i, text in enumerate(self.prompts) if not text.strip()]
        counts = Counts(self._rows, int(usable.sum()), int((prompts > 0).sum()), int(prompts[blank].sum()))
        counts.dropped |= {"tie": self._ties, "bad_label": len(self._undecided)}
        for reason, _ in self.faults.values():
            counts.dropped[reason] += 1
        return counts

    @property
    def quarantine(self) -> list[tuple[str, int, str]]:
        """(shard, row, reason) of every dropped row but ties, which are no fault."""
        found = [(shard, row, f"bad_label: {detail}") for shard, row, detail in self._undecided]
        for position, (reason, detail) in self.faults.items():
            found.append((self.shard_of(position), int(self.row[position]), f"{reason}: {detail}"))
        return [(self.shards[shard].name, row, why) for shard, row, why in sorted(found)]

    def shard_of(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    # -- their files and pictures --

    def told(self, shard: int) -> dict:
        """What run.json says of a shard, asked for once."""
        if shard not in self._files:
            self._files[shard] = self._told(self.shards[shard])
        return self._files[shard]

    def digest_of(self, shard: int) -> str:
        """sha256 of a shard."""
        return self.told(shard)["sha256"]

    def inputs(self) -> list[dict]:
        """For run.json."""
        return [self.told(shard) for shard in range(len(self.shards))]

    def __iter__(self) -> Iterator[PreferencePair]:
        return (visit.row for visit in self.read(np.arange(len(self)), lambda image: None))

    def read(self, positions: np.ndarray, look: Callable[[Image.Image], Any]) -> Iterator[Visit]:
        """The pairs at rising positions, `look` applied to both decoded pictures, target first."""
        positions = positions[~np.isin(positions, self.left_out)]
        with ThreadPoolExecutor(DECODERS) as pool:
            for shard, (start, stop) in enumerate(pairwise(self.starts)):
                here = positions[(positions >= start) & (positions < stop)]
                for group in _groups(self.shards[shard], self.row[here], self.name):
                    now, here = here[: len(group)], here[len(group) :]
                    seen = pool.map(lambda row: _decoded(row, look), group)
                    for position, row, found in zip(now.tolist(), group, seen, strict=True):
                        if isinstance(found[0], str):
                            self.faults[position] = found
                        else:
                            yield self._visit(shard, position, row, found)

    def _visit(self, shard: int, position: int, row: dict[str, bytes], pictures: tuple) -> Visit:
        order = (0, 1) if self.first_wins[position] else (1, 0)
        number = f"{self.shards[shard].stem}-{self.row[position]}" if self.ids is None else str(self.ids[position])
        data = [row[f"jpg_{side}"] for side in order]
        pair = PreferencePair(number, self.prompts[self.prompt_index[position]], *data)
        return Visit(position, pair, tuple(pictures[side] for side in order))


def pairs_of(hub: Hub, entry: DatasetEntry, name: str) -> tuple[Pairs, Callable[[], list[dict]]]:
    """The pairs of an entry of datasets.yaml, and what run.json says of their files (which reads those of no fetch)."""
    root, repo = hub.repo(entry.repo), recorded(entry)["repo"]

    def told(path: Path) -> dict:
        return hub.told(repo, str(path.relative_to(root)), path)

    pairs = Pairs(root.glob(entry.files), entry, name, told)
    return pairs, pairs.inputs


def iter_pairs(paths: Iterable[Path], entry: DatasetEntry, name: str) -> Pairs:
    """The pairs that the paper keeps: label_0 is exactly 0 or 1. `has_label` and `are_different` do not count."""
    return Pairs(paths, entry, name)


@dataclass(frozen=True)
class _Indexed:
    """Of D decided rows: row in the shard, prompt, whether picture 0 won; of all rows: ranking id, whether decided."""

    row: np.ndarray
    prompt: np.ndarray
    first_wins: np.ndarray
    ids: np.ndarray | None
    decided: np.ndarray

    @classmethod
    def joined(cls, parts: list["_Indexed"]) -> "_Indexed":
        empty = cls(*(np.zeros(0, kind) for kind in (np.int32, np.int32, bool, np.int64, bool)))
        columns = zip(*(vars(part).values() for part in [empty, *parts]), strict=True)
        return cls(*(None if any(v is None for v in column) else np.concatenate(column) for column in columns))


def _numbers(column: pa.Array) -> np.ndarray:
    """float64, NaN for null."""
    return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)


def _labels(batch: pa.RecordBatch, row: int) -> str:
    return ", ".join(f"label_{side} {batch[f'label_{side}'][int(row)].as_py()}" for side in (0, 1))


def _numbered(captions: pa.Array, texts: dict[str, int]) -> np.ndarray:
    """Numbers of captions, counted by first appearance; new ones join `texts`."""
    encoded = captions.dictionary_encode()
    numbers = [texts.setdefault(text, len(texts)) for text in encoded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def _id_column(schema: pa.Schema) -> list[str]:
    known = "ranking_id" in schema.names and pa.types.is_integer(schema.field("ranking_id").type)
    return ["ranking_id"] if known else []


def _numbers_of_ids(batch: pa.RecordBatch) -> np.ndarray | None:
    """None where an id is missing."""
    if "ranking_id" not in batch.schema.names or batch["ranking_id"].null_count:
        return None
    return batch["ranking_id"].to_numpy().astype(np.int64)


def _unique_ids(ids: list[np.ndarray | None], decided: list[np.ndarray]) -> np.ndarray | None:
    """The ranking ids of decided rows, if every row of the set has one of its own."""
    if any(part is None for part in ids):
        return None
    every = np.concatenate(ids)
    return every[np.concatenate(decided)] if len(np.unique(every)) == len(every) else None


def _groups(path: Path, rows: np.ndarray, name: str) -> Iterator[list[dict[str, bytes]]]:
    """The pictures of a shard's rows, rising, a few rows at a time; row groups without one are not read."""
    if not len(rows):
        return
    with open_parquet(path, PAIR_COLUMNS, name) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            inside = rows[(rows >= first) & (rows < first + size)] - first
            first += size
            if not len(inside):
                continue
            try:
                start = 0
                for batch in file.iter_batches(
                    BATCH_ROWS, row_groups=[group], columns=["jpg_0", "jpg_1"], use_threads=False
                ):
                    now = inside[(inside >= start) & (inside < start + batch.num_rows)] - start
                    start += batch.num_rows
                    if len(now):
                        yield batch.take(pa.array(now)).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise damaged(path, error) from None


def _decoded(row: dict[str, bytes | None], look: Callable[[Image.Image], Any]) -> tuple:
    """What `look` makes of both pictures, or (reason, detail) why a row is no pair."""
    found = []
    for side in (0, 1):
        data = row[f"jpg_{side}"]
        try:
            found.append(look(parse_image(data)))
        except BadImage as error:
            return f"{'undecodable' if data else 'missing'}_image_{side}", str(error)
    return tuple(found)
