"""Text conditions that are made once: each text alone and once, whatever is beside it; a warm run encodes nothing."""

import io
import json
import os
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import test_score
import torch
import toy
from PIL import Image
from toy import quiet  # noqa: F401

import eval.generate as generate_module
from pso import texts, training_data
from pso.background import Behind
from pso.checks import PAIRS
from pso.config import load
from pso.data import prompts_of
from pso.entries import UNTUNED
from pso.hub import Hub, hub_dir
from pso.paths import texts_file
from pso.policy import Policy
from pso.provenance import UserError
from pso.runs import jobs
from pso.sources import Given, Targets
from pso.texts import KeptTexts
from pso.tune import inputs_of, lasting
from pso.visits import bases, reads_texts, text_sets

MODEL = test_score.MODEL
CONFIG = test_score.config()
BASE = CONFIG.models[MODEL].base
WEIGHTS = "text_encoder/model.safetensors"
PROMPTS = ["b", "a red circle", "c" * 300]
COMMAND = f"`python -m pso.texts --model {MODEL}`"


class Encoders:
    """The toy's text encoders; `calls`: what each call was given, `end`: after how many one is killed."""

    calls, end = [], None

    def __init__(self, hub, base, dtype):
        self.policy = toy.new_policy(None)
        hub.file(base, WEIGHTS)

    def encode_prompts(self, prompts):
        if len(self.calls) == self.end:
            raise KeyboardInterrupt
        self.calls.append(prompts)
        return self.policy.encode_prompts(prompts)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with a hub, in which `build` makes the conditions of what `wanted` says."""
    path = hub_dir("smoke", tmp_path) / BASE / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    monkeypatch.setattr(Encoders, "calls", [])
    monkeypatch.setattr(Encoders, "end", None)
    monkeypatch.setattr(texts, "TextEncoders", Encoders)
    return tmp_path


def build(results, *prompts: str, config=CONFIG) -> list[list[str]]:
    """What was encoded for it."""
    Encoders.calls.clear()
    with patch.object(texts, "texts_of", lambda *_: sorted({"", *prompts})):
        texts.build(config, MODEL, results)
    return list(Encoders.calls)


def kept(results, config=CONFIG) -> KeptTexts:
    return KeptTexts(config, MODEL, Hub(hub_dir("smoke", results)), results)


def same(one, other) -> bool:
    return torch.equal(one.hidden, other.hidden) and torch.equal(one.pooled, other.pooled)


# ---- the file ----


def test_every_text_is_encoded_once_and_alone_and_read_as_it_was_encoded(results):
    assert sorted(build(results, *PROMPTS)) == sorted([text] for text in ["", *PROMPTS])
    policy, found = toy.new_policy(None), kept(results)
    asked = [PROMPTS[1], "", PROMPTS[1], PROMPTS[2]]
    whole = found.rows(asked, "cpu")
    assert len(whole) == 4
    for row, text in enumerate(asked):
        assert same(whole.rows([row]), policy.encode_prompts([text]))
    assert not same(whole.rows([0]), whole.rows([1]))
    assert same(found.condition(PROMPTS, "cpu").rows(torch.tensor([2, 0])), found.rows([PROMPTS[2], PROMPTS[0]], "cpu"))


def test_more_texts_only_add_and_change_no_bit_of_the_others(results):
    build(results, *PROMPTS)
    path = texts_file("smoke", BASE, results)
    os.utime(path, ns=(10**18, 10**18))
    parts = {part: part.stat().st_mtime_ns for part in path.with_suffix("").iterdir()}
    before = kept(results).rows(PROMPTS, "cpu")
    assert build(results, "a first one", *PROMPTS, "z") == [["a first one"], ["z"]]
    assert {part: part.stat().st_mtime_ns for part in parts} == parts
    assert path.stat().st_mtime_ns == 10**18  # of a file that has only grown
    after = kept(results)
    assert same(after.rows(PROMPTS, "cpu"), before)
    assert build(results, "z", PROMPTS[0]) == []  # of fewer tables: nothing is made
    assert build(results, *PROMPTS, "z") == []
    alone = kept(results).rows(["z"], "cpu")
    other = results / "other"
    (other / "smoke").mkdir(parents=True)
    (other / "smoke/hub").symlink_to(results / "smoke/hub")
    build(other, "z")
    assert same(kept(other).rows(["z"], "cpu"), alone)  # whatever else was asked for


def test_other_encoders_or_another_dtype_make_all_of_it_anew(results):
    build(results, *PROMPTS)
    half = CONFIG.model_copy(update={"scale_entry": CONFIG.scale_entry.model_copy(update={"dtype": "bfloat16"})})
    assert len(build(results, *PROMPTS, config=half)) == len(PROMPTS) + 1
    (hub_dir("smoke", results) / BASE / WEIGHTS).write_bytes(b"others")
    assert len(build(results, *PROMPTS, config=half)) == len(PROMPTS) + 1


@pytest.mark.parametrize("end", [1, 2, 3, 4])
def test_a_killed_job_goes_on_after_its_last_part(results, monkeypatch, end):
    monkeypatch.setattr(texts, "PART", 2)
    monkeypatch.setattr(Encoders, "end", end)
    prompts = [*PROMPTS, "d", "e"]  # and the empty one
    with pytest.raises(KeyboardInterrupt):
        build(results, *prompts)
    assert not texts_file("smoke", BASE, results).exists()
    monkeypatch.setattr(Encoders, "end", None)
    assert len(build(results, *prompts)) == 6 - end // 2 * 2
    found, policy = kept(results).rows(prompts, "cpu"), toy.new_policy(None)
    assert all(same(found.rows([k]), policy.encode_prompts([text])) for k, text in enumerate(prompts))


def test_what_is_missing_or_stale_is_a_sentence_with_the_command(results):
    with pytest.raises(UserError, match=f"is missing; {COMMAND} makes it."):
        kept(results)
    build(results, *PROMPTS)
    with pytest.raises(UserError, match=f"no text condition of 'new' .1 of 2 prompts are not there.; {COMMAND} adds"):
        kept(results).rows(["b", "new"], "cpu")
    half = CONFIG.model_copy(update={"scale_entry": CONFIG.scale_entry.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(UserError, match=f"another dtype than bfloat16; {COMMAND} makes it anew"):
        kept(results, half)
    (hub_dir("smoke", results) / BASE / WEIGHTS).write_bytes(b"others")
    with pytest.raises(UserError, match=f"was made by other text encoders than those of the hub .*; {COMMAND} makes"):
        kept(results)


# ---- which texts ----


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_the_sets_of_a_base_are_all_that_its_jobs_read_beside_pairs(scale):
    config = load({"scale": scale})
    assert bases(config) == ["stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"]
    for base in bases(config):
        found = text_sets(config, base)
        assert len(set(found)) == len(found)
        for job in (job for job in jobs(config) if config.models[job.model].base == base):
            assert (job.eval_set, job.subject or "") in found
            if job.method != UNTUNED and config.datasets[config.methods[job.method].data].format not in PAIRS:
                data = config.methods[job.method].data
                assert (data, job.subject or "") in found or (data, "") in found
    assert text_sets(config.model_copy(update={"tables": ["table1"]}), BASE) == [
        ("parti_prompts", ""), ("pickapic_test", ""), ("training_prompts_4k", ""),
    ]  # fmt: skip


def test_runs_on_pairs_read_them_only_for_the_empty_caption():
    config = load({"scale": "paper"})
    found = {name: reads_texts(config, entry) for name, entry in config.methods.items()}
    assert found["pso_online"] and found["dreambooth"] and found["spo_adapted"] and not found["pso_offline"]
    dropping = {n for n, e in config.methods.items() if e.objective.get("caption_dropout")}
    assert dropping and all(found[name] for name in dropping)


def test_texts_are_those_of_the_files_and_of_subjects(tmp_path):
    config = load({"scale": "smoke", "tables": ["table3"]})
    one = SimpleNamespace(prompts=lambda: ["on a beach", "in snow"], instance_prompt="a photo of [V] circle")
    with (
        patch.object(texts, "load_subject", lambda hub, entry, name, subject: one),
        patch.object(texts, "load_prompt_set", lambda *_: prompts_of(["x", "y", "x"])),
    ):
        found = texts.texts_of(config, "stabilityai/sdxl-turbo", None)
    assert found == sorted({"", "on a beach", "in snow", "a photo of [V] circle"})


# ---- a warm run ----


@pytest.fixture
def counted(monkeypatch):
    """Calls of a policy's encoders."""
    seen = []
    for name in ("encode_prompts", "encode_images"):
        plain = getattr(Policy, name)

        def counting(self, *arguments, name=name, plain=plain, **more):
            seen.append(name)
            return plain(self, *arguments, **more)

        monkeypatch.setattr(Policy, name, counting)
    return seen


@pytest.fixture
def drawing(results, monkeypatch):
    """Generation with the toy policy on three prompts."""
    policy = toy.new_policy(None)
    monkeypatch.setattr(generate_module, "load_policy", lambda *args, **more: policy)
    monkeypatch.setattr(generate_module, "eval_prompts", lambda hub, entry, name, subject: prompts_of(PROMPTS, name))
    return results


def pictures(results) -> dict[str, bytes]:
    rows = [row for path in results.rglob("shard*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["image_id"]: row["png"] for row in rows}


def test_a_warm_generation_encodes_nothing_and_a_cold_one_names_the_command(drawing, counted):
    build(drawing, *PROMPTS)
    counted.clear()
    generate_module.generate(CONFIG, MODEL, drawing, untuned=True)
    assert counted == [] and len(pictures(drawing)) == 6
    manifest = json.loads((drawing / "smoke/preference" / MODEL / "untuned_images.json").read_text())
    assert {"file", "sha256", "made_from"} <= next(e for e in manifest["inputs"] if "texts" in e["file"]).keys()
    texts_file("smoke", BASE, drawing).unlink()
    with pytest.raises(UserError, match=COMMAND):
        generate_module.generate(CONFIG, MODEL, drawing, untuned=True)


def test_pictures_do_not_depend_on_what_else_is_kept(drawing):
    build(drawing, *PROMPTS)
    generate_module.generate(CONFIG, MODEL, drawing, untuned=True)
    before = pictures(drawing)
    for path in drawing.rglob("shard*.parquet"):
        path.unlink()
    shutil.rmtree(drawing / "smoke/cache")
    build(drawing, *PROMPTS, "another one", "a", "zz")
    generate_module.generate(CONFIG, MODEL, drawing, untuned=True)
    assert pictures(drawing) == before and len(before) == 6


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_shards_written_behind_hold_the_bytes_of_the_plain_order(drawing, monkeypatch, blocks):
    build(drawing, *PROMPTS)
    small = CONFIG.model_copy(update={"scale_entry": CONFIG.scale_entry.model_copy(update={"eval_batch": 2})})
    monkeypatch.setattr(generate_module, "SHARD_BLOCKS", blocks)
    generate_module.generate(small, MODEL, drawing, untuned=True)
    generator = generate_module.Generator(small, MODEL, drawing)
    job = next(job for job in jobs(small, MODEL) if job.method == UNTUNED)
    chain = generate_module.chain_for(MODEL, generator.entry, job.steps)
    images = generate_module.wanted(generator.eval_set(job.eval_set), 2, 0)
    rows = [r for k in range(-(-3 // blocks)) for r in pq.read_table(job.images("smoke", drawing) / f"shard{k}.parquet")
            .to_pylist()]  # fmt: skip
    assert [row["image_id"] for row in rows] == [f"{w.prompt_id}-{w.image_seed}" for w in images]
    for start in range(0, 6, 2):
        block = images[start : start + 2]
        drawn = generate_module.sample_block(generator.policy, chain, block, 2, generator.texts.rows)
        for image, row in zip(drawn, rows[start : start + 2], strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["png"]))), np.asarray(image))


@pytest.mark.parametrize("fault", ["sampling", "encoding", "writing"])
def test_an_error_leaves_whole_shards_alone(drawing, monkeypatch, fault):
    """Of the second shard, in the main thread or behind it."""
    build(drawing, *PROMPTS)
    small = CONFIG.model_copy(update={"scale_entry": CONFIG.scale_entry.model_copy(update={"eval_batch": 2})})
    monkeypatch.setattr(generate_module, "SHARD_BLOCKS", 1)
    count = {"sampling": 0, "encoding": 0, "writing": 0}

    def failing(kind, plain, at):
        def call(*arguments):
            count[kind] += 1
            if kind == fault and count[kind] == at:
                raise OSError("no more")
            return plain(*arguments)

        return call

    monkeypatch.setattr(generate_module, "sample_block", failing("sampling", generate_module.sample_block, 2))
    monkeypatch.setattr(generate_module, "png", failing("encoding", generate_module.png, 4))
    shard = generate_module.Shard
    monkeypatch.setattr(shard, "write", failing("writing", shard.write, 2))
    if fault == "sampling":  # the first shard is on its way then
        monkeypatch.setattr(generate_module, "Behind", lambda: Behind(bound=1))
    with pytest.raises(OSError, match="no more"):
        generate_module.generate(small, MODEL, drawing, untuned=True)
    there = [path.name for path in drawing.rglob("*.parquet*")]
    assert set(there) <= {"shard0.parquet"} and (fault == "sampling" or there == ["shard0.parquet"])
    assert all(len(pq.read_table(path)) == 2 for path in drawing.rglob("*.parquet"))
    assert not list(drawing.rglob("untuned_images.json"))


# ---- what a run trains on ----


def given_for(results, method: str, monkeypatch, config=CONFIG) -> Given:
    subject = SimpleNamespace(name="cup", images=[], instance_prompt="b", prompts=lambda: ["b"])
    monkeypatch.setattr(training_data, "load_prompt_set", lambda *_: prompts_of(PROMPTS))
    monkeypatch.setattr(training_data, "load_subject", lambda *_: subject)
    monkeypatch.setattr(training_data, "pixels", lambda policy, images: torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    policy, entry = toy.new_policy(None), config.methods[method]
    given = Given(policy, toy.exact(toy.Renoise), None, 0, 2)
    training_data.give_data(given, config, MODEL, entry, "cup", Hub(hub_dir("smoke", results)), results)
    return given


def test_a_warm_run_on_prompts_encodes_nothing(results, counted, monkeypatch):
    build(results, *PROMPTS)
    expected = toy.new_policy(None).encode_prompts(PROMPTS)
    counted.clear()
    given = given_for(results, "pso_online", monkeypatch)
    found = given.condition.rows(torch.arange(3))
    assert counted == [] and given.prompts == PROMPTS
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    texts_file("smoke", BASE, results).unlink()
    with pytest.raises(UserError, match=COMMAND):
        given_for(results, "pso_online", monkeypatch)


def test_a_subjects_prompt_is_read_and_only_its_pictures_are_encoded(results, counted, monkeypatch):
    build(results, *PROMPTS)
    counted.clear()
    given = given_for(results, "dreambooth", monkeypatch)
    assert counted == ["encode_images"] and given.prompts == ["b"]
    assert same(given.condition, kept(results).rows(["b"], "cpu"))


def test_the_empty_caption_is_read_and_without_kept_texts_it_is_encoded(results, counted):
    build(results)
    policy, cfg = toy.new_policy(None), SimpleNamespace(times="uniform", caption_dropout=0.5)
    whole = policy.encode_prompts(toy.TEXTS)
    for texts_kept, calls in ((kept(results), []), (None, ["encode_prompts"])):
        counted.clear()
        given = Given(policy, toy.exact(toy.Renoise), cfg, 0, 2, toy.FakePairs(), toy.TEXTS, whole, texts=texts_kept)
        Targets(given)
        assert counted == calls and len(given.condition) == len(toy.TEXTS) + 1
        assert same(given.condition.rows([-1]), policy.encode_prompts([""]))


def test_a_run_names_the_file_and_goes_on_when_it_has_grown(results):
    build(results, *PROMPTS)
    hub = Hub(hub_dir("smoke", results))

    def inputs():
        given = SimpleNamespace(pairs=None, embeddings=None, texts=kept(results))
        return inputs_of(hub, given), given

    before, given = inputs()
    assert [entry["file"] for entry in before] == [f"cache/texts/{BASE.replace('/', '--')}.safetensors", WEIGHTS]
    build(results, *PROMPTS, "more")
    after, _ = inputs()
    assert after[0]["sha256"] != before[0]["sha256"] and lasting(after, given) == lasting(before, given)
