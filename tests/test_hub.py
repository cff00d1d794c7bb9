"""The one door to files: folders outside of the hub, and digests of fetched files that are not read again."""

import json
import os

import pytest
from test_pairs import row, shards

from pso.entries import DatasetEntry
from pso.hub import Hub, recorded
from pso.pairs import pairs_of
from pso.provenance import UserError, sha256_of


@pytest.fixture
def hub(tmp_path):
    """One fetched repository whose step file tells a digest that only a reader of that file can know."""
    file = tmp_path / "me" / "model" / "weights.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"12345")
    step = tmp_path / "repositories" / "me--model.json"
    step.parent.mkdir()
    files = [{"file": "weights.bin", "size": 5, "sha256": "checked then"}]
    step.write_text(json.dumps({"job": "fetch", "revision": "0123abc", "files": files}))
    os.utime(file, ns=(0, step.stat().st_mtime_ns - 1))
    return Hub(tmp_path)


def digest(hub: Hub) -> str:
    hub.file("me/model", "weights.bin")
    return hub.inputs()[0]["sha256"]


def test_a_fetched_file_is_not_read_again(hub):
    assert digest(hub) == "checked then"
    assert hub.inputs()[0]["revision"] == "0123abc"


@pytest.mark.parametrize("change", ["later", "size", "unknown", "no step"])
def test_a_file_that_may_have_changed_is_read(hub, change):
    file, step = hub.root / "me" / "model" / "weights.bin", hub.root / "repositories" / "me--model.json"
    if change == "later":
        file.write_bytes(b"54321")  # the same size
    elif change == "size":
        file.write_bytes(b"1234567")
        os.utime(file, ns=(0, 0))
    elif change == "unknown":
        step.write_text(json.dumps({"files": []}))
    else:
        step.unlink()
    assert digest(hub) == sha256_of(file)
    assert "revision" not in hub.inputs()[0]  # the commit is not where these bytes are from


def test_a_link_into_an_emptied_cache_names_the_command_that_fetches_again(hub, tmp_path):
    """Of `snakemake hub` there would be nothing to be done."""
    hub.repo("me/model")
    place = hub.root / "me" / "model" / "weights.bin"
    place.unlink()
    place.symlink_to(tmp_path / "gone")
    said = r"^me/model in .* has no weights.bin any more \(1 of 1 files are gone\); `python -m pso.fetch --repo me/mod"
    with pytest.raises(UserError, match=said):
        Hub(hub.root).repo("me/model")
    with pytest.raises(UserError, match=said):
        Hub(hub.root).file("me/model", "other.bin")


def test_shards_of_a_fetched_set_are_told_as_they_were_checked(tmp_path):
    """Of 335 GB the digests are known, and run.json names their commit."""
    written = shards(tmp_path / "me/pairs", [row(n) for n in range(4)])
    files = [
        {"file": f"data/{path.name}", "size": path.stat().st_size, "sha256": f"checked {n}"}
        for n, path in enumerate(written)
    ]
    step = tmp_path / "repositories" / "me--pairs.json"
    step.parent.mkdir()
    step.write_text(json.dumps({"job": "fetch", "revision": "0123abc", "files": files}))
    for path in written:
        os.utime(path, ns=(0, step.stat().st_mtime_ns - 1))
    entry = DatasetEntry(format="preference_parquet", repo="me/pairs", files="data/*.parquet")
    pairs, inputs = pairs_of(Hub(tmp_path), entry, "set")
    assert [pairs.digest_of(n) for n in range(len(written))] == [f"checked {n}" for n in range(len(written))]
    assert inputs() == [
        {"repo": "me/pairs"} | {k: f[k] for k in ("file", "sha256")} | {"revision": "0123abc"} for f in files
    ]


def test_a_folder_of_ones_own_is_told_by_its_name_alone(tmp_path):
    folder = tmp_path / "secret" / "pickapic"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-0.parquet").write_bytes(b"x")
    entry = DatasetEntry(format="preference_parquet", repo=str(folder), files="data/*.parquet")
    hub = Hub(tmp_path / "nowhere")
    assert hub.files(entry.repo, entry.files) == [folder / "data" / "train-0.parquet"]
    told = json.dumps([hub.inputs(), recorded(entry)])
    assert "secret" not in told and '"repo": "pickapic"' in told
    with pytest.raises(UserError, match="is not a folder"):
        hub.files(str(tmp_path / "gone"), "*")


def test_two_folders_of_one_name_are_both_told(tmp_path):
    """Every run's LoRA lies in a folder called lora."""
    hub, written = Hub(tmp_path / "nowhere"), {}
    for content in "ab":
        file = tmp_path / content / "lora" / "w.bin"
        file.parent.mkdir(parents=True)
        file.write_text(content)
        written[hub.file(str(file.parent), "w.bin")] = sha256_of(file)
    assert hub.inputs() == [{"repo": "lora", "file": "w.bin", "sha256": sha256} for sha256 in written.values()]
