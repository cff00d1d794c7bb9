"""Raw pairs to latents: what cannot be used is counted and named, what is broken stops with a sentence."""

import json
import os
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run, smoke_settings
from PIL import Image
from safetensors.torch import load_file, save_file

from pso.caches import PairCache, build, cache_file, fit
from pso.config import load
from pso.policy import Conditioning
from pso.provenance import UserError, sha256_of
from pso.sources import Given, PreferencePairs
from pso.tune import lasting
from pso.visits import pair_indices

SHARD = "yuvalkirstain/pickapic_v2/data/train-00000-of-00002.parquet"


def config():
    return load(json.loads(smoke_settings()))


@pytest.fixture
def own_hub(smoke, tmp_path):
    """A results folder whose hub's pairs may be damaged."""
    source, hub = smoke / "results/smoke/hub", tmp_path / "smoke/hub"
    hub.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "yuvalkirstain":
            (hub / path.name).symlink_to(path)
    shutil.copytree(source / "yuvalkirstain", hub / "yuvalkirstain")
    return tmp_path


def test_the_cache_holds_every_decided_pair_once(smoke):
    cache = PairCache("smoke", "sdxl_dmd2", "pickapic_v2", smoke / "results")
    assert len(cache) == cache.counts["pairs"] == 60 - sum(cache.counts["dropped"].values())
    assert cache.prompt_index.max() == len(cache.prompts) - 1
    mean, std = cache.latents("target", [0, 1, 2])
    assert mean.shape == std.shape == (3, 12, 8, 8) and (std > 0).all()
    assert not torch.equal(mean, cache.latents("reference", [0, 1, 2])[0])


def test_undecodable_images_are_quarantined_and_counted(own_hub):
    path = own_hub / "smoke/hub" / SHARD
    table = pq.read_table(path)
    labels = table["label_0"].to_pylist()
    row = next(i for i, label in enumerate(labels) if label != 0.5)
    images = table["jpg_1"].to_pylist()
    images[row] = b"\x89PNG but not really"
    place = table.column_names.index("jpg_1")
    pq.write_table(table.set_column(place, "jpg_1", pa.array(images, pa.binary())), path)
    build(config(), "sdxl_dmd2", "pickapic_v2", own_hub)
    about = json.loads((own_hub / "smoke/cache/sdxl_dmd2/pickapic_v2.json").read_text())
    assert about["counts"]["dropped"]["undecodable_image_1"] == 1
    assert len(about["quarantine"]) == 1 and SHARD.rsplit("/", 1)[1] in str(about["quarantine"][0])
    assert about["counts"]["pairs"] == 60 - sum(about["counts"]["dropped"].values())


def test_a_corrupt_parquet_is_one_sentence_and_leaves_nothing(own_hub):
    path = own_hub / "smoke/hub" / SHARD
    path.write_bytes(path.read_bytes()[:2000])
    done = run(
        "python", "-m", "pso.caches", "--model", "sdxl_dmd2", "--dataset", "pickapic_v2", "--results", str(own_hub),
        "--set", smoke_settings(),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("latents: ") and path.name in done.stderr
    assert not (own_hub / "smoke/cache").exists()


def test_a_missing_cache_names_its_command(tmp_path):
    with pytest.raises(UserError, match="`python -m pso.caches --model sdxl_dmd2 --dataset pickapic_v2` makes it"):
        PairCache("smoke", "sdxl_dmd2", "pickapic_v2", tmp_path)


def test_a_cache_tells_itself_and_what_it_was_made_from(smoke):
    cache = PairCache("smoke", "sdxl_dmd2", "pickapic_v2", smoke / "results")
    own, *behind = cache.inputs
    file = smoke / "results/smoke" / own["file"]
    made_from = json.loads(file.with_suffix(".json").read_text())["made_from"]
    told = {"file": "cache/sdxl_dmd2/pickapic_v2.safetensors", "sha256": sha256_of(file), "made_from": made_from}
    assert own == told
    repositories = {entry["repo"] for entry in behind}
    assert {"yuvalkirstain/pickapic_v2", "madebyollin/sdxl-vae-fp16-fix"} <= repositories


DAMAGES = {  # name: what happens to the pair of files, what is said
    "tensors cut": (lambda tensors, about: tensors.write_bytes(tensors.read_bytes()[:500]), "cannot be read"),
    "record cut": (lambda tensors, about: about.write_text(about.read_text()[:500]), "cannot be read"),
    "record gone": (lambda tensors, about: about.unlink(), "cannot be read"),
    "other tensors": (lambda tensors, about: save_file(other(tensors), tensors), "its sha256 differs"),
}


def other(tensors) -> dict:
    return {name: value + 1 for name, value in load_file(tensors).items()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_one_sentence_with_its_command(smoke, tmp_path, damage):
    change, said = DAMAGES[damage]
    shutil.copytree(smoke / "results/smoke/cache", tmp_path / "smoke/cache")
    files = [tmp_path / f"smoke/cache/sdxl_dmd2/pickapic_v2.{kind}" for kind in ("safetensors", "json")]
    change(*files)
    with pytest.raises(UserError) as caught:
        PairCache("smoke", "sdxl_dmd2", "pickapic_v2", tmp_path)
    text = str(caught.value)
    assert text.startswith(str(files[0])) and said in text and "\n" not in text
    assert "`python -m pso.caches --model sdxl_dmd2 --dataset pickapic_v2` makes it anew" in text


@pytest.mark.parametrize("size", [(64, 64), (90, 40), (33, 70)])
def test_pictures_are_cropped_to_the_centre(size):
    image = Image.new("RGB", size, "red")
    assert fit(image, 32).size == (32, 32)


# ---- as at paper scale: only what is visited, half precision, files mapped ----

FEW = {"num_updates": 3, "batch_size": 4, "probe_prompts": 2}


def paper(table: str = "table1", judge: bool = True, seeds=(0,)):
    counts = {"num_rows": None, "num_pairs": None, "num_prompts": None}
    methods = {name: {"tune": FEW} for name, method in load().methods.items() if method.data == "pickapic_v2"}
    scales = {"paper": {"preference_model": {"num_pairs": 2} if judge else None, "default_tables": [table]}}
    models = {"sdxl_dmd2": {"resolution": 32}}
    return load(
        {
            "scale": "paper",
            "tables": [table],
            "seeds": list(seeds),
            "datasets": {"pickapic_v2": counts},
            "methods": methods,
        }
        | {"models": models, "scales": scales}
    )


@pytest.fixture
def paper_hub(smoke, tmp_path):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/hub").symlink_to(smoke / "results/smoke/hub", target_is_directory=True)
    return tmp_path


@pytest.fixture
def visited(paper_hub):
    build(paper(), "sdxl_dmd2", "pickapic_v2", paper_hub)
    return PairCache("paper", "sdxl_dmd2", "pickapic_v2", paper_hub)


def test_a_published_set_is_kept_as_far_as_it_is_visited_in_half_precision(visited, smoke):
    whole = PairCache("smoke", "sdxl_dmd2", "pickapic_v2", smoke / "results")  # all pairs
    count = len(whole)
    order = [i for update in range(3) for i in pair_indices(update, 4, count, 0)]
    kept = (visited.places[:, 0] >= 0).nonzero()[:, 0].tolist()
    assert len(visited) == count and kept == sorted({*order, 0, 1})  # and the preference model's two
    assert visited.prompts == whole.prompts and torch.equal(visited.prompt_index, whole.prompt_index)
    for side in ("target", "reference"):
        mine, theirs = visited.latents(side, order[4:8]), whole.latents(side, order[4:8])
        for one, other in zip(mine, theirs, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one.half().float(), one)
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)  # bfloat16 network
    other = next(i for i in range(count) if i not in kept)
    with pytest.raises(UserError, match="the cached latents lack a pair of .*`python -m pso.caches --model sdxl_dmd2"):
        visited.latents("target", [order[0], other])


def test_a_run_whose_pairs_are_not_there_ends_before_it_begins(visited):
    visited.require(0, 12)
    with pytest.raises(UserError, match=r"lacks \d+ of 16 pairs that 16 visits with seed 0 need; `python -m"):
        visited.require(0, 16)
    with pytest.raises(UserError, match="with seed 5 need"):
        visited.require(5, 12)


def test_text_conditions_are_read_by_the_row(visited, smoke):
    whole = PairCache("smoke", "sdxl_dmd2", "pickapic_v2", smoke / "results").condition("cpu")
    mine = visited.condition("cpu")
    kept = (visited.text_places[:, 0] >= 0).nonzero()[:, 0]
    assert 2 < len(kept) < len(visited.prompts) == len(mine)
    assert set(visited.prompt_index[visited.places[:, 0] >= 0].tolist()) <= set(kept.tolist())
    asked = kept[[1, 0, 1, 2]]
    one, other = mine.rows(asked), whole.rows(asked)
    assert one.hidden.dtype == torch.bfloat16 and one.hidden.shape == other.hidden.shape
    torch.testing.assert_close(one.pooled.float(), other.pooled, rtol=0.05, atol=0.1)
    assert torch.equal(one.hidden[0], one.hidden[2]) and not torch.equal(one.hidden[0], one.hidden[1])
    empty = Conditioning(torch.zeros_like(one.hidden[:1]), torch.ones_like(one.pooled[:1]))
    more = mine.followed_by(empty)
    mixed = more.rows(torch.tensor([len(more) - 1, int(kept[0])]))
    assert len(more) == len(mine) + 1
    assert torch.equal(mixed.pooled[0], empty.pooled[0]) and torch.equal(mixed.hidden[1], one.hidden[1])
    absent = next(i for i in range(len(mine)) if i not in kept)
    with pytest.raises(UserError, match="a prompt of this run has no cached text condition; `python -m pso.caches"):
        mine.rows(torch.tensor([absent]))


def test_pairs_that_no_table_needs_are_not_kept(paper_hub):
    with pytest.raises(UserError, match="no row of table2 needs pairs of pickapic_v2 for sdxl_dmd2, so none would"):
        build(paper("table2", judge=False), "sdxl_dmd2", "pickapic_v2", paper_hub)


def test_a_picture_that_cannot_be_used_is_replaced_in_the_training_order(own_hub):
    path = own_hub / "smoke/hub" / SHARD
    table = pq.read_table(path)
    row = next(i for i, label in enumerate(table["label_0"].to_pylist()) if label != 0.5)
    images = table["jpg_0"].to_pylist()
    images[row] = None
    pq.write_table(table.set_column(table.column_names.index("jpg_0"), "jpg_0", pa.array(images, pa.binary())), path)
    build(config(), "sdxl_dmd2", "pickapic_v2", own_hub)
    cache = PairCache("smoke", "sdxl_dmd2", "pickapic_v2", own_hub)
    assert cache.left_out == (0,) and len(cache) == cache.counts["pairs"] + 1
    given = Given(None, None, None, 0, 8, cache)
    seen = [PreferencePairs.samples(SimpleNamespace(given=given), update) for update in range(len(cache))]
    assert all(len(batch) == 8 for batch in seen) and 0 not in {i for batch in seen for i in batch}
    cache.latents("target", seen[0])


def test_parquet_files_of_ones_own_lie_where_one_likes_and_their_place_is_not_told(smoke, tmp_path):
    (tmp_path / "results/smoke").mkdir(parents=True)
    (tmp_path / "results/smoke/hub").symlink_to(smoke / "results/smoke/hub", target_is_directory=True)
    shutil.copytree(smoke / "results/smoke/hub/yuvalkirstain/pickapic_v2", tmp_path / "mine")
    own = {"pickapic_v2": {"repo": str(tmp_path / "mine")}}
    build(load({"scale": "smoke", "datasets": own}), "sdxl_dmd2", "pickapic_v2", tmp_path / "results")
    about = (tmp_path / "results/smoke/cache/sdxl_dmd2/pickapic_v2.json").read_text()
    told = {entry["repo"]: entry["file"] for entry in json.loads(about)["inputs"]}
    assert str(tmp_path) not in about and told["mine"] == "data/train-00001-of-00002.parquet"
    found, whole = (
        PairCache("smoke", "sdxl_dmd2", "pickapic_v2", r) for r in (tmp_path / "results", smoke / "results")
    )
    assert torch.equal(found.latents("target", [3])[0], whole.latents("target", [3])[0])


def test_one_more_seed_adds_its_pairs_and_leaves_finished_runs_alone(visited, paper_hub):
    path = cache_file("paper", "sdxl_dmd2", "pickapic_v2", paper_hub)
    parts = {part.name: part.stat().st_mtime_ns for part in (path.with_suffix("") / "pairs").iterdir()}
    os.utime(path, ns=(10**18, 10**18))
    build(paper(seeds=(0, 1)), "sdxl_dmd2", "pickapic_v2", paper_hub)
    grown = PairCache("paper", "sdxl_dmd2", "pickapic_v2", paper_hub)
    grown.require(0, 12), grown.require(1, 12)
    assert (grown.places[:, 0] >= 0).sum() > (visited.places[:, 0] >= 0).sum()
    order = pair_indices(0, 12, len(grown), 0)
    assert torch.equal(grown.latents("target", order)[0], visited.latents("target", order)[0])
    assert all((path.with_suffix("") / "pairs" / name).stat().st_mtime_ns == written for name, written in parts.items())
    assert path.stat().st_mtime_ns == 10**18  # Snakemake would train again what is older than its input
    assert grown.inputs[0]["sha256"] != visited.inputs[0]["sha256"]
    # and an interrupted run would not go on, though it finds the same pairs
    before, now = (
        lasting(cache.inputs, SimpleNamespace(pairs=cache, prompts=cache.prompts)) for cache in (visited, grown)
    )
    assert before == now
    config = paper()
    exact = config.scale_entry.model_copy(update={"dtype": "float32"})
    build(config.model_copy(update={"scale_entry": exact}), "sdxl_dmd2", "pickapic_v2", paper_hub)
    assert path.stat().st_mtime_ns > 10**18
    other = PairCache("paper", "sdxl_dmd2", "pickapic_v2", paper_hub)
    assert lasting(other.inputs, SimpleNamespace(pairs=other, prompts=other.prompts)) != now
