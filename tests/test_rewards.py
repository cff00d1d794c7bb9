"""The stand-ins of ImageReward and HPS: files in the published formats, which the scorers load like the real ones."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from transformers import BertTokenizer, CLIPModel

from eval.metrics.image_reward import UNUSED
from eval.open_clip_weights import to_open_clip
from pso.config import load
from pso.hub import Hub
from pso.miniature import data, rewards, world
from pso.miniature.common import CLIP_H, pixels
from pso.miniature.judges import agreement
from pso.models import load_metric

NAMES = ("image_reward", "hps_v2", "hps_v21")


@pytest.fixture(scope="module")
def config():
    return load({"scale": "smoke"})


@pytest.fixture(scope="module")
def made(tmp_path_factory, config):
    """A hub with a random CLIP-H, after the step."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    shutil.copytree(toy.clip_files(tmp_path_factory.mktemp("clip"))["model"], hub.root / CLIP_H)
    return hub, rewards.train(config, hub)


def scorer(made, config, name):
    return load_metric(name, config.metrics[name], Hub(made[0].root), "cpu")


def test_every_judge_is_measured(made):
    assert set(made[1]["quality"]) == set(NAMES)
    for found in made[1]["quality"].values():
        assert set(found) == {"held_out_agreement", "caption_accuracy"}
        assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_scorers_load_what_the_step_wrote(made, config, name):
    found = scorer(made, config, name)
    scores = found.score(toy.pictures(6), list(world.OF_CAPTION)[:6])
    assert scores.shape == (6,) and torch.isfinite(scores).all()
    entry = config.metrics[name]
    assert {f"{c.repo}/{c.file}" for c in (entry.checkpoint, entry.architecture)} <= set(found.spec["files"])


def test_image_rewards_file_is_the_published_kind(made):
    folder = made[0].root / rewards.IMAGE_REWARD
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    assert {key.split(".")[0] for key in state} == {"blip", "mlp"} and set(UNUSED) <= set(state)
    assert {key.split(".")[1] for key in state if key.startswith("blip")} == {
        *("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    }
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    med = json.loads((folder / "med_config.json").read_text())
    assert med["add_cross_attention"] and state["blip.text_encoder.embeddings.word_embeddings.weight"].shape == (
        *(med["vocab_size"], med["hidden_size"]),
    )


def test_the_files_of_hps_hold_open_clips_names_in_half_precision(made):
    states = [
        torch.load(made[0].root / rewards.HPS / file, weights_only=True)["state_dict"]
        for file in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
    ]
    expected = to_open_clip(CLIPModel.from_pretrained(made[0].root / CLIP_H).state_dict())
    for state in states:
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
        assert {value.dtype for value in state.values()} == {torch.float16}
    assert not torch.equal(states[0]["visual.proj"], states[1]["visual.proj"]), "other people, other judges"


def test_rewards_look_like_the_published_ones(made, config):
    """Mean 0 and standard deviation 1 on the held-out pairs, by the scorer, whose constants are fixed."""
    standin = config.scale_entry.standin
    rows = list(data.pairs(standin.num_pairs, standin.seed + 90))[: standin.num_pairs // 10]
    images = [Image.open(io.BytesIO(row[key])) for row in rows for key in ("jpg_0", "jpg_1")]
    captions = [row["caption"] for row in rows for _ in range(2)]
    found = scorer(made, config, "image_reward").score(images, captions)
    assert found.mean().item() == pytest.approx(0, abs=1e-3) and found.std().item() == pytest.approx(1, abs=1e-3)


def test_every_word_of_the_world_is_one_token_and_any_text_has_some(tmp_path):
    tokenizer = rewards.write_bert(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    for caption in world.OF_CAPTION:
        words = caption.replace(",", " , ").replace(":", " : ").split()
        assert tokenizer.tokenize(caption) == words
    assert tokenizer.tokenize("Vase7") == ["v", "##a", "##s", "##e", "##7"]
    assert tokenizer.unk_token_id not in tokenizer("a red zebra left")["input_ids"]


def test_a_mistake_changes_one_attribute():
    rng, changed = np.random.default_rng(0), set()
    for attributes in world.ALL_ATTRIBUTES:
        other = data.mistaken(attributes, rng)
        (name,) = [name for name in data.OPTIONS if getattr(other, name) != getattr(attributes, name)]
        assert getattr(other, name) in data.OPTIONS[name]
        changed.add(name)
    assert changed == set(data.OPTIONS)


def test_caption_accuracy_of_a_perfect_and_a_blind_judge():
    images, captions, *_ = world.render_many(500, 3)
    own = dict(zip(map(bytes, pixels(images).numpy()), captions, strict=True))
    right = rewards.caption_accuracy(
        lambda x, c: torch.tensor([float(own[bytes(i)] == t) for i, t in zip(x.numpy(), c, strict=True)]), 3
    )
    assert right == 1.0 and rewards.caption_accuracy(lambda x, c: torch.zeros(len(c)), 3) == 0.0


def test_agreement_leaves_ties_out():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert agreement(scores, torch.tensor([1.0, 0.0, 0.5, 1.0])) == 0.667
