"""HPS v2 and v2.1, and open_clip's names of CLIP's weights, against a ViT of its own in plain torch."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from PIL import Image
from torch import nn
from toy import quiet  # noqa: F401
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eval.metrics import hps_v2, hps_v21
from eval.open_clip_weights import from_open_clip, load_open_clip, to_open_clip
from eval.transforms import clip_pil224, hps_letterbox224_aa, hps_letterbox224_noaa
from pso.config import load
from pso.hub import Hub
from pso.miniature import world
from pso.miniature.text import WINDOW
from pso.models import load_metric
from pso.provenance import UserError

CAPTIONS = list(world.OF_CAPTION)[::60]
LAION, HPS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "xswu/HPSv2"


# ---- open_clip's ViT and text tower, by their own names ----


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, quick: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})
        self.quick = quick

    def forward(self, x, mask=None):
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class Tower(nn.Module):
    def __init__(self, width, heads, inner, depth, quick):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, inner, quick) for _ in range(depth))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, c, quick):
        super().__init__()
        width = c.hidden_size
        self.conv1 = nn.Conv2d(3, width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((c.image_size // c.patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, c.num_attention_heads, c.intermediate_size, c.num_hidden_layers, quick)
        self.proj = nn.Parameter(torch.zeros(width, c.projection_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The model whose state dict has open_clip's names and shapes."""

    def __init__(self, config: CLIPConfig, quick: bool = False):
        super().__init__()
        c = config.text_config
        self.visual = Vision(config.vision_config, quick)
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(c.max_position_embeddings, c.hidden_size))
        self.transformer = Tower(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.num_hidden_layers, quick)
        self.ln_final = nn.LayerNorm(c.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(c.hidden_size, c.projection_dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids):
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=self.positional_embedding.dtype).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection  # the end of text has the highest id

    @torch.no_grad()
    def cosine(self, x, ids):
        dtype = self.positional_embedding.dtype
        return F.cosine_similarity(self.visual(x.to(dtype)), self.encode_text(ids))


def filled(model: nn.Module, seed: int) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ".ln_" in f".{name}" and name.endswith("weight")
            parameter.copy_(norm * 1.0 + 0.2 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Both files of xswu/HPSv2, stored in float16 as theirs, and the folder of the CLIP that they were tuned from."""
    hub = tmp_path_factory.mktemp("hub")
    made = toy.clip_files(tmp_path_factory.mktemp("clip"))["model"]
    shutil.copytree(made, hub / LAION)
    (hub / HPS).mkdir(parents=True)
    for name, seed in (("HPS_v2_compressed.pt", 1), ("HPS_v2.1_compressed.pt", 2)):
        state = filled(OpenClip(CLIPConfig.from_pretrained(made)), seed).half().state_dict()
        torch.save({"epoch": 3, "name": "a run", "state_dict": state}, hub / HPS / name)
    return hub


@pytest.fixture(scope="module")
def config(hub):
    return CLIPConfig.from_pretrained(hub / LAION)


@pytest.fixture
def files(hub):
    folder = hub / LAION
    return {"model": hub / HPS / "HPS_v2_compressed.pt", "architecture": folder / "config.json", "processor": folder}


def their_model(path, config, quick=False) -> OpenClip:
    model = OpenClip(config, quick).double()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model.eval()


def tokens(folder, prompts):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = tokenizer(prompts, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    return found["input_ids"]


def expected(model, files, images, prompts, transform=hps_letterbox224_noaa):
    x = torch.stack([transform(image, 32) for image in images])
    return model.cosine(x, tokens(files["processor"], prompts))


def odd_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (70, 48), (30, 90), (20, 20)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


# ---- the names ----


def test_names_and_shapes_are_open_clips(config):
    ours, theirs = to_open_clip(CLIPModel(config).state_dict()), OpenClip(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_there_and_back_changes_no_bit(config):
    state = CLIPModel(config).state_dict()
    back = from_open_clip(to_open_clip(state), list(state))
    assert list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state)
    theirs = filled(OpenClip(config), 5).state_dict()
    forth = to_open_clip(from_open_clip(theirs, list(state)))
    assert set(forth) == set(theirs) and all(torch.equal(forth[key], theirs[key]) for key in theirs)


def test_a_head_width_that_is_not_64_is_read_from_the_config(config):
    """ViT-H-14's vision heads are 80 wide."""
    wide = copy.deepcopy(config)
    wide.vision_config.hidden_size, wide.vision_config.num_attention_heads = 160, 2
    theirs = filled(OpenClip(wide), 7)
    model = load_open_clip(theirs.state_dict(), wide, "file", "cpu")
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, right = model.get_image_features(pixel_values=x).pooler_output, theirs.visual(x)
    assert (F.normalize(found, dim=-1) - F.normalize(right, dim=-1)).abs().max() < 1e-6


def test_features_are_open_clips(config):
    theirs = filled(OpenClip(config), 6)
    model = load_open_clip(theirs.state_dict(), config, "file", "cpu")
    rng = torch.Generator().manual_seed(0)
    x, ids = torch.randn(4, 3, 32, 32, generator=rng), torch.randint(0, 300, (4, WINDOW), generator=rng)
    ids[:, 9] = config.text_config.vocab_size - 1  # the end
    with torch.no_grad():
        image, text = model.get_image_features(pixel_values=x).pooler_output, model.get_text_features(ids).pooler_output
        for found, right in ((image, theirs.visual(x)), (text, theirs.encode_text(ids))):
            assert (F.normalize(found, dim=-1) - F.normalize(right, dim=-1)).abs().max() < 1e-6
    assert model.logit_scale == theirs.logit_scale


# ---- the scores ----


@pytest.mark.parametrize("transform", [hps_letterbox224_noaa, hps_letterbox224_aa])
def test_the_score_is_the_cosine_of_open_clips_model(files, config, transform):
    images, prompts = odd_pictures(), CAPTIONS[:4]
    more = {} if transform is hps_letterbox224_noaa else {"transform": transform.__name__}
    found = hps_v2.load(files, "cpu", **more)
    right = expected(their_model(files["model"], config), files, images, prompts, transform)
    assert (found.score(images, prompts) - right).abs().max() < 1e-6
    assert found.spec["transform"] == transform.__name__
    assert right.std() > 1e-2, "the random network tells the pictures apart"


def test_a_mistake_would_be_seen(files, config):
    images, prompts = odd_pictures(), CAPTIONS[:4]
    found, theirs = hps_v2.load(files, "cpu").score(images, prompts), their_model(files["model"], config)
    x = torch.stack([hps_letterbox224_noaa(image, 32) for image in images])
    ids = tokens(files["processor"], prompts)
    with torch.no_grad():
        unnormalised = (theirs.visual(x.double()) * theirs.encode_text(ids)).sum(-1)
    wrong = {
        "QuickGELU": their_model(files["model"], config, quick=True).cosine(x, ids),
        "antialias": expected(theirs, files, images, prompts, hps_letterbox224_aa),
        "crop": expected(theirs, files, images, prompts, clip_pil224),
        "BGR": theirs.cosine(x.flip(1), ids),
        "no norm": unnormalised,
        "other prompt": theirs.cosine(x, ids.flip(0)),
    }
    for mistake, score in wrong.items():
        assert (found - score).abs().max() > 1e-4, mistake


def test_a_prompt_is_cleaned_as_open_clip_does(files):
    scorer, image = hps_v2.load(files, "cpu"), odd_pictures()[:1]
    one, other = (scorer.score(image, [p]) for p in ("a &amp;amp; “red”  circle", 'A & "red" circle'))
    assert one == other != scorer.score(image, ["a red circle"])


def test_both_versions_are_one_code_with_other_weights(hub, config):
    images, prompts, metrics = odd_pictures(), CAPTIONS[:4], load().metrics
    found = {name: load_metric(name, metrics[name], Hub(hub), "cpu") for name in ("hps_v2", "hps_v21")}
    scores = {name: scorer.score(images, prompts) for name, scorer in found.items()}
    assert (scores["hps_v2"] - scores["hps_v21"]).abs().max() > 1e-2
    for name, scorer in found.items():
        entry = metrics[name]
        model = their_model(hub / HPS / entry.checkpoint.file, config)
        assert (scores[name] - expected(model, {"processor": hub / LAION}, images, prompts)).abs().max() < 1e-6
        recorded = {f"{HPS}/{entry.checkpoint.file}", f"{LAION}/config.json", f"{LAION}/vocab.json"}
        assert recorded <= set(scorer.spec["files"]) and len([f for f in scorer.spec["files"] if HPS in f]) == 1
        assert json.loads(json.dumps(scorer.spec)) == scorer.spec and entry.scale == 100 and entry.decimals == 2
    assert hps_v21.load is hps_v2.load


def test_a_score_depends_on_neither_order_nor_batch(files):
    scorer, images, prompts = hps_v2.load(files, "cpu"), odd_pictures(), CAPTIONS[:4]
    together = scorer.score(images, prompts)
    alone = torch.cat([scorer.score([i], [p]) for i, p in zip(images, prompts, strict=True)])
    turned = scorer.score(images[::-1], prompts[::-1]).flip(0)
    assert torch.allclose(alone, together, atol=1e-6) and torch.allclose(turned, together, atol=1e-6)


# ---- files that are not right ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_bias"), r"lacks \['visual\.transformer\.resb"),
        (lambda s: s.update(extra=torch.ones(1)), r"has \['extra'\] in excess"),
        (lambda s: s.update({"visual.proj": torch.ones(32, 64)}), r"proj of shape \[32, 64\]; expected \[64, 32\]"),
        (lambda s: s.update(note="text"), "entry 'state_dict', is no state dict"),
        (lambda s: [s.pop(k) for k in list(s)], "lacks"),
    ],
)
def test_a_file_with_other_keys_is_refused(files, tmp_path, change, message):
    state = dict(torch.load(files["model"], weights_only=True)["state_dict"])
    change(state)
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        hps_v2.load({**files, "model": tmp_path / "other.pt"}, "cpu")


def test_a_file_without_its_entry_is_refused(files, tmp_path):
    torch.save(torch.load(files["model"], weights_only=True)["state_dict"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt, entry 'state_dict', is no state dict"):
        hps_v2.load({**files, "model": tmp_path / "bare.pt"}, "cpu")


def test_another_activation_is_refused(files, tmp_path):
    text = files["architecture"].read_text()
    (tmp_path / "config.json").write_text(text.replace('"gelu"', '"quick_gelu"'))
    with pytest.raises(ValueError, match=r"hidden_act in .*config\.json is 'quick_gelu'; expected 'gelu'"):
        hps_v2.load({**files, "architecture": tmp_path / "config.json"}, "cpu")


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("kind", ["code", "cut", "random"])
def test_a_file_that_is_no_state_dict_is_refused_with_a_sentence(hub, files, tmp_path, capsys, kind):
    shutil.copytree(hub, tmp_path / "hub")
    path, raw = tmp_path / "hub" / HPS / "HPS_v2_compressed.pt", files["model"].read_bytes()
    if kind == "code":
        torch.save({**torch.load(path, weights_only=True), "extra": Code()}, path)
    else:
        path.write_bytes(raw[: len(raw) // 2] if kind == "cut" else bytes(range(256)) * 9)
    with pytest.raises(UserError, match=r"metrics\.hps_v2 cannot be loaded \(.*fetch its files again\.$"):
        load_metric("hps_v2", load().metrics["hps_v2"], Hub(tmp_path / "hub"), "cpu")
    assert "must not run" not in capsys.readouterr().out
