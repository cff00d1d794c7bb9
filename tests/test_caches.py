"""Raw pairs to latents: what cannot be used is counted and named, what is broken stops with a sentence."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run, smoke_settings
from PIL import Image
from safetensors.torch import load_file, save_file

from pso.caches import PairCache, build, fit
from pso.config import load
from pso.provenance import UserError, sha256_of

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
    assert own == {"file": "cache/sdxl_dmd2/pickapic_v2.safetensors", "sha256": sha256_of(file)}
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
