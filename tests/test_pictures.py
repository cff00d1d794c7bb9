"""Pictures as files hold them: modes kept, what cannot be decoded refused in one sentence, parquet read in parts."""

import io
import struct
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eval.pictures import COLUMNS, EncodedRows, Pictures, Tally, decode, prompts_told, read_shards, said
from eval.transforms import PRESETS
from pso.provenance import UserError, sha256_of

TODO = "fetch it again"


def noise(width: int = 20, height: int = 12, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    level = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(level[..., k]) for k in range(2)])
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (width, height), level.tobytes())
    picture = Image.fromarray(level[..., :3].copy())
    return picture.quantize(16) if mode == "P" else picture.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


KINDS = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
KINDS += [("JPEG", mode) for mode in ("L", "RGB", "CMYK")] + [("WEBP", mode) for mode in ("RGB", "RGBA")]


# ---- decoding ----


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_a_picture_keeps_its_mode_and_its_pixels(kind, mode):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(mode=mode), kind, **options)
    found = decode(data, "x", TODO)
    assert found.mode == mode and found.size == (20, 12)
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(data))))
    for preset in PRESETS.values():
        assert torch.isfinite(preset(found, 32)).all()


def test_rgb_too_early_is_another_picture():
    """Why the mode is kept: the official transform resizes 16 bits and palettes before it makes RGB of them."""
    for mode in ("P", "I;16"):
        image = decode(encoded(noise(90, 60, mode)), "x", TODO)
        late, early = (PRESETS["openai_pil224"](one, 32) for one in (image, image.convert("RGB")))
        assert (late - early).abs().max() > 0.1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says a size, with hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "it has no bytes"),
        (b"", "it has no bytes"),
        (b"not a png", "not PNG, JPEG or WebP: it begins with b'not a pn'"),
        (encoded(noise(), "GIF"), "not PNG, JPEG or WebP"),
        (encoded(noise(), "TIFF"), "not PNG, JPEG or WebP"),
        (encoded(noise())[:-30], "cannot be decoded"),
        (encoded(noise())[:-5], "cannot be decoded"),
        (encoded(noise(), "JPEG")[:400], "cannot be decoded"),
        (encoded(noise(), "WEBP")[:-9], "cannot be decoded"),
        (png_of(60_000, 60_000), "more than 89478485 pixels"),
        (png_of(10_000, 10_000), "more than 89478485 pixels"),
        (png_of(0, 10), "cannot be decoded|0 x 10 px"),
        (png_of(30, 10), "cannot be decoded"),
        (encoded(noise(1, 101)), r"1 x 101 px; expected a longer side of at most 100 times the shorter"),
    ],
)
def test_what_is_no_whole_picture_is_one_sentence(data, why):
    with pytest.raises(UserError, match=why) as caught:
        decode(data, "prompt-3", TODO)
    text = str(caught.value)
    assert text.startswith("image prompt-3 ") and text.endswith(f"; {TODO}.") and "\n" not in text


def test_of_several_frames_the_first_counts_and_they_are_counted():
    tally = Tally()
    for kind in ("PNG", "WEBP"):
        frames = [noise(seed=k) for k in range(3)]
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        found = decode(data, "x", TODO)
        tally.add([found])
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(frames[0]))
    tally.add([noise(mode="P"), noise(mode="L"), noise(mode="L")])
    told = tally.told()
    assert told["multi_frame"] == 2 and told["pictures"] == 5 and told["not_rgb"].items() >= {"L": 2, "P": 1}.items()
    lines = said(told | {"eval_sets": {"mine": {"prompts": 9, "empty": 1, "truncated": {"a": 0, "b": 4}}}})
    assert lines == [
        f"5 pictures, of them not in RGB: {', '.join(f'{n} {m}' for m, n in sorted(told['not_rgb'].items()))}",
        "2 of 5 pictures have several frames; the first counts",
        "mine: 1 of 9 prompts are empty",
        "mine: b reads only the beginning of 4 of 9 prompts",
    ]


def test_nothing_unusual_is_said_of_usual_pictures():
    tally = Tally()
    tally.add([noise()])
    assert said(tally.told() | {"eval_sets": {"mine": {"prompts": 1, "empty": 0, "truncated": {}}}}) == []


def test_prompts_are_counted_once_and_only_by_those_who_read_them():
    class Reads:
        def truncated(self, prompt):
            return len(prompt) > 3

    class Looks:
        truncated = None

    told = prompts_told(["", "  ", "abcd", "abcd", "abc"], {"reads": Reads(), "looks": Looks(), "sees": object()})
    assert told == {"prompts": 4, "empty": 2, "truncated": {"reads": 1}}


# ---- parquet ----


def shard(path, rows: range, **changes):
    frame = pd.DataFrame(
        {
            "image_id": [f"p{i // 2}-{i % 2}" for i in rows],
            "prompt_id": [f"p{i // 2}" for i in rows],
            "prompt": [f"prompt {i // 2}" for i in rows],
            "image_seed": [i % 2 for i in rows],
            "png": [encoded(noise(seed=i)) for i in rows],
        }
    ).assign(**changes)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=70)
    return {"file": path.name, "images": len(frame), "sha256": sha256_of(path)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, [shard(folder / "a.parquet", range(150)), shard(folder / "b.parquet", range(150, 160))]


def test_rows_are_found_in_any_order_across_files_and_row_groups(shards):
    pictures = read_shards(shards[1], shards[0], "`again`")
    assert len(pictures) == 160 and list(pictures.frame.columns) == COLUMNS
    for row in [0, 1, 69, 70, 149, 150, 159, 3, 140, 2, 2, 68]:
        assert np.array_equal(np.asarray(pictures[row]), np.asarray(noise(seed=row))), row


def test_going_forward_reads_every_part_once(shards, monkeypatch):
    rows = EncodedRows([shards[0] / "a.parquet", shards[0] / "b.parquet"], "png", TODO)
    entered, enter = [], rows._enter
    monkeypatch.setattr(rows, "_enter", lambda group: (entered.append(group), enter(group)))
    assert len({rows(row) for row in range(rows.count)}) == 160
    assert entered == [0, 1, 2, 3] and len(rows.rows) <= 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": "same"}, "4 images where images.json lists 4"),
        ({"prompt": [None, "a", "b", "c"]}, "row 0 of 4 in .* has no prompt; delete its shard"),
        ({"image_seed": [0, 1, None, 1]}, "row . of 4 in .* has no image_seed; delete its shard"),
        ({"png": 7}, "column png holds int; expected bytes"),
        ({"png": None}, "image p0-0 cannot be decoded .it has no bytes"),
    ],
)
def test_spoilt_shards_are_one_sentence(tmp_path, changes, message):
    listed = [shard(tmp_path / "a.parquet", range(4), **changes)]
    with pytest.raises(UserError, match=message):
        _ = read_shards(listed, tmp_path, "`again`")[0]


def test_a_shard_without_a_column_names_it(tmp_path):
    shard(tmp_path / "a.parquet", range(4))
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop(["prompt"]), tmp_path / "a.parquet")
    listed = [{"file": "a.parquet", "images": 4, "sha256": sha256_of(tmp_path / "a.parquet")}]
    with pytest.raises(UserError, match=r"has no column prompt, only image_id, .*; delete its shard and run `again`"):
        read_shards(listed, tmp_path, "`again`")


def test_fewer_images_than_listed(tmp_path):
    listed = [shard(tmp_path / "a.parquet", range(4)) | {"images": 5}]
    with pytest.raises(UserError, match="4 images where images.json lists 5; delete the shards and run `again`"):
        read_shards(listed, tmp_path, "`again`")


def test_pictures_in_another_order(shards):
    pictures = read_shards(shards[1], shards[0], "`again`")
    turned = pictures.at([5, 3], pictures.frame.iloc[[5, 3]])
    assert isinstance(turned, Pictures) and turned.names == ["p2-1", "p1-1"]
    assert np.array_equal(np.asarray(turned[1]), np.asarray(noise(seed=3)))
