"""A folder of captioned pictures: image files and metadata.jsonl with `file_name` and `text` in each line.

It is Hugging Face's imagefolder convention, so a folder made for `datasets` or diffusers' training scripts fits.
Everything is checked before a picture is used; nothing is left out. Torch-free.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pso.data import read_image, read_text
from pso.dreambooth import IMAGE_SUFFIXES
from pso.entries import DatasetEntry
from pso.pairs import Counts, Visit
from pso.provenance import UserError, sha256_of
from pso.shards import check_file, check_rows

METADATA = "metadata.jsonl"
LINE = '{"file_name": "0001.png", "text": "its caption"}'


@dataclass(frozen=True)
class CaptionedPicture:
    """`id` is the file's path in the folder."""

    id: str
    text: str
    path: Path


class ImageFolder:
    """The pictures in the order of metadata.jsonl. To be read as preference pairs are (pso/pairs.py), each picture one
    row, the folder the only shard; nothing is ever left out."""

    left_out: tuple[int, ...] = ()
    quarantine: list = []

    def __init__(self, folder: Path, entry: DatasetEntry, name: str):
        self.folder = Path(folder)
        self.metadata = self.folder / METADATA
        if not self.metadata.is_file():
            raise UserError(
                f"{self.metadata} is missing; data set {name} (datasets.{name}.repo and .files) is a folder with "
                f"pictures and this file, one line such as {LINE} for each of them."
            )
        check_file(self.metadata, entry, name)
        self.pictures = [_picture(self.folder, number, line) for number, line in _lines(self.metadata)]
        check_rows(len(self.pictures), str(self.metadata), entry, name)
        self._check_files()
        texts = [picture.text for picture in self.pictures]
        blank = sum(not text.strip() for text in texts)
        self.counts = Counts(len(texts), len(texts), len(set(texts)), blank)
        self.shards, self.starts, self.row = [self.folder], np.array([0, len(texts)]), np.arange(len(texts))
        self.prompts = list(dict.fromkeys(texts))
        number = {text: k for k, text in enumerate(self.prompts)}
        self.prompt_index = np.array([number[text] for text in texts])

    def __iter__(self):
        return iter(self.pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, positions: np.ndarray, look: Callable[[Image.Image], Any]) -> Iterator[Visit]:
        for position in positions.tolist():
            picture = self.pictures[position]
            yield Visit(position, picture, (look(read_image(picture.path)),))

    def digest_of(self, shard: int) -> str:
        return sha256_of(self.metadata) + self.digest()

    def _check_files(self) -> None:
        """Every file is named once, none is left over, each is a whole picture."""
        if not self.pictures:
            raise UserError(f"{self.metadata} has no line; expected {LINE} for each picture.")
        named = [picture.path for picture in self.pictures]
        most, count = Counter(named).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{self.metadata} names {most.relative_to(self.folder)} {count} times; expected one line for each "
                "picture."
            )
        there = {path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
        if extra := sorted(there - set(named)):
            raise UserError(
                f"{self.folder} holds {len(extra)} pictures that {METADATA} does not name, the first is "
                f"{extra[0].relative_to(self.folder)}; add a line for each or take them away."
            )
        for picture in self.pictures:
            read_image(picture.path)

    def digest(self) -> str:
        """sha256 over names and contents of all pictures."""
        lines = [f"{sha256_of(picture.path)}  {picture.id}\n" for picture in self.pictures]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def _picture(folder: Path, number: int, line: str) -> CaptionedPicture:
    where = f"{folder / METADATA} line {number}"
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); expected {LINE}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} holds {type(content).__name__}; expected {LINE}.")
    for key in ("file_name", "text"):
        if not isinstance(content.get(key), str):
            raise UserError(f"{where} has no text in {key}; expected {LINE}.")
    file = content["file_name"]
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"{where}: file_name is {file!r}, which lies outside {folder}; expected a file in it.")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{where}: file_name is {file!r}; expected one that ends in {', '.join(IMAGE_SUFFIXES)}.")
    if not path.is_file():
        raise UserError(f"{where}: file_name is {file!r}, but {path} is missing; fetch it or remove the line.")
    return CaptionedPicture(file, content["text"], path)


def write_imagefolder(folder: Path, pictures: list[tuple[str, str, bytes]]) -> None:
    """(file name, text, encoded picture) each; metadata.jsonl last."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, _, data in pictures:
        (folder / file).write_bytes(data)
    lines = [json.dumps({"file_name": file, "text": text}) for file, text, _ in pictures]
    (folder / METADATA).write_text("\n".join(lines) + "\n")
