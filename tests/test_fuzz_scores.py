"""10,000 random and damaged files into everything that reads pictures and prompts: a picture, or a sentence.

Seeded, so every run sees the same files. Each is flipped, cut, spliced or overwritten from a valid one, or random.
"""

import io
import json
import resource
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_pictures import encoded, noise

from eval.pictures import decode, read_shards
from eval.score import score_pictures
from eval.score_folder import open_pictures, with_prompts
from pso.provenance import UserError, sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # of damaged EXIF and frames, which nothing here reads
SECONDS, MEGABYTES = 5.0, 600  # of CPU time for one input; by how much the process may grow over all of them
TEXTS = ["a red circle", "", "“curly” & <b>", "日本語 ☃", '"G I G G L E" painted', "long " * 90]


@pytest.fixture(autouse=True)
def bounded():
    """No huge allocation."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


def damaged(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One to a few kinds of damage after each other."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not found:
            break
        at, kind = int(rng.integers(len(found))), rng.integers(7)
        if kind <= 1:  # a bit
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # a few bytes
            found[at : at + 4] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:  # the end is missing
            del found[at:]
        elif kind == 4:  # a part is missing
            del found[at : at + int(rng.integers(1, 40))]
        elif kind == 5:  # a part of another file
            found[at:] = other[int(rng.integers(len(other))) :]
        else:  # a part comes twice
            found[at:at] = found[at : at + int(rng.integers(1, 60))]
    return bytes(found)


def resigned(data: bytes) -> bytes:
    """A PNG with the checksum of every chunk put right, so that damage reaches the decoder behind it."""
    found, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        found += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(found)


def pictures() -> list[bytes]:
    kinds = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    kinds += [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")]
    found = [encoded(noise(24, 17, mode, seed), kind) for seed, (kind, mode) in enumerate(kinds)]
    frames = [noise(12, 12, seed=k) for k in range(3)]
    found += [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "WEBP", "MPO")]
    return [*found, encoded(noise(24, 17), "JPEG", progressive=True, exif=Image.Exif()), encoded(noise(), "GIF")]


class Mean:
    """A scorer that reads every pixel, and says how many pictures it was given."""

    def __init__(self):
        self.given = 0

    def score(self, images, prompts):
        self.given += len(images)
        assert all(isinstance(prompt, str) and prompt.encode() is not None for prompt in prompts)
        return torch.tensor([np.asarray(image.convert("RGB"), np.float64).mean() for image in images])


def outcome(work) -> str:
    """`ok` or `refused`; anything but a UserError of one line fails, as does what takes too long."""
    began = time.process_time()
    try:
        work()
        found = "ok"
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 2000 and text.endswith("."), text
        found = "refused"
    assert time.process_time() - began < SECONDS
    return found


def test_pictures():
    """5000 damaged ones, PNGs also with their checksums put right, and 3000 strings of random bytes, most behind the
    first bytes of a real file."""
    rng, valid, seen = np.random.default_rng(0), pictures(), Counter()
    inputs = [damaged(rng, valid[i % len(valid)], valid[int(rng.integers(len(valid)))]) for i in range(5000)]
    inputs = [resigned(one) if one[:4] == b"\x89PNG" and i % 3 else one for i, one in enumerate(inputs)]
    heads = [b"", *(one[:n] for one in valid for n in (4, 12, 40))]
    inputs += [heads[i % len(heads)] + rng.bytes(int(rng.integers(0, 300))) for i in range(3000)]

    def read(data: bytes) -> None:
        image = decode(data, "it", "make it again")
        with Image.open(io.BytesIO(data)) as plain:  # Pillow alone decodes it to the same pixels
            assert image.mode == plain.mode and image.tobytes() == plain.convert(plain.mode).tobytes()
        assert 1 <= max(image.size) <= 100 * min(image.size) and torch.isfinite(Mean().score([image], ["a"])).all()

    for data in inputs:
        seen[outcome(lambda data=data: read(data))] += 1
    assert sum(seen.values()) == 8000 and seen["ok"] > 50 and seen["refused"] > 5000, seen
    for data in valid[:-1]:
        assert outcome(lambda data=data: read(data)) == "ok"
    assert outcome(lambda: read(valid[-1])) == "refused", "a GIF"


def parquet(path, rng, valid: list[bytes], **options) -> bytes:
    rows = [valid[int(i)] for i in rng.integers(len(valid), size=4)]
    table = {"image_id": list("abcd"), "prompt_id": list("wxyz"), "prompt": TEXTS[:4], "image_seed": range(4)}
    pq.write_table(pa.table(table | {"png": rows}), path, row_group_size=3, **options)
    return path.read_bytes()


def scored(found) -> pd.DataFrame:
    scorer = Mean()
    scores = score_pictures(found, found.frame["prompt"].tolist(), {"mean": scorer}, names=found.names)
    assert scorer.given == len(scores) == len(found) and np.isfinite(scores["mean"]).all()
    return scores


def test_parquet_files_and_shards(tmp_path):
    """1000 damaged files, as --images has them and as a manifest lists them, its sha256 right for once."""
    rng, valid, seen, path = np.random.default_rng(1), pictures()[:-1], Counter(), tmp_path / "shard0.parquet"
    options = ({}, {"compression": "zstd"}, {"compression": "none", "write_page_checksum": True}, {"version": "1.0"})
    files = [parquet(path, rng, valid, **options[k % 4]) for k in range(20)]
    expected = []
    for data in files:
        path.write_bytes(data)
        expected.append(scored(with_prompts(open_pictures(path), None)))
    for k in range(1000):
        data = damaged(rng, files[k % 20], files[int(rng.integers(20))]) if k % 10 else rng.bytes(200)
        path.write_bytes(data)

        def read(k=k):
            if k % 2:
                scored(with_prompts(open_pictures(path), None))
            else:
                scored(read_shards([{"file": path.name, "images": 4, "sha256": sha256_of(path)}], tmp_path, "`again`"))

        seen[outcome(read)] += 1
    assert seen["ok"] > 20 and seen["refused"] > 500 and sum(seen.values()) == 1000, seen
    assert len({tuple(frame["mean"]) for frame in expected}) > 10


def prompt_files(names: list[str]) -> dict[str, bytes]:
    rows = [{"file_name": n, "prompt": text, "seed": k} for k, (n, text) in enumerate(zip(names, TEXTS, strict=True))]
    tabs = "\n".join(["file_name\tprompt", *(f"{row['file_name']}\t{row['prompt']}" for row in rows)])
    files = {
        ".txt": "\n".join(TEXTS) + "\n",
        ".json": json.dumps(rows, ensure_ascii=False),
        ".jsonl": "\r\n".join(json.dumps(row) for row in rows),
        ".csv": pd.DataFrame(rows).to_csv(index=False),
        ".tsv": tabs,
    }
    return {kind: text.encode() for kind, text in files.items()}


def test_folders_with_their_prompts(tmp_path):
    """1000 damaged prompt files, and beside every fifth a damaged picture in the folder."""
    rng, valid, seen = np.random.default_rng(2), pictures()[:-1], Counter()
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [f"{k}.png" for k in range(len(TEXTS))]
    for name, data in zip(names, valid, strict=False):
        (folder / name).write_bytes(data)
    files = prompt_files(names)
    for kind, data in files.items():
        (tmp_path / f"prompts{kind}").write_bytes(data)
        found = with_prompts(open_pictures(folder), tmp_path / f"prompts{kind}")
        assert found.frame["prompt"].tolist() == TEXTS and len(scored(found)) == len(TEXTS)
    for k in range(1000):
        kind = list(files)[k % 5]
        path = tmp_path / f"prompts{kind}"
        path.write_bytes(damaged(rng, files[kind], valid[0]) if k % 10 else rng.bytes(100))
        (folder / names[0]).write_bytes(damaged(rng, valid[0], valid[3]) if k % 5 == 4 else valid[0])
        seen[outcome(lambda path=path: scored(with_prompts(open_pictures(folder), path)))] += 1
    assert seen["ok"] > 20 and seen["refused"] > 300 and sum(seen.values()) == 1000, seen
