"""Preference pairs and the order in which samples are visited, on stand-ins in the real schema."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import FIRST, SECOND, entry, refused

from eval.run_notes import dropped_note
from pso import data
from pso.config import load
from pso.data import prompts_of
from pso.pairs import DROPS, iter_pairs
from pso.visits import pair_indices


def row(number: int, **changes) -> dict:
    good = {"caption": f"caption {number % 3}", "jpg_0": FIRST, "jpg_1": SECOND, "label_0": 1.0, "label_1": 0.0}
    return good | {"ranking_id": 100 + number} | changes


def shards(folder: Path, rows: list[dict], num_shards: int = 2) -> list[Path]:
    return data.write_pair_shards(folder, rows, num_shards)


def test_pairs_come_in_order_with_the_preferred_picture_as_target(tmp_path):
    rows = [row(n, label_0=float(n % 2), label_1=float(1 - n % 2)) for n in range(300)]
    paths = shards(tmp_path, rows)
    assert [p.name for p in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    pairs = iter_pairs(paths[::-1], entry("preference_parquet", num_rows=300), "set")
    found = list(pairs)
    assert [p.id for p in found] == [str(100 + n) for n in range(300)]
    assert [p.prompt for p in found] == [r["caption"] for r in rows]
    assert [(p.target, p.reference) for p in found] == [
        (FIRST, SECOND) if n % 2 else (SECOND, FIRST) for n in range(300)
    ]
    assert pairs.counts.as_dict() == {
        "rows": 300, "pairs": 300, "captions": 3, "blank_captions": 0, "dropped": dict.fromkeys(DROPS, 0),
    }  # fmt: skip
    assert list(pairs) == found and pairs.counts.pairs == 300  # a second visit starts anew


def test_the_written_schema_is_pick_a_pics(tmp_path):
    rows = [row(0, has_label=False, are_different=False)]
    schema = pq.read_schema(shards(tmp_path, rows, 1)[0])
    assert [(c.name, str(c.type)) for c in schema] == [
        ("are_different", "bool"), ("best_image_uid", "string"), ("caption", "string"),
        ("created_at", "timestamp[ns]"), ("has_label", "bool"), ("image_0_uid", "string"),
        ("image_0_url", "string"), ("image_1_uid", "string"), ("image_1_url", "string"), ("jpg_0", "binary"),
        ("jpg_1", "binary"), ("label_0", "double"), ("label_1", "double"), ("model_0", "string"),
        ("model_1", "string"), ("ranking_id", "int64"), ("user_id", "int64"),
        ("num_example_per_prompt", "int64"), ("__index_level_0__", "int64"),
    ]  # fmt: skip
    assert (
        len(list(iter_pairs([tmp_path / "data/train-00000-of-00001.parquet"], entry("preference_parquet"), "s"))) == 1
    )
    with refused("train-00000-of-00001.parquet cannot hold mood", "its columns are are_different"):
        shards(tmp_path, [row(0, mood=1)], 1)


def test_every_dropped_row_is_counted_under_its_reason(tmp_path):
    rows = [
        row(0),
        row(1, label_0=0.5, label_1=0.5),
        row(2, label_0=0.7, label_1=0.3),
        row(3, label_0=1.0, label_1=1.0),
        row(4, label_0=1.0, label_1=None),
        row(5, label_0=float("nan")),
        row(6, caption=None),
        row(7, jpg_0=None),
        row(8, jpg_1=b""),
        row(9, jpg_0=b"no image"),
        row(10, jpg_1=SECOND[:-20], jpg_0=FIRST),
        row(11, caption=" "),
        row(12, label_0=0.5, label_1=0.5, jpg_0=None),
    ]
    pairs = iter_pairs(shards(tmp_path, rows), entry("preference_parquet"), "set")
    assert [p.id for p in pairs] == ["100", "111"]
    assert pairs.counts.dropped == {
        "tie": 2, "bad_label": 4, "missing_caption": 1, "missing_image_0": 1, "missing_image_1": 1,
        "undecodable_image_0": 1, "undecodable_image_1": 1,
    }  # fmt: skip
    assert (pairs.counts.rows, pairs.counts.pairs, pairs.counts.blank_captions) == (13, 2, 1)
    assert pairs.counts.sentence().startswith(
        "2 pairs of 13 rows, 2 different captions (1 blank pairs); dropped: tie 2,"
    )
    first, second = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
    quarantine = json.loads(json.dumps(pairs.quarantine))
    assert [where for *where, _ in quarantine] == [
        [first, 2], [first, 3], [first, 4], [first, 5], [second, 0], [second, 1], [second, 2], [second, 3], [second, 4],
    ]  # fmt: skip
    assert quarantine[0][2] == "bad_label: label_0 0.7, label_1 0.3"
    assert quarantine[-2][2].startswith("undecodable_image_0: not PNG, JPEG or WebP")


@pytest.mark.parametrize("second_id", [100, None])
def test_ids_fall_back_to_shard_and_row(tmp_path, second_id):
    paths = shards(tmp_path, [row(0), row(1, ranking_id=second_id), row(2)])
    found = [p.id for p in iter_pairs(paths, entry("preference_parquet"), "set")]
    assert found == ["train-00000-of-00002-0", "train-00001-of-00002-0", "train-00001-of-00002-1"]


def test_all_shards_are_checked_before_the_first_pair(tmp_path):
    paths, wanted = shards(tmp_path, [row(n) for n in range(6)], 3), entry("preference_parquet", num_rows=6)
    with refused("holds 6 rows", "datasets.set.num_rows expects 959040"):
        iter_pairs(paths, entry("preference_parquet", num_rows=959040), "set")
    with refused("holds 4 rows", "expects 6"):
        iter_pairs(paths[:2], wanted, "set")
    with refused("data set set has no file some/file of owner/set"):
        iter_pairs([], wanted, "set")
    with refused("two files called train-00000-of-00003.parquet"):
        iter_pairs([*paths, paths[0]], wanted, "set")
    with refused("sha256 is the digest of one file", "3 files"):
        iter_pairs(paths, entry("preference_parquet", sha256="0" * 64), "set")
    with refused("mixes shards of 00002 and of 00003"):
        iter_pairs([*paths, *shards(tmp_path, [row(0)])], wanted, "set")
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with refused("train-00002-of-00003.parquet is not a whole parquet file", "fetch it again"):
        iter_pairs(paths, wanted, "set")
    paths[2].unlink()
    with refused("train-00002-of-00003.parquet is missing", "`snakemake hub`"):
        iter_pairs(paths, wanted, "set")


def test_missing_and_wrong_columns_are_named(tmp_path):
    path = tmp_path / "captions_only.parquet"
    data.write_caption_parquet(path, prompts_of(["a"]))
    with refused("captions_only.parquet has no column jpg_0, jpg_1;", "expected caption, jpg_0", "datasets.set.repo"):
        iter_pairs([path], entry("preference_parquet"), "set")
    pq.write_table(pa.table({k: [str(v)] for k, v in row(0).items()}), path)
    with refused("captions_only.parquet column jpg_0 is string; expected bytes"):
        iter_pairs([path], entry("preference_parquet"), "set")


def test_a_page_that_was_damaged_on_the_way_is_found(tmp_path):
    path = shards(tmp_path, [row(0)], 1)[0]
    content = bytearray(path.read_bytes())
    content[content.index(FIRST[:8]) + 40] ^= 1
    path.write_bytes(content)
    with refused("train-00000-of-00001.parquet is not a whole parquet file"):
        list(iter_pairs([path], entry("preference_parquet"), "set"))


# ---- order of visits ----

SIZES = st.integers(1, 12)


@given(st.integers(0, 5), SIZES, SIZES, st.integers(0, 2**40))
def test_order_is_pure_and_each_epoch_visits_every_sample_once(epoch, batch, count, seed):
    one_by_one = [pair_indices(p, 1, count, seed)[0] for p in range(batch * count * (epoch + 1))]
    in_batches = [i for u in range(count * (epoch + 1)) for i in pair_indices(u, batch, count, seed)]
    assert one_by_one == in_batches
    for start in range(0, len(one_by_one), count):
        assert sorted(one_by_one[start : start + count]) == list(range(count))


def test_order_is_this_one_on_every_machine():
    assert pair_indices(0, 8, 5, 0) == [3, 1, 4, 2, 0, 1, 3, 2]
    assert all(type(i) is int for i in pair_indices(0, 8, 5, 0))
    orders = [pair_indices(update, 50, 50, seed) for seed in (0, 1, 2**32) for update in range(3)]
    assert len({tuple(order) for order in orders}) == 9  # seeds and epochs


def test_nothing_cannot_be_visited():
    with refused("0 samples cannot be drawn", "tune.batch_size"):
        pair_indices(0, 4, 0, 0)


# ---- the index ----


def test_the_index_reads_no_picture_and_a_row_only_its_own(tmp_path):
    path = shards(tmp_path, [row(n, jpg_0=FIRST, jpg_1=None) for n in range(300)], 1)[0]  # row groups of 256 and 44
    content = bytearray(path.read_bytes())
    content[content.index(FIRST[:8]) + 40] ^= 1
    path.write_bytes(content)
    pairs = iter_pairs([path], entry("preference_parquet", num_pairs=300, num_prompts=3), "set")
    assert len(pairs) == 300 and pairs.counts.pairs == 300
    assert list(pairs.read(np.array([260, 299]), lambda image: None)) == []
    assert pairs.counts.dropped["missing_image_1"] == 2 and pairs.left_out == (260, 299)
    with refused("is not a whole parquet file"):
        list(pairs.read(np.array([0]), lambda image: None))


def test_pictures_are_decoded_once_and_looked_at_target_first(tmp_path):
    rows = [row(n, label_0=float(n % 2), label_1=float(1 - n % 2)) for n in range(8)]
    pairs, looked = iter_pairs(shards(tmp_path, rows), entry("preference_parquet"), "set"), []
    visits = list(pairs.read(np.array([1, 2, 6]), lambda image: looked.append(1) or image.getpixel((0, 0))))
    assert [visit.position for visit in visits] == [1, 2, 6] and len(looked) == 6
    red, blue = (255, 0, 0), (0, 0, 255)
    assert [visit.pictures for visit in visits] == [(red, blue), (blue, red), (blue, red)]
    assert [visit.row.id for visit in visits] == ["101", "102", "106"]


@pytest.mark.parametrize("key, expected, said", [("num_pairs", 851293, "5 dec"), ("num_prompts", 58960, "3 dif")])
def test_counts_of_pairs_and_prompts_are_checked(tmp_path, key, expected, said):
    rows = [row(n) for n in range(5)] + [row(5, label_0=0.5, label_1=0.5, caption="only of a tie")]
    paths = shards(tmp_path, rows)
    iter_pairs(paths, entry("preference_parquet", num_rows=6, num_pairs=5, num_prompts=3), "set")
    with refused(f"some/file of owner/set, holds {said}", f"datasets.set.{key} expects {expected}", "fetch"):
        iter_pairs(paths, entry("preference_parquet", **{key: expected}), "set")


def test_the_published_counts_stand_in_the_entry():
    found = load({"scale": "paper"}).datasets["pickapic_v2"]
    assert (found.num_rows, found.num_pairs, found.num_prompts) == (959040, 851293, 58960)


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.large_string()])
def test_other_types_of_the_same_kind_give_the_same(tmp_path, kind):
    path = shards(tmp_path, [row(0, label_0=0.0, label_1=1.0), row(1), row(2, caption=None)], 1)[0]
    table = pq.read_table(path)
    names = ["caption"] if kind == pa.large_string() else ["label_0", "label_1"]
    for name in names:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, path)
    pairs = iter_pairs([path], entry("preference_parquet"), "set")
    assert [p.target == FIRST for p in pairs] == [False, True] and pairs.left_out == (2,)


# ---- what a table is told ----


def test_counts_of_a_set_become_a_note_under_the_table(tmp_path):
    rows = [row(0), row(1, label_0=0.5, label_1=0.5), row(2, caption=None), row(3, jpg_0=b"broken")]
    pairs = iter_pairs(shards(tmp_path, rows, 1), entry("preference_parquet"), "set")
    assert len(list(pairs)) == 1
    note = "2 training rows dropped (missing_caption 1, undecodable_image_0 1)"
    assert dropped_note({"data": pairs.counts.as_dict()}) == note
