"""Prompts and pictures in the real files' formats.

Loaders check counts and digests where datasets.yaml gives them, and stop with one sentence at a file that is not what
it should be. Writers make the same formats for the stand-in hub, preference pairs too. Torch-free; preference pairs
are read in pso/pairs.py, the DreamBooth folder in pso/dreambooth.py.
"""

import csv
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from pso.entries import DatasetEntry
from pso.provenance import UserError, atomic
from pso.shards import check_file, check_rows, in_order, read_rows

log = logging.getLogger("data")
PARTI_HEADER = ["Prompt", "Category", "Challenge", "Note"]
WHITE = (255, 255, 255)

# Pick-a-Pic v1 and v2; the *_no_images repositories lack the two image columns
PAIR_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
CAPTION_SCHEMA = pa.schema([column for column in PAIR_SCHEMA if not column.name.startswith("jpg_")])

CAPTION_COLUMNS = {"caption": "text"}


# ---- prompts ----


@dataclass(frozen=True)
class Prompt:
    """A text, verbatim. `id` depends on the text alone: it survives sorting and sharding of its file."""

    id: str
    text: str
    category: str | None = None
    challenge: str | None = None


def text_id(text: str) -> str:
    """16 hex digits of a text alone. UnicodeEncodeError for what is none."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prompts_of(texts: Iterable[str], source: str = "the list of prompts") -> list[Prompt]:
    """Texts with their ids: 16 hex digits, and -2, -3, ... on further copies of a text."""
    seen, prompts = Counter(), []
    for number, text in enumerate(texts, 1):
        try:
            key = text_id(text)
        except UnicodeEncodeError:
            raise UserError(f"{source}: prompt {number} ({text!r}) is not Unicode text; correct it.") from None
        seen[key] += 1
        prompts.append(Prompt(key if seen[key] == 1 else f"{key}-{seen[key]}", text))
    return prompts


def load_prompts(path: Path | list[Path], entry: DatasetEntry, name: str) -> list[Prompt]:
    """Every prompt of a file (or of one list's shards) in its order; blank ones are kept and logged.

    A prompt set is a fixed list that rows are compared on, so nothing is ever left out of it.
    """
    if entry.format not in READERS:
        raise UserError(
            f"datasets.{name}.format is {entry.format!r}; a list of prompts is one of {', '.join(READERS)}: "
            "choose another data set or correct the entry."
        )
    paths = in_order([path] if isinstance(path, (str, Path)) else path, entry, name)
    for one in paths:
        check_file(one, entry, name)
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    lines = [line for one in paths for line in READERS[entry.format](one, name)]
    check_rows(len(lines), where, entry, name)
    if not lines:
        raise UserError(f"{where} holds no prompt; data set {name} needs at least one.")
    prompts = prompts_of((line[0] for line in lines), where)
    if blank := sum(not p.text.strip() for p in prompts):
        log.warning("%s: %d of %d prompts are blank; they are kept.", where, blank, len(prompts))
    return [
        replace(p, category=category or None, challenge=challenge or None)
        for p, (_, category, challenge) in zip(prompts, lines, strict=True)
    ]


Line = tuple[str, str | None, str | None]  # text, category, challenge


def read_text(path: Path) -> str:
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from None


def _read_parti(path: Path, name: str) -> list[Line]:
    # quoting off: a default reader eats the quotes of `"G I G G L E" painted in ...`
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        header, *rows = list(reader) or [[]]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} cannot be read ({error}); correct the line.") from None
    if header != PARTI_HEADER:
        raise UserError(f"{path} begins with columns {header}; expected {PARTI_HEADER}, separated by tabs.")
    for line, row in enumerate(rows, 2):
        if len(row) != len(PARTI_HEADER):
            raise UserError(
                f"{path} line {line} has {len(row)} fields; expected {len(PARTI_HEADER)} "
                f"({', '.join(PARTI_HEADER)}), separated by tabs: correct the line."
            )
    return [(text, category, challenge) for text, category, challenge, _ in rows]


def _read_caption_json(path: Path, name: str) -> list[Line]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg}); fetch it again.") from None
    if not isinstance(content, list):
        raise UserError(f"{path} holds {type(content).__name__}; expected a list of {{caption, trainset_idx}}.")
    for number, item in enumerate(content, 1):
        if not isinstance(item, dict) or not isinstance(item.get("caption"), str):
            raise UserError(
                f"{path} item {number} has no text in caption; expected {{caption, trainset_idx}}: correct it."
            )
    return [(item["caption"], None, None) for item in content]


def _read_caption_parquet(path: Path, name: str) -> list[Line]:
    captions = [row["caption"] for row in read_rows(path, ["caption"], CAPTION_COLUMNS, name)]
    if None in captions:
        raise UserError(f"{path} row {captions.index(None)} has no caption (null); expected a text: correct the file.")
    return [(caption, None, None) for caption in captions]


READERS = {"parti_tsv": _read_parti, "caption_json": _read_caption_json, "caption_parquet": _read_caption_parquet}


def leakage(train: list[Prompt], test: list[Prompt]) -> list[str]:
    """Texts that are in both lists, after strip and lower case."""
    one, other = ({p.text.strip().lower() for p in prompts} for prompts in (train, test))
    return sorted(one & other)


# ---- images ----


class BadImage(UserError):
    """Bytes that are not one whole picture; the message is the reason, a few words."""


def parse_image(data: bytes | None, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """PNG, JPEG (MPO: first frame) or WebP bytes as RGB, decoded to the last pixel.

    Turned upright by EXIF, transparency over `background`, 16 bits cut to the upper 8. Colour
    profiles and all other metadata are dropped, not applied (Pillow's own convert does the same).
    """
    if not data:
        raise BadImage("no bytes (null)" if data is None else "no bytes (empty)")
    try:
        image = open_image(data)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow warns, and raises from twice as many
            raise Image.DecompressionBombError
        return _rgb(ImageOps.exif_transpose(image), background)
    except Image.DecompressionBombError:
        raise BadImage(f"too large: more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"not PNG, JPEG or WebP: begins with {data[:12]!r}") from None
    except Exception as error:  # Pillow raises a dozen kinds at damaged bytes, SyntaxError and struct.error among them
        raise BadImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def open_image(data: bytes) -> Image.Image:
    """A picture in its own mode, its file checked, not decoded yet; Pillow's own errors."""
    first, again = (Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) for _ in range(2))
    first.verify()  # a PNG cut short in its last bytes, which decoding forgives; it cannot be used after that
    return again


def read_image(path: Path) -> Image.Image:
    """parse_image of a file, or a sentence that names it."""
    try:
        return parse_image(path.read_bytes())
    except BadImage as error:
        raise UserError(f"{path} is no whole picture ({error}); make or fetch it again.") from None


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    canvas = Image.new("RGB", image.size, background)  # a new image: no profile, no EXIF
    canvas.paste(image.convert("RGB"), mask=alpha)
    return canvas


# ---- writers ----


def write_parti_tsv(path: Path, prompts: list[Prompt]) -> None:
    lines = [PARTI_HEADER]
    for number, p in enumerate(prompts, 1):
        fields = [p.text, p.category or "", p.challenge or "", ""]
        if any(mark in value for value in fields for mark in "\t\n\r"):
            raise UserError(
                f"{path}: prompt {number} ({p.text!r}) holds a tab or a line break, which this format cannot; "
                "replace it by a space, or use caption_json or caption_parquet."
            )
        lines.append(fields)
    with atomic(path) as part:
        part.write_bytes("".join("\t".join(fields) + "\n" for fields in lines).encode())


def write_caption_json(path: Path, prompts: list[Prompt]) -> None:
    items = [{"caption": p.text, "trainset_idx": number} for number, p in enumerate(prompts)]
    with atomic(path) as part:
        part.write_text(json.dumps(items, indent=4))


def write_caption_parquet(path: Path, prompts: list[Prompt]) -> None:
    _write_parquet(path, [{"caption": p.text} for p in prompts], CAPTION_SCHEMA)


def write_pair_shards(folder: Path, rows: Iterable[dict], num_shards: int, split: str = "train") -> list[Path]:
    """Rows in order, in equal runs, as folder/data/train-00000-of-00002.parquet; columns not given are null."""
    rows = list(rows)
    paths = [Path(folder) / "data" / f"{split}-{k:05d}-of-{num_shards:05d}.parquet" for k in range(num_shards)]
    for k, path in enumerate(paths):
        start, stop = (bound * len(rows) // num_shards for bound in (k, k + 1))
        _write_parquet(path, rows[start:stop], PAIR_SCHEMA)
    return paths


def _write_parquet(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    if unknown := {key for row in rows for key in row} - set(schema.names):
        raise UserError(f"{path} cannot hold {', '.join(sorted(unknown))}; its columns are {', '.join(schema.names)}.")
    table = pa.Table.from_pylist(rows, schema)
    with atomic(path) as part:
        pq.write_table(table, part, row_group_size=256, write_page_checksum=True)
