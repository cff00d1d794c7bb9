"""Which evaluation prompts were trained on: by list, by the captions of visited pairs, in the real lists."""

import json
import logging
from types import SimpleNamespace

import pytest
from conftest import run, smoke_settings
from test_data import real_parti, real_training
from test_pairs import row

from pso.config import load
from pso.data import prompts_of, write_caption_json, write_caption_parquet, write_pair_shards, write_parti_tsv
from pso.leakage import data_sets, overlap, report, to_markdown
from pso.visits import pair_indices


def test_the_four_prompts_that_the_real_lists_share():
    found = overlap(*([prompt.text for prompt in prompts()] for prompts in (real_training, real_parti)))
    assert found["alike"] == ["a mountain", "a snail", "a sword", "anger"]
    assert (found["train"], found["test"]) == (4000, 1632) and set(found["exact"]) <= set(found["alike"])


def test_exact_and_alike_are_told_apart():
    found = overlap(["a cat", " A dog", "a fox"], ["a cat", "a dog", "a hen", "A CAT "])
    assert found == {"train": 3, "test": 4, "exact": ["a cat"], "alike": ["a cat", "a dog"]}


@pytest.fixture
def small(tmp_path):
    """Results of a paper scale whose sets are small: 12 pairs of which 4 are visited."""
    none = {"num_rows": None, "num_pairs": None, "num_prompts": None}
    datasets = {name: {"num_rows": None, "sha256": None} for name in ("training_prompts_4k", "parti_prompts")}
    datasets |= {"pickapic_v2": none, "pickapic_test": {"num_rows": None}, "pickapic_v2_test": {"num_rows": None}}
    tune = {"tune": {"num_updates": 2, "batch_size": 2}}
    methods = {n: tune for n, method in load().methods.items() if method.data == "pickapic_v2"}
    scales = {"paper": {"preference_model": None}}
    config = load({"scale": "paper", "tables": ["table2"], "datasets": datasets, "methods": methods, "scales": scales})
    hub = tmp_path / "paper/hub"
    place = {name: hub / entry.repo / entry.files for name, entry in config.datasets.items()}
    texts = [f"pair {n}" for n in range(12)]
    write_pair_shards(hub / "yuvalkirstain/pickapic_v2", [row(n, caption=text) for n, text in enumerate(texts)], 2)
    write_caption_json(place["training_prompts_4k"], prompts_of(["a snail", "a hen"]))
    write_parti_tsv(place["parti_prompts"], prompts_of(["A snail", *(text.upper() for text in texts)]))
    folder = hub / "yuvalkirstain/pickapic_v1_no_images/data"
    write_caption_parquet(folder / "test_unique-00000-of-00001.parquet", prompts_of(["a hen", *texts]))
    return SimpleNamespace(config=config, results=tmp_path, hub=hub, texts=texts)


def test_of_pairs_the_visited_ones_count(small, caplog):
    with caplog.at_level(logging.INFO, "leakage"):
        found = report(small.config, small.results)["overlaps"]
    visited = sorted(small.texts[i] for update in range(2) for i in pair_indices(update, 2, 12, 0))
    assert len(visited) == 4
    assert found["pickapic_v2"]["pickapic_test"]["exact"] == visited == found["pickapic_v2"]["pickapic_test"]["alike"]
    assert found["pickapic_v2"]["parti_prompts"] == {"train": 4, "test": 13, "exact": [], "alike": visited}
    assert found["training_prompts_4k"]["pickapic_test"]["exact"] == ["a hen"]
    assert found["training_prompts_4k"]["parti_prompts"]["alike"] == ["a snail"]
    assert set(found) == {"pickapic_v2", "training_prompts_4k"} == set(data_sets(small.config)[0])
    assert "pickapic_v2_test is not there; it is left out." in caplog.text
    text = to_markdown(report(small.config, small.results))
    assert "| training_prompts_4k | 2 | parti_prompts | 13 | 0 | 1 |" in text and "- `a snail`" in text


def test_v2s_list_is_looked_at_where_it_is_there(small):
    folder = small.hub / "yuvalkirstain/pickapic_v2_no_images/data"
    write_caption_parquet(folder / "test_unique-00000-of-00001.parquet", prompts_of(["A Hen "]))
    found = report(small.config, small.results)["overlaps"]
    assert found["training_prompts_4k"]["pickapic_v2_test"]["alike"] == ["a hen"]


def test_the_command_writes_both_files(with_hub):
    done = run("python", "-m", "pso.leakage", "--results", str(with_hub), "--set", smoke_settings())
    assert done.returncode == 0, done.stderr
    told = json.loads((with_hub / "smoke/leakage.json").read_text())
    assert told["overlaps"]["pickapic_v2"]["parti_prompts"]["alike"] == []  # the world's splits share no picture
    assert (with_hub / "smoke/leakage.md").read_text() in done.stdout
