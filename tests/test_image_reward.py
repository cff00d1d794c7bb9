"""ImageReward against a computation of its own in float64, from the keys of a small .pt in the official format."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from PIL import Image
from toy import quiet  # noqa: F401
from transformers import BertTokenizer

from eval.metrics import image_reward
from eval.transforms import clip_pil224, openai_pil224
from pso.config import load
from pso.entries import MetricEntry
from pso.hub import Hub
from pso.models import load_metric
from pso.provenance import UserError

WIDTH, TEXT, DEPTH, PATCH, SIDE = 128, 48, 2, 8, 32  # two heads of 64 in the vision tower
HEADS, INNER, POSITIONS = 4, 96, 40
HEAD = (32, 24, 16, 8, 1)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "red", "blue", "circle", "on", "the", "##s", ","]
PROMPTS = ["a red circle", "Blue circles, on the red", "", "the circle is unknown", "red " * 60]
MED = {
    "vocab_size": len(WORDS) + 2,  # [DEC] and [ENC], which only the authors' tokenizer has
    "hidden_size": TEXT,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 77,  # as wrong as the published file's 768
    "add_cross_attention": True,
}


def new_state() -> dict[str, torch.Tensor]:
    """A random ImageReward under the names of the published file."""
    rng = torch.Generator().manual_seed(3)
    state = {}

    def linear(name: str, rows: int, columns: int, std: float = 0.15) -> None:
        state[f"{name}.weight"] = std * torch.randn(rows, columns, generator=rng)
        state[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=rng)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=rng)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=rng)

    seen, read = "blip.visual_encoder", "blip.text_encoder"
    state[f"{seen}.cls_token"] = torch.randn(1, 1, WIDTH, generator=rng)
    state[f"{seen}.pos_embed"] = 0.5 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH, generator=rng)
    linear(f"{seen}.patch_embed.proj", WIDTH, 3 * PATCH * PATCH)
    state[f"{seen}.patch_embed.proj.weight"] = state[f"{seen}.patch_embed.proj.weight"].view(WIDTH, 3, PATCH, PATCH)
    for block in (f"{seen}.blocks.{i}" for i in range(DEPTH)):
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{seen}.norm", WIDTH)
    state[f"{read}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    state[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(MED["vocab_size"], TEXT, generator=rng)
    state[f"{read}.embeddings.position_embeddings.weight"] = torch.randn(POSITIONS, TEXT, generator=rng)
    norm(f"{read}.embeddings.LayerNorm", TEXT)
    for layer in (f"{read}.encoder.layer.{i}" for i in range(DEPTH)):
        for kind, width in (("attention", TEXT), ("crossattention", WIDTH)):
            for name, columns in (("query", TEXT), ("key", width), ("value", width)):
                linear(f"{layer}.{kind}.self.{name}", TEXT, columns)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", INNER, TEXT)
        linear(f"{layer}.output.dense", TEXT, INNER)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 6, WIDTH)
    linear("blip.text_proj", 6, TEXT)
    for i, columns, rows in zip((0, 2, 4, 6, 7), (TEXT, *HEAD), HEAD, strict=False):
        linear(f"mlp.layers.{i}", rows, columns, 0.3)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """As they lie in the hub: THUDM/ImageReward and bert-base-uncased."""
    hub = tmp_path_factory.mktemp("hub")
    for repo in ("THUDM/ImageReward", "bert-base-uncased"):
        (hub / repo).mkdir(parents=True)
    torch.save(new_state(), hub / "THUDM/ImageReward/ImageReward.pt")
    (hub / "THUDM/ImageReward/med_config.json").write_text(json.dumps(MED))
    (hub / "bert-base-uncased/vocab.txt").write_text("\n".join(WORDS) + "\n")
    (hub / "bert-base-uncased/tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    return {
        "model": hub / "THUDM/ImageReward/ImageReward.pt",
        "architecture": hub / "THUDM/ImageReward/med_config.json",
        "processor": hub / "bert-base-uncased",
    }


@pytest.fixture(scope="module")
def scorer(files):
    return image_reward.load(files, "cpu")


@pytest.fixture(scope="module")
def pictures():
    return toy.pictures(len(PROMPTS))


# ---- in float64, by the file's own names ----


class ByHand:
    """The authors' forward pass written out; each keyword is a mistake."""

    def __init__(self, state: dict, **wrong):
        self.state = {key: value.double() for key, value in state.items()}
        self.wrong = wrong

    def linear(self, name, v):
        return v @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, v, eps):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return v * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(q, k, v, heads, hidden=None):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def see(self, x):
        eps, tower = self.wrong.get("vision_eps", 1e-6), "blip.visual_encoder"
        kernel = self.state[f"{tower}.patch_embed.proj.weight"]
        patches = F.unfold(x.double(), PATCH, stride=PATCH).transpose(1, 2)
        tokens = patches @ kernel.flatten(1).T + self.state[f"{tower}.patch_embed.proj.bias"]
        tokens = torch.cat([self.state[f"{tower}.cls_token"].expand(len(x), -1, -1), tokens], 1)
        tokens = tokens + self.state[f"{tower}.pos_embed"]
        for block in (f"{tower}.blocks.{i}" for i in range(DEPTH)):
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", tokens, eps)).chunk(3, -1)
            tokens = tokens + self.linear(f"{block}.attn.proj", self.attend(*qkv, WIDTH // 64))
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", tokens, eps)))
            tokens = tokens + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{tower}.norm", tokens, eps)

    def read(self, ids, mask, seen):
        eps, tower = MED["layer_norm_eps"], "blip.text_encoder"
        hidden = (mask == 0)[:, None, None]
        if self.wrong.get("causal"):
            hidden = hidden | torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        h = self.state[f"{tower}.embeddings.word_embeddings.weight"][ids]
        h = h + self.state[f"{tower}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        h = self.norm(f"{tower}.embeddings.LayerNorm", h, eps)
        for layer in (f"{tower}.encoder.layer.{i}" for i in range(DEPTH)):
            for kind, other, away in (("attention", None, hidden), ("crossattention", seen, None)):
                source = h if other is None else other
                names = (f"{layer}.{kind}.self.{name}" for name in ("query", "key", "value"))
                q, k, v = (self.linear(name, part) for name, part in zip(names, (h, source, source), strict=True))
                out = self.linear(f"{layer}.{kind}.output.dense", self.attend(q, k, v, HEADS, away))
                h = self.norm(f"{layer}.{kind}.output.LayerNorm", out + h, eps)
            out = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", h)))
            h = self.norm(f"{layer}.output.LayerNorm", out + h, eps)
        return h[:, 0]

    def head(self, h):
        for i in (0, 2, 4, 6, 7):
            h = self.linear(f"mlp.layers.{i}", h)
        h = h[:, 0]
        return h if self.wrong.get("raw") else (h - 0.16717362830052426) / 1.0333394966054072

    def score(self, images, prompts, tokenizer, transform=openai_pil224, padding="max_length"):
        x = torch.stack([transform(image, SIDE) for image in images])
        x = x.flip(1) if self.wrong.get("bgr") else x
        window = self.wrong.get("window", 35)
        tokens = tokenizer(prompts, padding=padding, truncation=True, max_length=window, return_tensors="pt")
        return self.head(self.read(tokens["input_ids"], tokens["attention_mask"], self.see(x)))


def bert(files) -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def odd_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (48, 70, 3), dtype=np.uint8))
    return [
        colour,
        colour.convert("L"),
        colour.convert("P"),
        Image.fromarray(rng.integers(0, 256, (90, 41, 4), dtype=np.uint8), "RGBA"),
        Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)),
    ]


def test_the_reward_is_the_authors(files, scorer, pictures):
    expected = ByHand(new_state()).score(pictures, PROMPTS, bert(files))
    found = scorer.score(pictures, PROMPTS)
    assert found.dtype == torch.float32 and found.shape == (len(pictures),)
    assert (found - expected).abs().max() < 1e-5
    assert expected.std() > 0.1, "the random network tells the pairs apart"


def test_pictures_of_other_sizes_and_modes_are_scored_too(files, scorer):
    images = odd_pictures()
    expected = ByHand(new_state()).score(images, PROMPTS, bert(files))
    assert (scorer.score(images, PROMPTS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [{"causal": True}, {"raw": True}, {"bgr": True}, {"window": 40}], ids=str)
def test_a_mistake_would_be_seen(files, scorer, pictures, wrong):
    mistaken = ByHand(new_state(), **wrong).score(pictures, PROMPTS, bert(files))
    assert (scorer.score(pictures, PROMPTS) - mistaken).abs().max() > 1e-2


def test_a_palette_is_resized_as_a_palette(files, scorer):
    image = odd_pictures()[2]
    early = ByHand(new_state()).score([image], ["red"], bert(files), transform=clip_pil224)
    assert (scorer.score([image], ["red"]) - early).abs() > 1e-2


def test_the_vision_tower_has_the_epsilon_that_it_was_trained_with(files, pictures, tmp_path):
    """Of tokens that hardly differ the normalisation is all epsilon."""
    embedded = ("cls_token", "pos_embed", "patch_embed")
    flat = {k: v * 1e-3 if any(part in k for part in embedded) else v for k, v in new_state().items()}
    flat |= {k: v * 1e-3 for k, v in flat.items() if k.endswith(("attn.proj.weight", "attn.proj.bias")) or ".fc2." in k}
    torch.save(flat, tmp_path / "flat.pt")
    found = image_reward.load({**files, "model": tmp_path / "flat.pt"}, "cpu").score(pictures, PROMPTS)
    right, wrong = (ByHand(flat, vision_eps=eps).score(pictures, PROMPTS, bert(files)) for eps in (1e-6, 1e-5))
    assert (found - right).abs().max() < 1e-4 < 1e-2 < (found - wrong).abs().max()


def test_padding_changes_nothing(files, scorer, pictures):
    by_hand, pairs = ByHand(new_state()), zip(pictures, PROMPTS, strict=True)
    alone = torch.cat([by_hand.score([i], [p], bert(files), padding=False) for i, p in pairs])
    assert (scorer.score(pictures, PROMPTS) - alone).abs().max() < 1e-5


def test_the_folded_head_is_the_head_of_the_published_size():
    rng = torch.Generator().manual_seed(0)
    sizes = (768, 1024, 128, 64, 16, 1)
    state, of = {}, dict(zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:], strict=False), strict=True))
    for i, (columns, rows) in of.items():
        state[f"layers.{i}.weight"] = torch.randn(rows, columns, generator=rng) / columns**0.5
        state[f"layers.{i}.bias"] = 0.1 * torch.randn(rows, generator=rng)
    weight, bias = image_reward.affine.folded(state, "head", 768)
    h = torch.randn(200, 768, generator=rng)
    exact, single = h.double(), h
    for i in of:
        exact = exact @ state[f"layers.{i}.weight"].double().T + state[f"layers.{i}.bias"].double()
        single = F.linear(single, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
    folded = h @ weight.float() + bias.float()
    assert torch.allclose(h.double() @ weight + bias, exact[:, 0], atol=1e-12)
    assert (folded - exact[:, 0]).abs().max() < 2e-6 and (folded - single[:, 0]).abs().max() < 2e-6


# ---- the contract ----


def test_a_reward_depends_on_neither_order_nor_batch(scorer, pictures):
    together = scorer.score(pictures, PROMPTS)
    alone = torch.cat([scorer.score([i], [p]) for i, p in zip(pictures, PROMPTS, strict=True)])
    turned = scorer.score(pictures[::-1], PROMPTS[::-1]).flip(0)
    assert torch.allclose(alone, together, atol=1e-5) and torch.allclose(turned, together, atol=1e-5)
    assert torch.equal(scorer.score(pictures, PROMPTS), together)


def test_it_depends_on_picture_and_prompt(scorer, pictures):
    base = scorer.score([pictures[0]], [PROMPTS[0]])
    assert (scorer.score([pictures[1]], [PROMPTS[0]]) - base).abs() > 1e-3
    assert (scorer.score([pictures[0]], [PROMPTS[1]]) - base).abs() > 1e-3


def test_a_prompt_beyond_35_tokens_is_cut_and_ends_with_the_end(scorer, pictures):
    longest = " ".join(["red"] * 33)
    assert not scorer.truncated(longest) and scorer.truncated(longest + " blue")
    cut = [scorer.score([pictures[0]], [text]).item() for text in (f"{longest} blue", f"{longest} circle on the red")]
    shorter = scorer.score([pictures[0]], [longest.removesuffix(" red")]).item()
    assert cut == pytest.approx([scorer.score([pictures[0]], [longest]).item()] * 2, abs=1e-5)
    assert abs(cut[0] - shorter) > 1e-4  # where a word less is seen
    ids = scorer._tokens([longest + " blue"])["input_ids"][0]
    assert len(ids) == 35 and ids[-1] == WORDS.index("[SEP]")


def test_each_prompt_is_cut_into_tokens_once(files, pictures, monkeypatch):
    scorer, seen = image_reward.load(files, "cpu"), []
    tokenizer = scorer.tokenizer
    monkeypatch.setattr(scorer, "tokenizer", lambda texts, **more: seen.extend(texts) or tokenizer(texts, **more))
    scorer.score(pictures[:3], ["red", "blue", "red"])
    scorer.score(pictures[:2], ["blue", "the"])
    assert seen == ["red", "blue", "the"]


# ---- files that are not right ----


def without(key):
    return lambda state: state.pop(key)


def changed(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), r"lacks \['blip\.text_enc"),
        (without("blip.visual_encoder.blocks.1.attn.qkv.weight"), r"lacks \['blip\.visual_encoder\.blocks\.1\.attn"),
        (without("blip.visual_encoder.cls_token"), r"lacks \['blip\.visual_encoder\.cls_token"),
        (without("blip.visual_encoder.pos_embed"), "is not ImageReward's"),
        (without("mlp.layers.4.bias"), r"lacks \['layers\.4\.bias"),
        (changed("blip.temp", torch.ones(())), r"\['blip\.temp'\] in excess"),
        (changed("mlp.layers.8.weight", torch.ones(1, 1)), r"layers\.8"),
        (changed("blip.visual_encoder.norm.weight", torch.ones(5)), r"norm\.weight of shape \[5\]; expected \[128\]"),
        (changed("mlp.layers.0.weight", torch.ones(32, 5)), r"layers\.0\.weight of shape \[32, 5\]"),
        (changed("blip.visual_encoder.pos_embed", torch.ones(1, 15, WIDTH)), "has 15 positions"),
        (changed("note", "text"), "no state dict"),
    ],
)
def test_a_file_with_other_keys_is_refused(files, tmp_path, change, message):
    state = new_state()
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        image_reward.load({**files, "model": tmp_path / "other.pt"}, "cpu")


@pytest.mark.parametrize("name", image_reward.UNUSED)
def test_what_no_score_needs_may_lack(files, scorer, pictures, tmp_path, name):
    state = new_state()
    del state[name]
    torch.save(state, tmp_path / "lean.pt")
    found = image_reward.load({**files, "model": tmp_path / "lean.pt"}, "cpu").score(pictures, PROMPTS)
    assert torch.equal(found, scorer.score(pictures, PROMPTS))


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("kind", ["code", "cut", "empty", "random"])
def test_a_file_that_is_no_state_dict_is_refused_with_a_sentence(files, tmp_path, capsys, kind):
    hub = tmp_path / "hub"
    shutil.copytree(files["model"].parents[2], hub)
    path, raw = hub / "THUDM/ImageReward/ImageReward.pt", files["model"].read_bytes()
    if kind == "code":
        torch.save({**new_state(), "extra": Code()}, path)
    else:
        path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "random": bytes(range(256)) * 9}[kind])
    with pytest.raises(UserError, match=r"metrics\.image_reward cannot be loaded \(.*fetch its files again\.$"):
        load_metric("image_reward", load().metrics["image_reward"], Hub(hub), "cpu")
    assert "must not run" not in capsys.readouterr().out


def test_a_vocabulary_that_is_missing_or_anothers_is_refused(files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "long").mkdir()
    (tmp_path / "long/vocab.txt").write_text("\n".join([*WORDS, "x1", "x2", "x3"]) + "\n")
    count = len(WORDS)
    for folder, size in (("empty", 5), ("long", count + 3)):
        message = rf"tokenizer in .*{folder} has {size} tokens; expected {count} to {count + 2}"
        with pytest.raises(ValueError, match=message):
            image_reward.load({**files, "processor": tmp_path / folder}, "cpu")


def test_a_med_config_without_a_size_is_refused(files, tmp_path):
    (tmp_path / "med.json").write_text(json.dumps({k: v for k, v in MED.items() if k != "num_attention_heads"}))
    with pytest.raises(ValueError, match=r"med\.json has no 'num_attention_heads'"):
        image_reward.load({**files, "architecture": tmp_path / "med.json"}, "cpu")


def test_every_file_that_decides_the_reward_is_recorded(files):
    hub = Hub(files["model"].parents[2])
    entry: MetricEntry = load().metrics["image_reward"]
    assert entry.checkpoint.file == "ImageReward.pt" and entry.decimals == 4
    spec = load_metric("image_reward", entry, hub, "cpu").spec
    read = {"THUDM/ImageReward/ImageReward.pt", "THUDM/ImageReward/med_config.json"}
    assert set(spec["files"]) == read | {f"bert-base-uncased/{name}" for name in ("vocab.txt", "tokenizer_config.json")}
    assert json.loads(json.dumps(spec)) == spec and spec["layer_norm_eps"] == [1e-6, 1e-12]
