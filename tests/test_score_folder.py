"""Pairing of pictures, prompts and other pictures by the command on one's own: what fits by chance must not pass."""

import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from test_metrics import CAPTIONS
from test_pictures import encoded, noise
from test_score import command
from toy import quiet  # noqa: F401

from eval.metrics import pick_score
from eval.score_folder import open_pictures, with_prompts
from pso.provenance import UserError


def numbered(folder, count: int, width: int = 1):
    folder.mkdir()
    for k in range(count):
        (folder / f"{k:0{width}d}.png").write_bytes(encoded(noise(12, 12, seed=k)))
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("".join(f"prompt {k}\n" for k in range(count)))
    return folder, prompts


def test_lines_for_names_that_count_otherwise_than_they_sort_are_refused(tmp_path):
    folder, prompts = numbered(tmp_path / "pictures", 12)
    with pytest.raises(UserError, match=r"line 3 of .* would be of 10\.png by letters, of 2\.png by numbers"):
        with_prompts(open_pictures(folder), prompts)
    rows = [{"file_name": f"{k}.png", "prompt": f"prompt {k}"} for k in range(12)]
    pd.DataFrame(rows).to_csv(tmp_path / "prompts.csv", index=False)
    found = with_prompts(open_pictures(folder), tmp_path / "prompts.csv").frame
    assert (found["prompt"] == "prompt " + found["image_id"].str.removesuffix(".png")).all()


@pytest.mark.parametrize(("count", "width"), [(12, 2), (9, 1)])
def test_lines_for_names_that_sort_as_they_count_are_theirs(tmp_path, count, width):
    folder, prompts = numbered(tmp_path / "pictures", count, width)
    found = with_prompts(open_pictures(folder), prompts)
    assert found.frame["prompt"].tolist() == [f"prompt {k}" for k in range(count)]


def table(path, **columns):
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"png": [encoded(noise(12, 12, seed=k)) for k in range(count)]} | columns), path)
    return path


@pytest.mark.parametrize("ids", [["1", "1", None, None], [1, 1, None, None]], ids=["text", "numbers"])
def test_an_absent_prompt_id_is_the_prompts_own_and_a_number_stays_one(tmp_path, ids):
    path = table(tmp_path / "x.parquet", prompt=list("aabc"), prompt_id=ids)
    found = with_prompts(open_pictures(path), None).frame["prompt_id"].tolist()
    assert found[:2] == ["1", "1"] and len(set(found)) == 3 and "nan" not in found


def test_a_large_seed_beside_none_is_kept(tmp_path):
    path = table(tmp_path / "x.parquet", prompt=["a", "b"], image_seed=[2**60 + 1, None])
    assert with_prompts(open_pictures(path), None).frame["image_seed"].tolist() == [2**60 + 1, pd.NA]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": ["a", "b"], "image_id": ["x", None]}, "rows without an image_id"),
        ({"prompt": ["a", "b"], "prompt_id": ["\x00", "b"]}, None),
    ],
)
def test_odd_ids_of_a_parquet_file(tmp_path, columns, said):
    path = table(tmp_path / "x.parquet", **columns)
    if said is None:
        assert len(with_prompts(open_pictures(path), None)) == 2
        return
    with pytest.raises(UserError, match=said):
        with_prompts(open_pictures(path), None)


def test_untuned_pictures_of_other_prompts_or_noise_are_refused(tmp_path, monkeypatch):
    mine = table(tmp_path / "mine.parquet", prompt=list("abcd"), image_seed=[1, 2, 3, 4])
    given = ("--images", mine, "--metrics", "sharpness_ratio", "--out", tmp_path / "out.parquet")
    turned = table(tmp_path / "turned.parquet", prompt=list("dcba"), image_seed=[4, 3, 2, 1])
    assert "4 pictures have another prompt in" in command(monkeypatch, *given, "--untuned", turned)
    other = table(tmp_path / "other.parquet", prompt=list("abcd"), image_seed=[1, 2, 3, 5])
    assert "1 pictures have another image_seed in" in command(monkeypatch, *given, "--untuned", other)
    assert command(monkeypatch, *given, "--untuned", mine) is None
    assert (pq.read_table(tmp_path / "out.parquet").to_pandas()["sharpness_ratio"] == 1).all()


def test_a_later_shard_without_pictures_is_one_sentence(tmp_path):
    (tmp_path / "shards").mkdir()
    table(tmp_path / "shards" / "shard0.parquet", prompt=["a"])
    pq.write_table(pa.table({"prompt": ["b"]}), tmp_path / "shards" / "shard1.parquet")
    with pytest.raises(UserError, match=r"shard1\.parquet has no columns png"):
        open_pictures(tmp_path / "shards")


# ---- the checkpoint's files ----


@pytest.fixture
def files(tmp_path):
    return toy.clip_files(tmp_path)


def test_a_file_that_changed_is_another_checkpoint(files):
    before = pick_score.load(files, "cpu")
    path = files["model"] / "model.safetensors"
    state = load_file(path)
    state["visual_projection.weight"] = -state["visual_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    after = pick_score.load(files, "cpu")
    picture = toy.pictures(1)
    assert torch.allclose(after.score(picture, CAPTIONS[:1]), -before.score(picture, CAPTIONS[:1]), atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_list_of_merges_that_was_cut_is_refused(files, tmp_path, kept):
    folder = tmp_path / "cut"
    shutil.copytree(files["processor"], folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    lines = (folder / "merges.txt").read_text().splitlines()
    assert len(lines) > 30
    (folder / "merges.txt").write_text("\n".join(lines[: kept + 1]) + "\n")
    with pytest.raises(ValueError, match=r"has no merges for \d+ of its \d+ tokens|cannot be read"):
        pick_score.load({**files, "processor": folder}, "cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_broken_vocabulary_is_refused(files, tmp_path, content):
    folder = tmp_path / "broken"
    shutil.copytree(files["processor"], folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer in .*broken (cannot be read|has \d+ tokens)"):
        pick_score.load({**files, "processor": folder}, "cpu")


def test_a_transform_that_is_none_is_refused(files):
    from eval.metrics import clip_score

    with pytest.raises(ValueError, match=r"settings\.transform is 'dino_256_224'; expected one of clip_pil224, "):
        clip_score.load(files, "cpu", transform="dino_256_224")
