"""Conversion in parts: what is there is kept, what is damaged or of other settings is made anew, bad rows replaced."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import entry, refused
from test_pairs import row, shards

from pso import parts
from pso.pairs import iter_pairs
from pso.parts import Parts, convert, convert_texts
from pso.visits import Plan, pair_indices

ROWS = 60
SECOND = "train-00001-of-00002.1.safetensors"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number, number, number)).save(file, "PNG")
    return file.getvalue()


def rows_of(changes: dict[int, dict] | None = None) -> list[dict]:
    rows = [row(n, jpg_0=picture(2 * n), jpg_1=picture(2 * n + 1)) for n in range(ROWS)]
    return [one | (changes or {}).get(n, {}) for n, one in enumerate(rows)]


class Encoder:
    """Grey values of both pictures; stops like a killed job before batch number `end`."""

    def __init__(self, end: int | None = None):
        self.seen, self.calls, self.end = [], 0, end

    def __call__(self, visits):
        if self.calls == self.end:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += [visit.position for visit in visits]
        grey = torch.tensor([[float(p) for p in visit.pictures] for visit in visits])
        return {"target": grey[:, :1], "reference": grey[:, 1:]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 64)  # two batches of 4 pairs
    shards(tmp_path, rows_of())
    return tmp_path


def run(folder, encoder, plan=None, settings="one", changes=None):
    if changes is not None:
        shards(folder, rows_of(changes))
    pairs = iter_pairs((folder / "data").glob("*.parquet"), entry("preference_parquet"), "set")
    found = convert(pairs, plan, folder / "parts", settings, lambda image: image.getpixel((0, 0))[0], encoder, 4)
    return pairs, *found


def values(folder, places, listed):
    kept = np.flatnonzero(places[:, 0] >= 0)
    made = Parts(folder / "parts", listed, "make it")
    both = [made.rows(side, torch.from_numpy(places[kept]))[:, 0].tolist() for side in ("target", "reference")]
    return dict(zip(kept.tolist(), zip(*both, strict=True), strict=True))


def expected(positions) -> dict:
    return {p: (2.0 * p, 2.0 * p + 1) for p in sorted(positions)}  # row() prefers picture 0


def test_every_pair_lies_where_its_place_says(folder):
    _, places, listed = run(folder, Encoder())
    assert values(folder, places, listed) == expected(range(ROWS))
    assert len(listed) == 8 and all(name.startswith("train-0000") for name in listed)


@pytest.mark.parametrize("end", [1, 2, 5, 8, 14])
def test_a_killed_conversion_goes_on_and_ends_as_one_in_a_go(folder, end):
    first, second = Encoder(end), Encoder()
    with pytest.raises(KeyboardInterrupt):
        run(folder, first)
    kept = sum(len(parts.Part(path)) for path in (folder / "parts").glob("*.safetensors"))
    _, places, listed = run(folder, second)
    assert len(second.seen) == ROWS - kept and kept == 8 * (end // 2) - (2 if end >= 8 else 0)
    assert not set(second.seen) & (set(first.seen[:kept]))
    contents = {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}
    (folder / "parts").rename(folder / "killed")
    _, in_a_go, listed_in_a_go = run(folder, Encoder())
    assert (places == in_a_go).all() and listed == listed_in_a_go
    assert contents == {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}


def test_a_longer_plan_encodes_what_is_new_alone(folder):
    run(folder, Encoder(), Plan({0: 10}))
    second, third = Encoder(), Encoder()
    _, places, listed = run(folder, second, Plan({0: 25}))
    order = pair_indices(0, 25, ROWS, 0)
    assert sorted(second.seen) == sorted(order[10:])
    assert values(folder, places, listed) == expected(order)
    _, fewer, listed = run(folder, third, Plan({0: 10}))
    assert third.seen == [] and values(folder, fewer, listed) == expected(order[:10])


def test_other_settings_and_other_rows_are_made_anew(folder):
    run(folder, Encoder())
    other, same, changed = Encoder(), Encoder(), Encoder()
    run(folder, other, settings="two")
    run(folder, same, settings="two")
    assert (len(other.seen), same.seen) == (ROWS, [])
    _, places, listed = run(folder, changed, settings="two", changes={40: {"jpg_0": picture(200)}})
    assert changed.seen == list(range(30, 60))  # the shard in which it lies
    assert values(folder, places, listed)[40] == (200.0, 81.0)
    assert len(list((folder / "parts").iterdir())) == len(listed) == 8


def flip(path, tensor: str):
    """One bit of a tensor's last value."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + size])[tensor]["data_offsets"]
    content[8 + size + end - 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a value": (lambda path: flip(path, "target"), "is damaged"),
    "its end": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    "all": (lambda path: path.unlink(), "is missing"),
    "its head": (lambda path: path.write_bytes(b"[]" * 90), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_told_and_made_anew(folder, damage):
    _, places, listed = run(folder, Encoder())
    change, said = DAMAGES[damage]
    change(folder / "parts" / SECOND)
    with refused(f"{SECOND} {said}", "`make it` makes it anew"):
        values(folder, places, listed)
    again = Encoder()
    _, places, listed = run(folder, again)
    assert again.seen == list(range(38, 46)) and values(folder, places, listed) == expected(range(ROWS))


@pytest.mark.parametrize("tensor", ["row", "target.crc"])
def test_a_damage_beside_the_values_is_found_when_the_conversion_goes_on(folder, tensor):
    run(folder, Encoder())
    flip(folder / "parts" / SECOND, tensor)
    again = Encoder()
    run(folder, again)
    assert again.seen == list(range(38, 46))


def test_parts_of_another_age_are_not_read(folder):
    _, places, listed = run(folder, Encoder())
    run(folder, Encoder(), settings="two")
    with refused("is of another age than the file that lists it"):
        values(folder, places, listed)


def test_rows_that_cannot_be_used_are_replaced_by_the_next_in_the_order(folder):
    order = pair_indices(0, ROWS, ROWS, 0)
    bad = {order[1]: {"jpg_0": b"no picture"}, order[4]: {"caption": None}, order[7]: {"label_1": 1.0}}
    bad |= {order[8]: {"jpg_1": None}, order[40]: {"jpg_1": None}}  # the last is not visited
    encoder = Encoder()
    pairs, places, listed = run(folder, encoder, Plan({0: 8}), changes=bad)
    visited = [p for p in order if p not in bad][:8]
    assert values(folder, places, listed) == expected(visited) and sorted(encoder.seen) == sorted(visited)
    assert pairs.left_out == tuple(sorted(order[k] for k in (1, 4, 7, 8)))
    assert [i for u in range(2) for i in pair_indices(u, 4, ROWS, 0, pairs.left_out)] == visited
    dropped = {name: count for name, count in pairs.counts.dropped.items() if count}
    assert dropped == {"bad_label": 1, "missing_caption": 1, "undecodable_image_0": 1, "missing_image_1": 1}
    told = {(name, number) for name, number, _ in pairs.quarantine}
    shard = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    assert told == {(shard[p // 30], p % 30) for p in pairs.left_out}
    again, same, listed_again = run(folder, Encoder(), Plan({0: 8}))
    assert again.left_out == pairs.left_out and (same == places).all() and listed_again == listed


def test_texts_are_kept_in_parts_too(tmp_path):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return {"hidden": torch.tensor([[len(text)] for text in texts], dtype=torch.bfloat16)}

    texts = ["a" * k for k in range(1, 8)]
    places, listed = convert_texts(texts, tmp_path, "s", encode, 3)
    assert Parts(tmp_path, listed, "x").rows("hidden", torch.from_numpy(places))[:, 0].tolist() == list(range(1, 8))
    assert len(listed) == 3 and asked == texts
    convert_texts([*texts, "b"], tmp_path, "s", encode, 3)
    assert asked == [*texts, "a" * 7, "b"]  # the last part alone
    convert_texts(texts[:3], tmp_path, "s", encode, 3)
    assert len(list(tmp_path.iterdir())) == 1 and len(asked) == 9
