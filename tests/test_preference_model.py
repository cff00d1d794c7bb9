"""SPO's step-aware preference model: PickScore at initialisation, its loss, its file, its training and its verdict."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from PIL import Image
from safetensors.torch import load_file, save_file
from test_metrics import by_transformers
from toy import STOCHASTIC, TIMES, FakePairs

from baselines import preference_model as spm
from baselines import preference_training as training
from eval.metrics import pick_score
from pso.config import ROOT, ConfigError, load
from pso.entries import PreferenceModelFit
from pso.hub import Hub
from pso.mdp import Renoise
from pso.miniature import world
from pso.models import load_metric
from pso.policy import to_images
from pso.provenance import UserError
from pso.rollout import keyed_noise

CAPTIONS = list(world.OF_CAPTION)[::80]
FORKED = [749, 499, 0]
METRICS = load().metrics
FIT = PreferenceModelFit(num_pairs=20, num_steps=25, batch_size=16, learning_rate=3e-3, weight_decay=0.1, layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.clip_files(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def lite(files):
    return spm.load_lite(files, "cpu")


@pytest.fixture(scope="module")
def pictures():
    return toy.pictures(len(CAPTIONS))


def fresh(scorer, layers: int = 2, times=FORKED) -> spm.TimeConditioning:
    torch.manual_seed(1)
    return spm.TimeConditioning(scorer.base.model, times, layers)


def moved(scorer, std: float = 0.05, **more) -> spm.TimeConditioning:
    model = fresh(scorer, **more)
    for linear in (*model.adaptive, model.last):
        torch.nn.init.normal_(linear.weight, std=std)
    return model


def scored(scorer, model, pictures, t: int) -> torch.Tensor:
    return spm.StepScorer(scorer.base, {}, model, model.times).score(pictures, CAPTIONS, t)


# ---- the network ----


@pytest.mark.parametrize("t", FORKED)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_at_initialisation_it_is_pick_score_bit_for_bit(lite, pictures, t, layers):
    model = fresh(lite, layers)
    assert len(model.adaptive) == min(layers, 3)
    assert torch.equal(scored(lite, model, pictures, t), lite.score(pictures, CAPTIONS))


@pytest.mark.parametrize("layers", [1, 4])
def test_every_weight_moves_the_noisy_times_and_none_the_finished_picture(lite, pictures, layers):
    plain = lite.score(pictures, CAPTIONS)
    for which in range(min(layers, 3) + 1):
        model = fresh(lite, layers)
        torch.nn.init.normal_([*model.adaptive, model.last][which].weight, std=0.05)
        found = [scored(lite, model, pictures, t) for t in FORKED]
        assert (found[0] - plain).abs().max() > 1e-3 < (found[0] - found[1]).abs().max()
        assert torch.equal(found[2], plain)


def test_gates_that_begin_at_zero_would_be_another_model(lite, pictures):
    class WithoutGates(spm.TimeConditioning):
        def image_features(self, clip, x, row):
            shut = torch.zeros(1, self.time.embedding_dim)
            for adapt in self.adaptive:
                adapt.forward = lambda time: torch.cat([shut, shut, shut - 1] * 2, 1).expand(len(time), -1)
            return super().image_features(clip, x, row)

    torch.manual_seed(1)
    model = WithoutGates(lite.base.model, FORKED, 2)
    assert not torch.allclose(scored(lite, model, pictures, 749), lite.score(pictures, CAPTIONS), atol=1e-2)


def test_the_definition_of_a_modulated_layer(lite, pictures):
    """Against hooks on the base's own forward."""
    model, clip = moved(lite, layers=1), lite.base.model
    time = F.silu(model.time.weight[1])
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = model.adaptive[0](time).chunk(6)
    shift, scale = model.last(time).chunk(2)
    vision = clip.vision_model
    layer = vision.encoder.layers[-1]
    hooks = [
        layer.layer_norm1.register_forward_hook(lambda m, a, out: out * (1 + scale_1) + shift_1),
        layer.self_attn.register_forward_hook(lambda m, a, out: (out[0] * (1 + gate_1), out[1])),
        layer.layer_norm2.register_forward_hook(lambda m, a, out: out * (1 + scale_2) + shift_2),
        layer.mlp.register_forward_hook(lambda m, a, out: out * (1 + gate_2)),
        vision.post_layernorm.register_forward_hook(lambda m, a, out: out * (1 + scale) + shift),
    ]
    expected = lite.score(pictures, CAPTIONS)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(scored(lite, model, pictures, 499), expected, atol=1e-5)
    assert not torch.allclose(lite.score(pictures, CAPTIONS), expected, atol=1e-3)


def test_pictures_of_different_times_may_share_a_batch(lite, pictures):
    model, base = moved(lite), lite.base
    x = base.pixels(pictures[:3])
    together = model.image_features(base.model, x, torch.tensor([0, 1, 2]))
    for i in range(3):
        alone = model.image_features(base.model, x[i : i + 1], torch.tensor([i]))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


@pytest.mark.parametrize("times", [[749, 499], [749, 749, 0]])
def test_times_are_different_and_hold_zero(lite, times):
    with pytest.raises(ValueError, match="expected different times, and 0 among them"):
        fresh(lite, times=times)


# ---- the scorers ----


def test_the_score_is_the_logit_that_transformers_computes(files, lite, pictures):
    scale = lite.base.model.logit_scale.exp().item()
    expected = scale * by_transformers(files["model"], pictures, CAPTIONS).detach()
    assert torch.allclose(lite.score(pictures, CAPTIONS, 499), expected, atol=1e-4)
    cosine = pick_score.load(files, "cpu").score(pictures, CAPTIONS)
    assert torch.allclose(lite.score(pictures, CAPTIONS), scale * cosine, atol=1e-5) and scale > 2
    assert lite.step_aware


def saved(path, model, agreement: dict, times=FORKED, layers=2, **drop) -> dict:
    state = {k: v.contiguous() for k, v in model.state_dict().items()} | drop
    about = {"times": times, "layers": layers, "agreement": agreement}
    save_file({k: v for k, v in state.items() if v is not None}, path, {"spm": json.dumps(about)})
    return about


def verdicts(**of) -> dict:
    return {t.removeprefix("t"): {"pairs": 9, "verdict": v} for t, v in of.items()}


@pytest.mark.parametrize(
    ("given", "used"),
    [(("go", "go"), {749, 499}), (("go", "no-go"), {749}), (("no-go", "go"), {499}), (("no-go", "no-go"), set())],
)
def test_it_is_used_at_the_times_of_a_go_and_says_where_it_is_not(files, lite, pictures, tmp_path, given, used):
    model = moved(lite)
    saved(tmp_path / "spm.safetensors", model, verdicts(t749=given[0], t499=given[1]))
    found = spm.load_distilled({**files, "head": tmp_path / "spm.safetensors"}, "cpu")
    for t in FORKED:
        expected = scored(lite, model, pictures, t) if t in used else lite.score(pictures, CAPTIONS)
        assert torch.equal(found.score(pictures, CAPTIONS, t), expected)
        assert found.spec["scored_by"][str(t)] == ("spm_distilled" if t in used else "spm_lite")
    assert json.loads(json.dumps(found.spec)) == found.spec


def test_a_time_that_it_was_not_trained_for_is_one_sentence(files, lite, pictures, tmp_path):
    saved(tmp_path / "spm.safetensors", moved(lite), verdicts(t749="no-go", t499="no-go"))
    found = spm.load_distilled({**files, "head": tmp_path / "spm.safetensors"}, "cpu")
    with pytest.raises(UserError, match=r"^the preference model was trained for times 749, 499, 0, not 759; train one"):
        found.score(pictures, CAPTIONS, 759)


BROKEN = {
    "a tensor missing": {"time.weight": None},
    "a tensor too many": {"extra.weight": torch.zeros(1)},
    "another width": {"last.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("kind", [*BROKEN, "another depth", "no metadata", "cut short"])
def test_a_file_is_loaded_strictly(files, lite, tmp_path, kind):
    path = tmp_path / "spm.safetensors"
    saved(path, moved(lite), {}, layers=1 if kind == "another depth" else 2, **BROKEN.get(kind, {}))
    if kind == "no metadata":
        save_file(load_file(path), path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"spm\.safetensors is no preference model on this PickScore \(.*\); train it"):
        spm.load_distilled({**files, "head": path}, "cpu")


def test_the_entries_the_job_and_the_rule_name_one_file():
    head = METRICS["spm_distilled"].head
    assert head.repo == spm.REPOSITORY == METRICS["spm_released"].head.repo
    assert head.file.replace("{model}", "sdxl_dmd2") == training.file_name("sdxl_dmd2")
    rule = (ROOT / "workflow" / "rules" / "preference_model.smk").read_text()
    assert f"{spm.REPOSITORY}/{{{{model}}}}" in rule
    assert re.search(r"\{\{model\}\}(_[\w-]+\.safetensors)", rule)[1] == training.file_name("")


def test_a_run_gets_the_head_of_its_own_model(files, lite, pictures, tmp_path):
    entry, model = METRICS["spm_distilled"], moved(lite)
    for repo in (entry.checkpoint.repo, entry.checkpoint.processor):
        (tmp_path / repo).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / repo).symlink_to(files["model"], target_is_directory=True)
    (tmp_path / spm.REPOSITORY).mkdir(parents=True)
    saved(tmp_path / spm.REPOSITORY / training.file_name("sdxl_dmd2"), model, verdicts(t749="go", t499="no-go"))
    hub = Hub(tmp_path)
    found = load_metric("spm_distilled", entry, hub, "cpu", "sdxl_dmd2")
    assert torch.equal(found.score(pictures, CAPTIONS, 749), scored(lite, model, pictures, 749))
    assert {i["file"] for i in hub.inputs()} >= {training.file_name("sdxl_dmd2"), "model.safetensors"}
    with pytest.raises(UserError, match="has no file sdxl_turbo_step-aware_preference_model.safetensors in the hub"):
        load_metric("spm_distilled", entry, hub, "cpu", "sdxl_turbo")
    with pytest.raises(ConfigError, match="metrics.spm_distilled has a head for each model, so it can only be a meth"):
        load_metric("spm_distilled", entry, hub, "cpu")


# ---- the loss ----


def test_a_perfect_tie_costs_nothing_and_a_wrong_one_something():
    tied = torch.full((3,), 0.5)
    assert spm.preference_loss(torch.tensor([[3.0, 3.0], [-1.0, -1.0], [0.0, 0.0]]), tied).item() == 0.0
    assert spm.preference_loss(torch.tensor([[3.0, 2.0]]), tied[:1]).item() > 0.1
    assert F.cross_entropy(torch.zeros(1, 2), torch.full((1, 2), 0.5)).item() == pytest.approx(toy.LOG_2)  # uncorrected


def test_a_decided_pair_costs_minus_log_sigmoid_of_its_margin():
    logits = toy.randn(0, 6, 2, dtype=torch.float64)
    label = torch.tensor([1.0, 0.0] * 3, dtype=torch.float64)
    margin = np.where(label == 1, 1, -1) * (logits[:, 0] - logits[:, 1]).numpy()
    each = toy.minus_log_sigmoid(margin)
    assert spm.preference_loss(logits, label).item() == pytest.approx(each.mean(), rel=1e-12)
    weight = torch.tensor([1.0, 0.5, 0.25, 1.0, 2.0, 0.1], dtype=torch.float64)
    expected = (each * weight.numpy()).sum() / weight.sum().item()
    assert spm.preference_loss(logits, label, weight).item() == pytest.approx(expected, rel=1e-12)
    assert spm.preference_loss(logits, 1 - label).item() != pytest.approx(each.mean(), rel=1e-3)


def test_labels_are_ties_where_pick_score_is_not_sure():
    """p_0 - p_1 = tanh(margin / 2) against 0.1: a margin of 0.2007."""
    margins = torch.tensor([5.0, 0.21, 0.19, 0.0, -0.19, -0.21])
    found = spm.labels(torch.stack([margins, torch.zeros(6)], 1))
    assert found.tolist() == [1.0, 1.0, 0.5, 0.5, 0.5, 0.0]


# ---- what it is trained on ----


class Cache(FakePairs):
    """Ten pairs of latents of the toy policy; the first two pairs have one prompt."""

    prompt_index = torch.tensor([0, 0, 1, 2, 3, 1, 2, 3, 1, 2])
    prompts = toy.PROMPTS

    def __init__(self, policy):
        super().__init__(shape=toy.SHAPE)
        self.encoded = policy.encode_prompts(toy.PROMPTS)

    def condition(self, device):
        return self.encoded


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_it_sees_what_the_network_predicts_of_a_pair_noised_with_one_eps(lite, kind):
    policy, chain, base = toy.new_policy(), kind(TIMES), lite.base
    cache = Cache(policy)
    found = training.look(policy, chain, cache, base, 10, seed=3)
    assert found.x.shape == (10, 2, 2, 3, 32, 32) and policy.unet_forwards == 10 * 2 * 2
    for place, n in enumerate((3, 2)):
        for j, side in enumerate(("target", "reference")):
            number, clean = torch.full((10,), n), cache.means[side]
            eps = keyed_noise([(3, "preference model", i) for i in range(10)], n, toy.SHAPE)
            x = chain.noise_to(number, clean, eps)
            rows = cache.encoded.rows(cache.prompt_index)
            x0 = chain.x0_hat(number, x, policy.eps(chain, number, x, rows, pre=True))
            pixels = base.pixels(to_images(policy.decode(x0)))
            assert (found.x[:, j, place].float() - pixels).abs().mean() < 2e-3
    texts = [toy.PROMPTS[i] for i in cache.prompt_index]
    for j, side in enumerate(("target", "reference")):
        expected = lite.score(to_images(policy.decode(cache.means[side])), texts)
        assert torch.allclose(found.clean[:, j], expected, atol=1e-4)
    assert found.weight.tolist() == pytest.approx(
        [1 / 2] * 2 + [1 / 3, 1 / 3, 1 / 2] + [1 / 3, 1 / 3, 1 / 2] + [1 / 3] * 2
    )


def test_whole_prompts_are_held_out_about_one_in_ten(lite, monkeypatch):
    names = [f"prompt {i}" for i in range(500)]
    held = [training.keyed_seed("held out", name) % training.HELD_OUT == 0 for name in names]
    assert 30 < sum(held) < 75
    policy = toy.new_policy()
    monkeypatch.setattr(training, "HELD_OUT", 3)
    found = training.look(policy, Renoise(TIMES), cache := Cache(policy), lite.base, 10, seed=0)
    by_prompt = {(p, h) for p, h in zip(cache.prompt_index.tolist(), found.held_out.tolist(), strict=True)}
    assert len(by_prompt) == 4 and {h for _, h in by_prompt} == {True, False}


def test_large_pictures_are_looked_at_few_at_a_time_and_kept_off_the_network_s_device(lite, monkeypatch):
    """64 pairs of 1024 px are 128 pictures, for which the VAE alone would want 250 GB."""
    policy, most = toy.new_policy(), []
    decode = policy.decode
    monkeypatch.setattr(policy, "decode", lambda latents: (most.append(len(latents)), decode(latents))[1])
    monkeypatch.setattr(training, "at_once", lambda resolution: 4 if resolution == policy.resolution else 0)
    parts = training.look(policy, Renoise(TIMES), Cache(policy), lite.base, 10, seed=3)
    assert most == [8] * 3 + [8] * 3 + [4] * 3  # the clean pictures and two times, three parts
    monkeypatch.setattr(training, "at_once", lambda resolution: 64)
    whole = training.look(policy, Renoise(TIMES), Cache(policy), lite.base, 10, seed=3)
    assert parts.x.device.type == "cpu" and (parts.x.float() - whole.x.float()).abs().mean() < 2e-3
    assert torch.allclose(parts.clean, whole.clean, atol=1e-4) and torch.equal(parts.weight, whole.weight)


# ---- training and verdict ----


def noisy_pairs(scorer, count: int = 60) -> training.Pairs:
    """Pictures of the world against others; at 749 each is shown as its negative, so that PickScore is misled."""
    images, captions, *_ = world.render_many(2 * count, 9)
    base = scorer.base
    clean = base.pixels([Image.fromarray(i) for i in images]).unflatten(0, (count, 2))
    text = base.text_features(list(captions[::2]))
    features = F.normalize(base.model.get_image_features(pixel_values=clean.flatten(0, 1)).pooler_output, dim=-1)
    logits = 30 * (features.detach().unflatten(0, (count, 2)) * text[:, None]).sum(-1)
    held = torch.arange(count) % 4 == 0
    return training.Pairs(torch.stack([-clean, clean], 2).half(), logits, text, torch.ones(count), held)


def test_training_lowers_its_loss_and_leaves_pick_score_alone(lite):
    pairs = noisy_pairs(lite)
    lite.base.model.requires_grad_(False)
    before = {k: v.clone() for k, v in lite.base.model.state_dict().items()}
    model, row = fresh(lite), torch.zeros(len(pairs.clean), dtype=torch.long)

    def value() -> float:
        with torch.no_grad():
            logits = training.logits_of(model, lite.base, pairs, row)
        return spm.preference_loss(logits, spm.labels(pairs.clean)).item()

    first = value()
    training.descend(model, lite.base, pairs, FIT, seed=0)
    assert value() < 0.8 * first
    assert all(torch.equal(v, before[k]) for k, v in lite.base.model.state_dict().items())
    assert not model.time.weight[FORKED.index(0)].any()
    again = fresh(lite)
    training.descend(again, lite.base, pairs, FIT, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    some, other = fresh(lite), fresh(lite)  # by number as from a copy of these rows alone
    training.descend(some, lite.base, pairs, FIT, 0, (~pairs.held_out).nonzero()[:, 0])
    training.descend(other, lite.base, pairs.rows(~pairs.held_out), FIT, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(some.parameters(), other.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(some.parameters(), model.parameters(), strict=True))


def test_only_a_model_that_beats_lite_is_a_go(lite):
    pairs = noisy_pairs(lite)
    lite.base.model.requires_grad_(False)
    same = training.agreement(fresh(lite), lite.base, pairs)  # untrained: equal is not better
    assert {v["verdict"] for v in same.values()} == {"no-go"} and list(same) == ["749", "499"]
    decided = int((pairs.held_out & (spm.labels(pairs.clean) != 0.5)).sum())
    assert all(v["pairs"] == decided and v["gained"] == v["lost"] == 0 for v in same.values())
    assert same["749"]["spm"] == same["749"]["spm_lite"] < same["499"]["spm_lite"]
    everything = training.Pairs(pairs.x, pairs.clean, pairs.text, pairs.weight, torch.ones(60).bool())
    model = fresh(lite)
    training.descend(model, lite.base, everything, FIT, seed=0)
    found = training.agreement(model, lite.base, everything)["749"]  # on what it has seen
    assert found["verdict"] == "go" and found["spm"] > found["spm_lite"]
    assert (found["gained"] - found["lost"]) / found["pairs"] == pytest.approx(
        found["spm"] - found["spm_lite"], abs=1e-4
    )


def test_without_a_decided_pair_nothing_can_be_said_for_it(lite):
    pairs = noisy_pairs(lite, 8)
    nothing = training.Pairs(pairs.x, torch.zeros(8, 2), pairs.text, pairs.weight, pairs.held_out)
    found = training.agreement(fresh(lite), lite.base, nothing)
    assert found == {str(t): {"pairs": 0, "verdict": "no-go"} for t in (749, 499)}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    shares = [training.learning_rate(d) for d in np.linspace(0, 1, 141)]
    peak = int(np.argmax(shares))
    assert peak == 10 and shares[peak] == pytest.approx(1.0) and shares[0] == 0.0 and shares[-1] == 0.0
    assert (np.diff(shares[: peak + 1]) > 0).all() and (np.diff(shares[peak:]) < 0).all()


def test_every_scale_says_how_it_is_trained():
    for scale in ("smoke", "miniature"):
        assert load({"scale": scale}).scale_entry.preference_model.layers == 4
