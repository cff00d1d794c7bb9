"""Prompt lists and images: the real files where they are present, and stand-ins of every format."""

import csv
import io
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pso import data
from pso.data import BadImage, load_prompts, parse_image, prompts_of
from pso.entries import DatasetEntry
from pso.provenance import UserError
from pso.shards import check_file

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PSO_REAL_DATA", ROOT.parent / "shared" / "data"))
PARTI_SHA = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
TRAINING_SHA = "804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"
FORMATS = {
    "parti_tsv": ("prompts.tsv", data.write_parti_tsv),
    "caption_json": ("prompts.json", data.write_caption_json),
    "caption_parquet": ("prompts.parquet", data.write_caption_parquet),
}
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"), max_size=60)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def entry(format: str, **more) -> DatasetEntry:
    return DatasetEntry(format=format, repo="owner/set", files="some/file", **more)


def refused(*parts: str):
    """UserError whose message holds every part."""
    return pytest.raises(UserError, match="(?s)" + "".join(f"(?=.*{part})" for part in parts))


# ---- the real files ----


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not in the folder of real data (PSO_REAL_DATA)")
    return REAL / name


def real_parti() -> list[data.Prompt]:
    expected = entry("parti_tsv", num_rows=1632, sha256=PARTI_SHA)
    return load_prompts(real("PartiPrompts.tsv"), expected, "parti_prompts")


def real_training() -> list[data.Prompt]:
    expected = entry("caption_json", num_rows=4000, sha256=TRAINING_SHA)
    return load_prompts(real("4k_training_prompts.json"), expected, "training_prompts_4k")


def test_parti_prompts_are_read_verbatim():
    prompts = real_parti()
    assert Counter(p.category for p in prompts) == {
        "Animals": 314, "Artifacts": 287, "World Knowledge": 214, "People": 177, "Outdoor Scenes": 131,
        "Illustrations": 124, "Vehicles": 104, "Food & Beverage": 74, "Arts": 66, "Abstract": 51,
        "Produce & Plants": 50, "Indoor Scenes": 40,
    }  # fmt: skip
    assert Counter(p.challenge for p in prompts) == {
        "Fine-grained Detail": 312, "Basic": 272, "Simple Detail": 232, "Style & Format": 206, "Imagination": 150,
        "Complex": 113, "Writing & Symbols": 91, "Quantity": 90, "Perspective": 70, "Linguistic Structures": 61,
        "Properties & Positioning": 35,
    }  # fmt: skip
    texts = [p.text for p in prompts]
    assert len(set(texts)) == len({p.id for p in prompts}) == 1632
    assert sum(not text.isascii() for text in texts) == 17
    assert sum(text != text.strip() for text in texts) == 10
    assert any(text.startswith(" A sloth") for text in texts)


def test_a_reader_with_quoting_on_would_change_one_parti_prompt():
    prompts = real_parti()
    with open(real("PartiPrompts.tsv"), newline="", encoding="utf-8") as file:
        wrong = [row[0] for row in csv.reader(file, delimiter="\t")][1:]
    changed = [p.text for p, text in zip(prompts, wrong, strict=True) if p.text != text]
    assert len(changed) == 1
    assert changed[0].startswith('"G I G G L E" painted in')


def test_training_prompts():
    texts = [p.text for p in real_training()]
    assert len(set(texts)) == 4000
    assert len({text.strip().lower() for text in texts}) == 3989
    assert (min(map(len, texts)), max(map(len, texts))) == (1, 397)
    assert sum(not text.isascii() for text in texts) == 98


def test_known_leakage_of_training_prompts_into_parti_prompts():
    assert data.leakage(real_training(), real_parti()) == ["a mountain", "a snail", "a sword", "anger"]


# ---- prompt lists ----


@pytest.mark.parametrize("format", FORMATS)
@QUICK
@given(drawn=st.data())
def test_every_format_gives_back_what_was_written(tmp_path, format, drawn):
    texts = drawn.draw(st.lists(ONE_LINE if format == "parti_tsv" else TEXT, min_size=1, max_size=8))
    name, write = FORMATS[format]
    write(tmp_path / name, prompts_of(texts))
    assert load_prompts(tmp_path / name, entry(format, num_rows=len(texts)), "set") == prompts_of(texts)


def test_categories_survive_and_the_real_header_is_written(tmp_path):
    prompts = [data.Prompt(prompts_of(['"a" b '])[0].id, '"a" b ', "Animals", "Basic")]
    data.write_parti_tsv(tmp_path / "p.tsv", prompts)
    assert (tmp_path / "p.tsv").read_bytes() == b'Prompt\tCategory\tChallenge\tNote\n"a" b \tAnimals\tBasic\t\n'
    assert load_prompts(tmp_path / "p.tsv", entry("parti_tsv"), "set") == prompts


@given(st.lists(TEXT, max_size=12), st.randoms(use_true_random=False))
def test_ids_depend_on_the_text_alone(texts, shuffle):
    shuffled = shuffle.sample(texts, len(texts))
    one, other = (sorted((p.id, p.text) for p in prompts_of(order)) for order in (texts, shuffled))
    assert one == other
    assert len({p for p, _ in one}) == len(texts)


def test_ids_of_copies_and_shards(tmp_path):
    assert [p.id for p in prompts_of(["a cat", "a dog", "a cat", "a cat"])] == [
        "67f5dfb40b23dda2", "fe02e6665a225ac7", "67f5dfb40b23dda2-2", "67f5dfb40b23dda2-3",
    ]  # fmt: skip
    for k, text in enumerate(["a cat", "a cat"]):
        data.write_caption_parquet(tmp_path / f"test-0000{k}-of-00002.parquet", prompts_of([text]))
    shards = sorted(tmp_path.glob("*.parquet"), reverse=True)
    assert load_prompts(shards, entry("caption_parquet", num_rows=2), "set") == prompts_of(["a cat", "a cat"])


def test_blank_prompts_are_kept_and_told(tmp_path, caplog):
    data.write_caption_json(tmp_path / "p.json", prompts_of(["", "  ", "a cat"]))
    with caplog.at_level(logging.WARNING, "data"):
        assert len(load_prompts(tmp_path / "p.json", entry("caption_json"), "set")) == 3
    assert "2 of 3 prompts are blank; they are kept" in caplog.text


def test_leakage_forgives_case_and_spaces():
    train, test = prompts_of([" A cat", "a dog", "a dog "]), prompts_of(["a cat ", "A DOG", "a fox"])
    assert data.leakage(train, test) == ["a cat", "a dog"]


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "a\rb"])
def test_a_tsv_cannot_hold_tabs_and_line_breaks(tmp_path, text):
    with refused("p.tsv", "prompt 2", "tab or a line break", "caption_json"):
        data.write_parti_tsv(tmp_path / "p.tsv", prompts_of(["fine", text]))
    assert list(tmp_path.iterdir()) == []


def test_wrong_digest_count_or_place(tmp_path):
    path = tmp_path / "p.json"
    with refused("p.json is missing", "data set set", "some/file of owner/set", "`snakemake hub`"):
        check_file(path, entry("caption_json"), "set")
    data.write_caption_json(path, prompts_of(["a"]))
    with refused("p.json has sha256 [0-9a-f]{64}", f"datasets.set.sha256 expects {'0' * 64}", "fetch"):
        load_prompts(path, entry("caption_json", sha256="0" * 64), "set")
    with refused("p.json holds 1 rows", "datasets.set.num_rows expects 4000", "correct the entry"):
        load_prompts(path, entry("caption_json", num_rows=4000), "set")
    with refused("datasets.set.format is 'dreambooth'", "parti_tsv, caption_json, caption_parquet"):
        load_prompts(path, entry("dreambooth"), "set")


@pytest.mark.parametrize(
    "format, content, parts",
    [
        ("parti_tsv", b"Prompt\tCategory\n", ["begins with columns", "Category', 'Challenge', 'Note"]),
        ("parti_tsv", b"", ["begins with columns", "expected"]),
        ("parti_tsv", b"Prompt\tCategory\tChallenge\tNote\na\tb\tc\t\na\tb\n", ["line 3 has 2 fields", "expected 4"]),
        ("parti_tsv", b"Prompt\tCategory\tChallenge\tNote\na\rb\tc\td\te\n", ["line 2 has 1 fields", "expected 4"]),
        ("parti_tsv", b"Prompt\tCategory\tChallenge\tNote\n\xff\tb\tc\t\n", ["not UTF-8 at byte 31", "save it as"]),
        ("parti_tsv", b"Prompt\tCategory\tChallenge\tNote\n", ["holds no prompt", "at least one"]),
        ("caption_json", b"[{", ["not JSON", "line 1", "fetch it again"]),
        ("caption_json", b"{}", ["holds dict", "expected a list of"]),
        ("caption_json", b'[{"caption": "a"}, {"prompt": "b"}]', ["item 2 has no text in caption"]),
        ("caption_json", b'[{"caption": 3}]', ["item 1 has no text in caption"]),
        ("caption_json", b'[{"caption": "\\ud800"}]', ["prompt 1", "not Unicode"]),
        ("caption_parquet", b"PAR1 no", ["not a whole parquet file", "fetch it again"]),
    ],
)
def test_malformed_prompt_files_are_named(tmp_path, format, content, parts):
    (tmp_path / "the_file").write_bytes(content)
    with refused("the_file", *parts):
        load_prompts(tmp_path / "the_file", entry(format), "set")


def test_captions_need_their_column_and_no_null(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with refused("p.parquet has no column caption", "found text", "datasets.set.repo"):
        load_prompts(path, entry("caption_parquet"), "set")
    pq.write_table(pa.table({"caption": [1]}), path)
    with refused("p.parquet column caption is int64", "expected text"):
        load_prompts(path, entry("caption_parquet"), "set")
    pq.write_table(pa.table({"caption": ["a", None]}), path)
    with refused("p.parquet row 1 has no caption"):
        load_prompts(path, entry("caption_parquet"), "set")


# ---- images ----


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
FIRST, SECOND = (encoded(Image.new("RGB", (3, 3), colour)) for colour in ("red", "blue"))


def test_png_is_exact_and_keeps_no_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = parse_image(encoded(PICTURE, icc_profile=b"some profile", exif=exif))
    assert (np.asarray(image) == np.rot90(PIXELS, -1)).all()
    assert image.info == {} and not image.getexif()


def test_first_frame_of_an_mpo():
    both = encoded(PICTURE, "MPO", save_all=True, append_images=[Image.new("RGB", PICTURE.size)])
    assert Image.open(io.BytesIO(both)).n_frames == 2
    assert (np.asarray(parse_image(both)) == np.asarray(Image.open(io.BytesIO(both)).convert("RGB"))).all()
    assert np.asarray(parse_image(both)).max() > 100


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((4, 4), 200, np.uint8))
    wide = Image.fromarray(np.full((4, 4), 200 * 256 + 255, np.uint16))
    image = parse_image(encoded(wide if mode == "I;16" else grey.convert(mode), "JPEG" if mode == "CMYK" else "PNG"))
    assert image.mode == "RGB" and image.size == (4, 4)
    if mode != "1":
        assert np.abs(np.asarray(image).astype(int) - 200).max() <= (2 if mode in ("P", "CMYK") else 0)


def test_transparency_shows_the_background():
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    palette = Image.new("P", (2, 2), 0)
    assert np.asarray(parse_image(encoded(clear))).min() == 255
    assert np.asarray(parse_image(encoded(clear), background=(1, 2, 3)))[0, 0].tolist() == [1, 2, 3]
    assert np.asarray(parse_image(encoded(half)))[0, 0].tolist() == [127] * 3
    assert np.asarray(parse_image(encoded(palette, transparency=0))).min() == 255


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no bytes .null"),
        (b"", "no bytes .empty"),
        (b"GIF89a and more", "not PNG, JPEG or WebP: begins with b'GIF89a"),
        (encoded(PICTURE)[:-30], "damaged"),
        (encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "JPEG")[:-500], "damaged: .*truncated"),
        (encoded(PICTURE).replace(b"IDAT", b"IDAT\x00", 1), "damaged"),
    ],
)
def test_bad_images_have_a_reason(content, reason):
    with pytest.raises(BadImage, match=reason):
        parse_image(content)


@pytest.mark.parametrize("cut", [8, 16, 20, 24])
def test_a_png_cut_short_is_no_picture(cut):
    with pytest.raises(BadImage, match="damaged"):  # Pillow alone decodes all of these but the last
        parse_image(encoded(PICTURE)[:-cut])


@pytest.mark.parametrize("over", [1.5, 3])  # a warning of Pillow's, and an error
def test_a_decompression_bomb_is_not_opened(monkeypatch, over):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(30 / over))
    with pytest.raises(BadImage, match="too large: more than"):
        parse_image(encoded(PICTURE))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damage_never_ends_in_anything_but_bad_image(format):
    good, chance = encoded(PICTURE, format), random.Random(0)
    for _ in range(300):
        bad = bytearray(good[: chance.randrange(1, len(good) + 1)])
        bad[chance.randrange(len(bad))] = chance.randrange(256)
        try:
            assert parse_image(bytes(bad)).mode == "RGB"
        except BadImage as error:
            assert str(error)


def test_importing_needs_no_torch():
    code = "import sys, pso.data, pso.dreambooth; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
