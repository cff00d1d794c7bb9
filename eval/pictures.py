"""Pictures as files hold them: found, checked, and decoded when asked for, in their own mode. Torch-free.

The official transforms differ in when they make RGB of a picture (eval/transforms.py), so nothing is converted here.
Nothing is turned upright by EXIF either and no colour profile is applied: no official scorer does. Of a picture with
several frames the first is taken. All of that is counted (Tally) and shown, never silent.
"""

import math
import struct
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pso.data import open_image, read_image
from pso.provenance import UserError, sha256_of

MODES = ("1", "L", "LA", "P", "PA", "I", "I;16", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
LONGEST = 100  # times the shorter side; a longer picture would be made gigabytes large when that side becomes 224
BATCH_ROWS = 64  # encoded pictures of a parquet file in memory at once
COLUMNS = ["image_id", "prompt_id", "prompt", "image_seed"]
# what Pillow raises at damaged bytes; MemoryError at a size that cannot be had
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError,
    OverflowError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)  # UnicodeDecodeError is a ValueError


def decode(data: bytes | None, name: str, todo: str) -> Image.Image:
    """A whole picture in its own mode, or one sentence: which picture, why, and `todo`, what to do about it."""
    if not data:
        raise UserError(f"image {name} cannot be decoded (it has no bytes); {todo}.")
    try:
        image = open_image(data)
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # of which Pillow only warns
            raise Image.DecompressionBombError
        if why := _unfit(image):
            raise UserError(f"image {name} is {why}; {todo}.")
        image.load()
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        why = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
        raise UserError(f"image {name} cannot be decoded ({why}); {todo}.") from None
    except UnidentifiedImageError:
        why = f"not PNG, JPEG or WebP: it begins with {data[:8]!r}"
        raise UserError(f"image {name} cannot be decoded ({why}); {todo}.") from None
    except DAMAGED as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"image {name} cannot be decoded ({why}); {todo}.") from None
    return image


def _unfit(image: Image.Image) -> str | None:
    """Why no transform can take a picture, from its header."""
    if image.mode not in MODES:
        return f"of mode {image.mode}; expected one of {', '.join(MODES)}"
    width, height = image.size
    if min(image.size) < 1 or max(image.size) > LONGEST * min(image.size):
        return f"{width} x {height} px; expected a longer side of at most {LONGEST} times the shorter"
    return None


class Pictures(Sequence):
    """Pictures by row: pictures[i] reads and decodes one.

    frame: a line for each, COLUMNS as far as its source has them. read(i): its encoded bytes. todo: for sentences.
    """

    def __init__(self, frame: pd.DataFrame, read: Callable[[int], bytes | None], todo: str):
        self.frame, self.read, self.todo = frame.reset_index(drop=True), read, todo
        self.names = self.frame["image_id"].tolist()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Image.Image:
        return decode(self.read(row), self.names[row], self.todo)

    def at(self, rows: list[int], frame: pd.DataFrame) -> "Pictures":
        """Those rows in that order, described by another frame."""
        found = Pictures(frame, lambda row: self.read(rows[row]), self.todo)
        found.names = [self.names[row] for row in rows]  # sentences name the picture that is at fault
        return found


class Tally:
    """Pictures that the official code treats in ways of its own, counted as they are decoded."""

    def __init__(self) -> None:
        self.modes: Counter = Counter()
        self.multi_frame = 0

    def add(self, images: Iterable[Image.Image]) -> None:
        for image in images:
            self.modes[image.mode] += 1
            self.multi_frame += getattr(image, "n_frames", 1) > 1

    def told(self) -> dict:
        """JSON: how many pictures, those not in RGB by mode, those with several frames."""
        others = {mode: count for mode, count in sorted(self.modes.items()) if mode != "RGB"}
        return {"pictures": self.modes.total(), "not_rgb": others, "multi_frame": self.multi_frame}


def prompts_told(prompts: Iterable[str], scorers: dict) -> dict:
    """JSON: how many different prompts, how many are blank, and how many a scorer that reads them sees in part."""
    texts = list(dict.fromkeys(prompts))
    reading = {name: s.truncated for name, s in scorers.items() if getattr(s, "truncated", None) is not None}
    return {
        "prompts": len(texts),
        "empty": sum(not text.strip() for text in texts),
        "truncated": {name: sum(map(truncated, texts)) for name, truncated in reading.items()},
    }


def said(told: dict) -> list[str]:
    """What a Tally and prompts_told found, in sentences; nothing where all was as usual. told: scores.json's `seen`."""
    lines = []
    if told["not_rgb"]:
        modes = ", ".join(f"{count} {mode}" for mode, count in told["not_rgb"].items())
        lines.append(f"{told['pictures']} pictures, of them not in RGB: {modes}")
    if told["multi_frame"]:
        lines.append(f"{told['multi_frame']} of {told['pictures']} pictures have several frames; the first counts")
    for name, of in told["eval_sets"].items():
        if of["empty"]:
            lines.append(f"{name}: {of['empty']} of {of['prompts']} prompts are empty")
        for metric, count in of["truncated"].items():
            if count:
                lines.append(f"{name}: {metric} reads only the beginning of {count} of {of['prompts']} prompts")
    return lines


def real_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    """A subject's photographs as training sees them: RGB, upright, transparency over white."""
    return [read_image(path) for path in paths]


def is_text(text) -> bool:
    """A lone surrogate, which JSON can write, is no text that a tokenizer takes."""
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


# ---- parquet ----


def open_parquet(path: Path, todo: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    except UNREADABLE as error:
        raise unreadable(path, error, todo) from None


def unreadable(path: Path, error: Exception, todo: str) -> UserError:
    why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return UserError(f"{path} cannot be read ({why[:300]}); {todo}.")


def read_columns(path: Path, columns: list[str], todo: str) -> dict[str, list]:
    """Whole columns of a file; a sentence names those that it does not have."""
    with open_parquet(path, todo) as file:
        try:
            there = file.schema_arrow.names
            if twice := [column for column in columns if there.count(column) > 1]:
                raise UserError(f"{path} has the column {twice[0]} more than once; {todo}.")
            if absent := [column for column in columns if column not in there]:
                raise UserError(f"{path} has no column {', '.join(absent)}, only {', '.join(there) or 'none'}; {todo}.")
            table = file.read(columns=columns, use_threads=False)
            return {column: table.column(column).to_pylist() for column in columns}
        except UserError:
            raise
        except UNREADABLE as error:
            raise unreadable(path, error, todo) from None


class EncodedRows:
    """One column of several files by row: rows(i) gives bytes. It goes forward through a row group, a few at a time."""

    def __init__(self, paths: list[Path], column: str, todo: str):
        self.column, self.todo = column, todo
        self.groups, self.firsts, total = [], [], 0
        for path in paths:
            with open_parquet(path, todo) as file:
                if (number := file.schema_arrow.names.count(column)) != 1:
                    raise UserError(f"{path} has {number or 'no'} columns {column}; {todo}.")
                for group in range(file.num_row_groups):
                    self.groups.append((path, group))
                    self.firsts.append(total)
                    total += file.metadata.row_group(group).num_rows
        self.count = total
        self.group, self.start, self.rows, self.batches = None, 0, [], iter(())

    def __call__(self, row: int) -> bytes | None:
        group = bisect_right(self.firsts, row) - 1
        path = self.groups[group][0]
        try:
            if group != self.group or row < self.start:
                self._enter(group)
            while row >= self.start + len(self.rows):
                self.start += len(self.rows)
                self.rows = next(self.batches).column(0)
            value = self.rows[row - self.start].as_py()
        except StopIteration:
            raise UserError(f"{path} has fewer rows than it says; {self.todo}.") from None
        except UserError:
            raise
        except UNREADABLE as error:
            raise unreadable(path, error, self.todo) from None
        if isinstance(value, dict):  # as `datasets` writes a picture
            value = value.get("bytes")
        if not isinstance(value, bytes | None):
            raise UserError(f"{path} column {self.column} holds {type(value).__name__}; expected bytes: {self.todo}.")
        return value

    def _enter(self, group: int) -> None:
        path, number = self.groups[group]
        file = open_parquet(path, self.todo)
        self.batches = file.iter_batches(BATCH_ROWS, row_groups=[number], columns=[self.column], use_threads=False)
        self.group, self.start, self.rows = group, self.firsts[group], []


# ---- shards of a run ----


def read_shards(listed: list[dict], root: Path, again: str) -> Pictures:
    """The pictures of a run on an eval set, checked against the manifest's lines {file, images, sha256}."""
    frames, paths, todo = [], [], f"delete its shard and run {again}"
    for shard in listed:
        path = root / shard["file"]
        if not path.exists():
            raise UserError(f"{path} is listed in images.json but is not there; make it again with {again}.")
        if sha256_of(path) != shard["sha256"]:
            raise UserError(
                f"{path} is not the file that images.json lists (its sha256 differs); delete it and run {again}."
            )
        frames.append(pd.DataFrame(read_columns(path, COLUMNS, todo)))
        paths.append(path)
    frame = pd.concat(frames, ignore_index=True)
    for column, fits in {**dict.fromkeys(COLUMNS, is_text), "image_seed": lambda seed: isinstance(seed, int)}.items():
        if bad := [row for row, value in enumerate(frame[column].tolist()) if not fits(value)]:
            raise UserError(f"row {bad[0]} of {len(frame)} in {paths[0].parent} has no {column}; {todo}.")
    expected = sum(s["images"] for s in listed)
    if len(frame) != expected or frame["image_id"].duplicated().any():
        raise UserError(f"{len(frame)} images where images.json lists {expected}; delete the shards and run {again}.")
    return Pictures(frame, EncodedRows(paths, "png", todo), todo)
