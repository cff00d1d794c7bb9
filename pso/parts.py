"""What a long job makes, kept in parts: safetensors files that are whole in themselves, and rows read out of them.

A killed job goes on after its last part. Each part tells what it was made from, so that one of other settings is made
anew, and each row has a checksum, which is looked at when the row is read. Files are mapped, not loaded: training
touches the rows of a batch and no more.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pso import state_dicts
from pso.provenance import UserError, atomic, digest
from pso.visits import Plan, kept_pairs

log = logging.getLogger("parts")
PART_BYTES = 2**29
CRC = ".crc"


class Part:
    """One file: "row" [R], where each row comes from in its source, and further tensors [R, ...]."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.told = json.loads((file.metadata() or {})["told"])
            self.tensors = {name: file.get_tensor(name) for name in list(file.keys())}  # mapped, not read
        self.rows = self.tensors["row"].numpy()

    def whole(self) -> bool:
        """Whether everything in it is as it was written."""
        sums = {name: value for name, value in self.tensors.items() if name.endswith(CRC)}
        if _content(self.told["made_from"], self.rows, sums) != self.told["content"]:
            return False
        summed = [(self.tensors[name.removesuffix(CRC)], value.tolist()) for name, value in sums.items()]
        return all(_crc(row) == one for rows, all_sums in summed for row, one in zip(rows, all_sums, strict=True))

    def __len__(self) -> int:
        return len(self.rows)


def _crc(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def write_part(path: Path, made_from: str, rows: np.ndarray, tensors: dict[str, Tensor]) -> str:
    """What tells the content is returned."""
    sums = {name + CRC: torch.tensor([_crc(row) for row in value]) for name, value in tensors.items()}
    content = _content(made_from, rows, sums)
    found = {"row": torch.tensor(rows), **{name: value.contiguous() for name, value in tensors.items()}, **sums}
    with atomic(path) as part:
        state_dicts.write(part, found, {"told": json.dumps({"made_from": made_from, "content": content})})
    return content


def _content(made_from: str, rows: np.ndarray, sums: dict[str, Tensor]) -> str:
    own = hashlib.sha256(b"".join(sums[name].numpy().tobytes() for name in sorted(sums))).hexdigest()
    return digest([made_from, own, rows.tolist()])


class Parts:
    """Rows of the files of a folder; `listed`: their names, in order, with what tells their content."""

    def __init__(self, folder: Path, listed: dict[str, str], command: str):
        self.again = f"`{command}` makes it anew"
        self.parts = [self._opened(folder / name, content) for name, content in listed.items()]

    def _opened(self, path: Path, content: str) -> Part:
        if not path.exists():
            raise UserError(f"{path} is missing; {self.again}.")
        try:
            part = Part(path)
        except (OSError, ValueError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); {self.again}.") from error
        if part.told.get("content") != content:
            raise UserError(f"{path} is of another age than the file that lists it; {self.again}.")
        return part

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Rows of a tensor at places [B, 2]: number of the part, row in it."""
        return torch.stack([self._row(name, *place) for place in places.tolist()])

    def _row(self, name: str, number: int, row: int) -> Tensor:
        part = self.parts[number]
        value = part.tensors[name][row]
        if _crc(value) != part.tensors[name + CRC][row]:
            raise UserError(f"{part.path} is damaged (row {row} of {name}); {self.again}.")
        return value


# ---- making them ----


class Keeper:
    """The parts of one folder while they are made: `{source}.{k}.safetensors`."""

    def __init__(self, folder: Path):
        self.folder, self.listed, self.numbers = folder, {}, {}  # names in order of being found or made

    def found(self, source: str, made_from: str) -> Iterator[tuple[int, Part]]:
        """What is there of a source, with its number; what was made from something else, or is damaged, goes away."""
        for path in sorted(self.folder.glob(f"{_escaped(source)}.*.safetensors"), key=_number):
            try:
                part = Part(path)
                fits = part.told.get("made_from") == made_from and part.whole()
            except (OSError, ValueError, SafetensorError, KeyError):
                fits = False
            if fits:
                yield self._listed(path, part.told["content"]), part
            else:
                log.info("%s is damaged or was made from something else; it is made anew.", path)
                path.unlink()

    def write(self, source: str, made_from: str, rows: np.ndarray, tensors: dict[str, Tensor]) -> int:
        taken = [_number(path) for path in self.folder.glob(f"{_escaped(source)}.*.safetensors")]
        path = self.folder / f"{source}.{max(taken, default=-1) + 1}.safetensors"
        return self._listed(path, write_part(path, made_from, rows, tensors))

    def _listed(self, path: Path, content: str) -> int:
        self.listed[path.name] = content
        return len(self.listed) - 1

    def in_order(self, places: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Places and parts by name, so that they do not tell how often a job was interrupted."""
        names = sorted(self.listed)
        rank = np.array([names.index(name) for name in self.listed] + [-1])  # -1 stays -1
        return np.stack([rank[places[:, 0]], places[:, 1]], 1), {name: self.listed[name] for name in names}

    def forget_others(self) -> None:
        """Parts of sources that are no more."""
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self.listed:
                path.unlink()


def _escaped(source: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in source)


def _number(path: Path) -> int:
    return int(path.name.rsplit(".", 2)[1])


def convert(
    reader,
    plan: Plan | None,
    folder: Path,
    settings: object,
    look: Callable[[Image.Image], object],
    encode: Callable[[list], dict[str, Tensor]],
    batch: int,
) -> tuple[np.ndarray, dict[str, str]]:
    """Encode the pairs of a reader (pso/pairs.py) that a plan asks for and that are not there yet.

    Returns places [P, 2] (part and row; -1 of a pair that is not kept), and the parts. Rows whose pictures cannot be
    used are found on the way, and the next ones in the order of visits take their place.
    """
    keeper, places = Keeper(folder), np.full((len(reader), 2), -1, np.int64)
    made_from = [digest([settings, reader.digest_of(shard)]) for shard in range(len(reader.shards))]
    for shard, source in enumerate(reader.shards):
        start, stop = reader.starts[shard : shard + 2]
        for number, part in keeper.found(source.stem, made_from[shard]):
            positions = start + np.searchsorted(reader.row[start:stop], part.rows)
            places[positions] = np.stack([np.full(len(part), number), np.arange(len(part))], 1)
    keeper.forget_others()
    while True:
        wanted = kept_pairs(plan, len(reader), reader.left_out)
        missing = np.flatnonzero(wanted & (places[:, 0] < 0))
        if not len(missing):
            break
        for shard, source in enumerate(reader.shards):
            start, stop = reader.starts[shard : shard + 2]
            here = missing[(missing >= start) & (missing < stop)]
            for positions, tensors in _encoded(reader.read(here, look), encode, batch):
                number = keeper.write(source.stem, made_from[shard], reader.row[positions], tensors)
                places[positions] = np.stack([np.full(len(positions), number), np.arange(len(positions))], 1)
            if len(here):
                log.info("%s: %d of %d pairs kept", source.name, (places[:, 0] >= 0).sum(), wanted.sum())
    places[~wanted] = -1
    return keeper.in_order(places)


def _encoded(visits: Iterable, encode: Callable, batch: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Whole batches until a part is full: what is encoded together does not depend on where a job was killed."""
    positions, found, size, visits = [], [], 0, iter(visits)
    while some := list(islice(visits, batch)):
        positions += [visit.position for visit in some]
        found.append(encode(some))
        size += sum(value.nbytes for value in found[-1].values())
        if size >= PART_BYTES:
            yield np.array(positions), _joined(found)
            positions, found, size = [], [], 0
    if positions:
        yield np.array(positions), _joined(found)


def _joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def convert_texts(
    texts: list[str], folder: Path, settings: object, encode: Callable[[list[str]], dict[str, Tensor]], size: int
) -> tuple[np.ndarray, dict[str, str]]:
    """Encode texts, `size` to a part. Returns places [len(texts), 2] and the parts."""
    keeper, places, found = Keeper(folder), [], []
    for number, start in enumerate(range(0, len(texts), size)):
        part = texts[start : start + size]
        found.append((f"texts-{number:05d}", digest([settings, part]), part))
    for source, made_from, part in found:
        there = next((number for number, _ in keeper.found(source, made_from)), None)
        number = keeper.write(source, made_from, np.arange(len(part)), encode(part)) if there is None else there
        places.append(np.stack([np.full(len(part), number), np.arange(len(part))], 1))
    keeper.forget_others()
    return keeper.in_order(np.concatenate(places))
