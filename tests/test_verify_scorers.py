"""The verifier itself: seeded checkpoints, its verdicts and report, and published numbers against wrong files."""

import copy
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from eval import seeded, verify_real, verify_scorers
from eval.seeded_pictures import pairs, pictures
from eval.verify_report import text
from pso.config import load, published
from pso.provenance import ROOT, UserError

FEW = ["aesthetic_score", "clip_t", "pick_score"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return seeded.build(tmp_path_factory.mktemp("seeded"))


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "results" / "verify_scorers.json").read_text())


# ---- seeded checkpoints ----


def test_a_weight_depends_on_its_name_alone():
    shapes = {"visual.conv1.weight": (8, 3, 4, 4), "ln_final.weight": (8,), "logit_scale": ()}
    one, alone = seeded.drawn("a/b", shapes), seeded.drawn("a/b", {"ln_final.weight": (8,)})
    assert torch.equal(one["ln_final.weight"], alone["ln_final.weight"])
    assert not torch.equal(one["ln_final.weight"], seeded.drawn("a/c", shapes)["ln_final.weight"])
    assert one["logit_scale"].exp().item() == pytest.approx(100, rel=1e-6)
    assert one["ln_final.weight"].mean().item() == pytest.approx(1, abs=0.15)


def test_published_files_are_in_the_published_precision(hub):
    hps = torch.load(hub / seeded.HPS / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in hps.values()} == {torch.float16}
    openai = torch.load(hub / seeded.CLIP_L / "ViT-L-14.pt", weights_only=True)
    assert all(torch.equal(value, value.half().float()) for value in openai.values())


def test_queries_keys_and_values_are_where_both_formats_have_them(hub):
    official = torch.load(hub / seeded.CLIP_H / "open_clip_pytorch_model.bin", weights_only=True)
    converted = load_file(hub / seeded.CLIP_H / "model.safetensors")
    joined = official["transformer.resblocks.1.attn.in_proj_weight"]
    layer = "text_model.encoder.layers.1.self_attn"
    assert torch.equal(joined, torch.cat([converted[f"{layer}.{k}_proj.weight"] for k in "qkv"]))
    assert torch.equal(official["visual.proj"], converted["visual_projection.weight"].T)
    assert sum(v.numel() for v in official.values()) == sum(v.numel() for v in converted.values())


def test_the_small_vocabulary_is_read_alike_by_its_two_files(hub):
    tokenizer = CLIPTokenizer.from_pretrained(hub / seeded.CLIP_H)
    vocabulary = json.loads((hub / seeded.CLIP_H / "vocab.json").read_text())
    assert len(tokenizer) == len(vocabulary) == max(vocabulary.values()) + 1
    ids = tokenizer("two dogs under a dark sky")["input_ids"]
    assert [ids[0], ids[-1]] == [len(vocabulary) - 2, len(vocabulary) - 1], "the end has the highest id"
    text_of = {i: token for token, i in vocabulary.items()}
    assert "".join(text_of[i] for i in ids[1:-1]) == "two</w>dogs</w>under</w>a</w>dark</w>sky</w>"
    assert len(ids) < len("two dogs under a dark sky"), "there are merges"


def test_the_pictures_are_odd_and_the_same_each_time():
    found = pictures()
    assert len(found) >= 32 and {"RGB", "L", "P", "RGBA", "I;16", "LA", "1", "CMYK"} == {p.mode for p in found.values()}
    assert max(max(p.size) for p in found.values()) >= 1024 and min(min(p.size) for p in found.values()) == 2
    assert np.asarray(found["16 bits"]).max() > 255, "read as 8 bits it would be another picture"
    names, images, prompts = pairs(5)
    assert names == list(found)[:5] and len(images) == len(prompts) == 5


# ---- the verdict and the report ----


def test_the_committed_report_shows_what_was_asked_for(report):
    rows = {(row["scorer"], row["size"]): row for row in report["scorers"]}
    for name in verify_scorers.CASES:
        row = rows[name, "small"]
        assert row["pictures"] >= 32 and row["max_abs_diff"] <= 1e-5 and row["official_std"] > 100 * 1e-5
    assert rows["image_reward", "published"]["max_abs_diff"] <= 1e-5
    assert {row["max_abs_diff"] for row in report["transforms"]} == {0.0} and len(report["transforms"]) == 7
    tokens = {row["prompts"]: row for row in report["tokens"]}
    for name, differing, count in (("parti_prompts", 12, 1632), ("training_prompts_4k", 25, 4000)):
        row = tokens[name]
        assert (row["transformers_alone"], row["count"]) == (differing, count)
        assert {v for k, v in row.items() if k.startswith("ours_to")} == {0}
    assert verify_scorers.wrong(report) == []


def test_the_committed_report_is_what_its_numbers_say_and_names_nobody(report):
    written = (ROOT / "results" / "verify_scorers.md").read_text()
    assert written == text(report)
    raw = written + json.dumps(report)
    assert not re.search(r"/(home|root|tmp|work|Users)\b|https?://|@", raw.replace("#style @artist", ""))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_abs_diff": 1.1e-5}, r"image_reward \(small\) differs from the official score by 1\.1e-05"),
        ({"max_abs_diff": float("nan")}, r"differs from the official score by nan"),
        ({"official_std": 1e-4}, r"hardly tells the pictures apart"),
    ],
)
def test_a_difference_or_a_constant_is_found(report, change, sentence):
    other = copy.deepcopy(report)
    other["scorers"][0] |= change
    (found,) = verify_scorers.wrong(other)
    assert re.search(sentence, found)


def test_a_pixel_that_differs_is_found(report):
    other = copy.deepcopy(report)
    other["transforms"][3]["max_abs_diff"] = 1e-7
    assert "differs from the official transform" in verify_scorers.wrong(other)[0]


def test_scores_of_another_checkpoint_are_found_to_differ(hub, tmp_path):
    """The comparison on files that the oracle is said to have scored: right and wrong numbers."""
    _, images, prompts = pairs(3)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    task = {"pictures": ["0.png", "1.png", "2.png"], "prompts": prompts}
    (tmp_path / "task.json").write_text(json.dumps(task))
    golden = json.loads((ROOT / "tests" / "golden" / "official_scores.json").read_text())
    about = {"transform": "x", "packages": {}}
    right = {key: {"scores": golden["scores"][key][:3], "spec": about} for key in FEW}
    rows = verify_scorers.compare_scores(right, tmp_path, hub, "small")
    assert [row["scorer"] for row in rows] == FEW and max(row["max_abs_diff"] for row in rows) <= 1e-5
    right["pick_score"]["scores"] = golden["scores"]["clip_score"][:3]
    assert verify_scorers.compare_scores(right, tmp_path, hub, "small")[2]["max_abs_diff"] > 1e-2


def test_an_oracle_that_does_not_run_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--oracle is .*python, which does not run .* `make verify_scorers`"):
        verify_scorers.ask(tmp_path / "python", "--where")


def test_an_oracle_without_the_packages_is_a_sentence():
    with pytest.raises(UserError, match=r"failed in the environment of --oracle: .* needs the module"):
        verify_scorers.ask(sys.executable, "--where")


# ---- published numbers ----


@pytest.fixture
def examples(tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    for i, name in enumerate(["1.webp", "2.webp", "3.webp", "4.webp", "demo_image.jpg"]):
        pairs(5)[1][0].rotate(40 * i).save(folder / name)
    return folder


def verdicts(capsys) -> dict[str, str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    return {line[12:].strip().split(": expected")[0]: line[:12].strip() for line in lines}


def test_wrong_files_are_found_wrong(hub, examples, capsys):
    assert verify_real.check_real(hub, examples) == 1
    found = verdicts(capsys)
    head = "sac+logos+ava1-l14-linearMSE.pth"
    assert found[f"sha256 of {seeded.AESTHETIC}/{head}"] == "wrong"
    assert found[f"norm of the folded {head}"] == found[f"bias of the folded {head}"] == "wrong"
    assert [found[f"ImageReward of {i}.webp of its README"] for i in range(1, 5)] == ["wrong"] * 4
    assert found["HPSv2 of its demo picture"] == "wrong"
    assert found[f"exp(logit_scale) of {seeded.PICK_SCORE}"] == found[f"exp(logit_scale) of {seeded.CLIP_H}"] == "right"
    assert "not checked" not in found.values()


def test_what_is_not_there_is_not_checked_and_says_how_to_fetch_it(tmp_path, capsys):
    assert verify_real.check_real(tmp_path, None) == 0
    out = capsys.readouterr().out
    assert f"hf download {seeded.PICK_SCORE} --local-dir {tmp_path / seeded.PICK_SCORE}" in out
    lines = out.splitlines()[:-1]
    assert len(lines) >= 10 and all(line.startswith("not checked") for line in lines)
    assert json.loads(out.splitlines()[-1]) == {"right": 0, "wrong": 0, "not checked": len(lines)}


def test_the_pictures_without_the_weights_are_not_checked(tmp_path, examples, capsys):
    assert verify_real.check_real(tmp_path, examples) == 0
    out = capsys.readouterr().out
    assert "hf download THUDM/ImageReward ImageReward.pt" in out and "hf download bert-base-uncased" in out


@pytest.mark.parametrize("kind", ["another scale", "cut off"])
def test_a_wrong_logit_scale_or_a_cut_file_is_found(hub, tmp_path, capsys, kind):
    path = tmp_path / seeded.PICK_SCORE / "model.safetensors"
    path.parent.mkdir(parents=True)
    state = load_file(hub / seeded.PICK_SCORE / "model.safetensors")
    save_file(state | {"logit_scale": torch.tensor(2.6592)}, path)
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:100])
    assert verify_real.check_real(tmp_path, None) == 1
    assert verdicts(capsys)[f"exp(logit_scale) of {seeded.PICK_SCORE}"] == "wrong"


def test_a_broken_checkpoint_is_wrong_and_not_merely_unchecked(hub, tmp_path, examples, capsys):
    import shutil

    for repo in (seeded.IMAGE_REWARD, seeded.BERT):
        shutil.copytree(hub / repo, tmp_path / "real" / repo)
    (tmp_path / "real" / seeded.IMAGE_REWARD / "ImageReward.pt").write_bytes(b"no state dict")
    assert verify_real.check_real(tmp_path / "real", examples) == 1
    assert verdicts(capsys)["ImageReward of 1.webp of its README"] == "wrong"


def test_a_head_with_the_published_numbers_is_right(tmp_path, capsys):
    """The folded numbers are compared in float64, so the last digits count."""
    norm, bias = verify_real.FOLDED["norm"], verify_real.FOLDED["bias"]
    state, width = {}, 768
    for i, out in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        weight = torch.zeros(out, width, dtype=torch.float64)
        weight[0, 0] = norm if i == 0 else 1
        state |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": torch.zeros(out, dtype=torch.float64)}
        width = out
    state["layers.7.bias"] += bias
    path = tmp_path / seeded.AESTHETIC / "sac+logos+ava1-l14-linearMSE.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    assert verify_real.check_real(tmp_path, None) == 1, "its sha256 is another"
    found = verdicts(capsys)
    assert found[f"norm of the folded {path.name}"] == found[f"bias of the folded {path.name}"] == "right"


def test_a_folder_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--real is .*nowhere, which is no folder"):
        verify_real.check_real(tmp_path / "nowhere", None)


def test_published_entries_are_of_no_scale_and_take_the_users_overrides():
    head = {"head": {"sha256": None}}
    given = published("metrics", {"scale": "miniature", "metrics": {"aesthetic_score": head | {"decimals": 1}}})
    assert given["aesthetic_score"].decimals == 1 and given["aesthetic_score"].head.sha256 is None
    assert published("metrics")["aesthetic_score"].head.sha256.startswith("21dd590f")
    assert load({"scale": "miniature"}).metrics["aesthetic_score"].head.sha256 is None, "a stand-in has another hash"
