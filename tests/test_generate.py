"""Images of the evaluation: the same bytes under any order, sharding and restart; broken ones stop the table."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import smoke_settings
from PIL import Image

import eval.generate as generate_module
from eval.generate import Generator, blocks, generate, sample_block, wanted
from eval.score import score
from pso.config import load
from pso.data import Prompt, prompts_of
from pso.models import chain_for
from pso.provenance import UserError
from pso.runs import Job, jobs

JOB = Job("preference", "sdxl_dmd2", "untuned", 0, "pickapic_test", 4)


def config(**overrides):
    return load(json.loads(smoke_settings(**overrides)))


@pytest.fixture(scope="module")
def generator(smoke):
    return Generator(config(), "sdxl_dmd2", smoke / "results")


def pixels(generator, job: Job) -> dict[str, bytes]:
    folder = job.images("smoke", generator.results)
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("shard*.parquet"))]
    return {row["image_id"]: row["png"] for table in tables for row in table}


def remade(generator, with_hub, **changes) -> dict[str, bytes]:
    """The images of JOB made anew in an empty folder, with attributes of the generator changed."""
    kept = {name: getattr(generator, name) for name in ["results", *changes]}
    try:
        generator.results = with_hub
        for name, value in changes.items():
            setattr(generator, name, value)
        generator.run(JOB)
        return pixels(generator, JOB)
    finally:
        for name, value in kept.items():
            setattr(generator, name, value)


def test_the_order_of_the_prompt_file_does_not_matter(generator, with_hub, smoke):
    prompts = generator.eval_set("pickapic_test")
    shuffled = random.Random(1).sample(prompts, len(prompts))
    assert shuffled != prompts
    again = remade(generator, with_hub, prompts={"pickapic_test": shuffled})
    assert again == pixels(generator, JOB)


@pytest.mark.parametrize("shard_blocks", [1, 2])
def test_sharding_does_not_matter(shard_blocks, generator, with_hub, monkeypatch):
    monkeypatch.setattr(generate_module, "SHARD_BLOCKS", shard_blocks)
    small = config(eval_batch=2)  # three blocks of six images
    one = remade(generator, with_hub, config=small)
    monkeypatch.setattr(generate_module, "SHARD_BLOCKS", 8)
    folder = JOB.images("smoke", with_hub)
    assert len(list(folder.glob("shard*.parquet"))) == -(-3 // shard_blocks)
    assert remade(generator, with_hub, config=small) == one
    assert len(list(folder.glob("shard*.parquet"))) == 1  # what the other sharding left is gone


def test_a_restart_makes_only_what_is_missing_and_the_same_bytes(generator, with_hub, monkeypatch):
    monkeypatch.setattr(generate_module, "SHARD_BLOCKS", 1)
    small = config(eval_batch=2)
    first = remade(generator, with_hub, config=small)
    lost = JOB.images("smoke", with_hub) / "shard1.parquet"
    lost.unlink()
    made = generator.made
    assert remade(generator, with_hub, config=small) == first
    assert generator.made - made == 2


def test_other_batch_shapes_agree_to_one_grey_level(generator, with_hub):
    other = remade(generator, with_hub, config=config(eval_batch=5))
    for name, data in pixels(generator, JOB).items():
        a, b = (np.asarray(Image.open(io.BytesIO(d))).astype(int) for d in (data, other[name]))
        assert np.abs(a - b).max() <= 1


def test_a_block_depends_on_nothing_outside_it(generator):
    chain = chain_for("sdxl_dmd2", generator.entry, 4)
    images = wanted(generator.eval_set("pickapic_test"), 1, 0)
    torch.manual_seed(1)
    first = sample_block(generator.policy, chain, images[:2], 4, generator.texts.rows)
    torch.manual_seed(2)  # the global stream must not be used
    second = sample_block(generator.policy, chain, images[:2], 4, generator.texts.rows)
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]


def test_noise_belongs_to_prompt_and_seed():
    prompts = prompts_of(["a", "b"])
    found = wanted(prompts, 2, 5)
    assert found == sorted(found) and {w.image_seed for w in found} == {5, 6}
    assert len({w.key for w in found}) == 4
    assert wanted([Prompt("x", "other text")], 1, 0)[0].key == ("eval", 0, "x")
    assert [len(b) for b in blocks(found, 3)] == [3, 1]


def test_every_image_is_listed_once_with_its_sha256(smoke):
    manifest = json.loads((smoke / "results/smoke/preference/sdxl_dmd2/images.json").read_text())
    assert len(manifest["images"]) == len(jobs(config(), "sdxl_dmd2")) == 26  # 13 rows, 2 eval sets
    for entry in manifest["images"]:
        assert sum(s["images"] for s in entry["shards"]) == 6
        assert all(len(s["sha256"]) == 64 for s in entry["shards"])
    assert manifest["cost"]["unet_forwards"] == 26 * 8 * 4  # runs x padded batch x steps


def test_a_changed_lora_makes_new_images(generator, with_hub, monkeypatch):
    tuned = Job("preference", "sdxl_dmd2", "pso_offline", 0, "pickapic_test", 4)
    source = generator.source(tuned, blocks(wanted(generator.eval_set("pickapic_test"), 1, 0), 8))
    monkeypatch.setattr(generate_module, "sha256_of", lambda path: "0" * 64)
    other = generator.source(tuned, blocks(wanted(generator.eval_set("pickapic_test"), 1, 0), 8))
    assert {k for k in source if source[k] != other[k]} == {"lora"}


# ---- a missing or broken image stops the table ----


@pytest.fixture
def images(smoke, with_hub):
    """The smoke run's images and LoRAs, to be damaged."""
    import shutil

    shutil.copytree(smoke / "results/smoke/preference", with_hub / "smoke" / "preference")
    (with_hub / "smoke/preference/sdxl_dmd2/scores.json").unlink()
    return with_hub


def shard(results):
    return JOB.images("smoke", results) / "shard0.parquet"


def test_a_missing_shard_stops_scoring(images):
    shard(images).unlink()
    with pytest.raises(
        UserError, match=r"is listed in images.json but is not there; make it again with .python -m eval"
    ):
        score(config(), "sdxl_dmd2", images)
    assert not (images / "smoke/preference/sdxl_dmd2/scores.json").exists()


def test_a_changed_shard_stops_scoring(images):
    table = pq.read_table(shard(images))
    pq.write_table(table.slice(1), shard(images))
    with pytest.raises(UserError, match="its sha256 differs"):
        score(config(), "sdxl_dmd2", images)


def test_undecodable_bytes_stop_scoring(images):
    table = pq.read_table(shard(images))
    broken = [b"not a png", *table["png"].to_pylist()[1:]]
    pq.write_table(table.set_column(4, "png", pa.array(broken, pa.binary())), shard(images))
    manifest = images / "smoke/preference/sdxl_dmd2/images.json"
    content = json.loads(manifest.read_text())
    for entry in content["images"]:
        for listed in entry["shards"]:
            path = images / "smoke" / listed["file"]
            listed["sha256"] = generate_module.sha256_of(path)
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be decoded"):
        score(config(), "sdxl_dmd2", images)


def test_a_missing_lora_is_named_with_the_command(images):
    (images / "smoke/preference/sdxl_dmd2/pso_offline/seed0/lora/pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"is missing; `python -m pso.tune --model sdxl_dmd2 --method pso_offline"):
        generate(config(), "sdxl_dmd2", images)
