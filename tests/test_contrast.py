"""What the baselines' batches are: which pairs, times, captions and embeddings; their file, and their entries."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from test_config import SHIPPED, nested, parse_shipped_files_once, refusal  # noqa: F401
from test_config_methods import lines_of
from test_pairs import row, shards
from toy import CONDITION, PAIRS, STOCHASTIC, TEXTS, TIMES, FakeEmbeddings, FakePairs, FakePolicy

from baselines import diffusion, diffusion_dpo, mapo, rpo
from pso import embeddings as file_of
from pso import pso_offline, sources
from pso.config import ConfigError, check, load
from pso.data import parse_image
from pso.embeddings import PairEmbeddings, embeddings_file
from pso.evidence import EvidenceConfig, gather
from pso.hub import Hub
from pso.mdp import Ancestral, Renoise
from pso.provenance import UserError
from pso.sources import ContrastPairs, Given
from pso.tune import inputs_of

CONFIGS = {
    diffusion_dpo: {"beta": 100.0},
    rpo: {"beta": 100.0, "distance": "multi", "temperature": 0.1, "group_size": 2},
    mapo: {"beta": 0.1, "margin_scale": 1000.0, "snr": 0.5},
    diffusion: {},
}
BASELINES = [pytest.param(m, id=m.__name__) for m in CONFIGS if m is not diffusion]
DROPPING = [pytest.param(m, id=m.__name__) for m in CONFIGS if m is not mapo]


def new(module, kind=Renoise, batch_size: int = 4, times: str = "uniform", **cfg):
    """A module's source on fakes."""
    config = module.Config(**CONFIGS[module] | {"times": times} | cfg)
    given = Given(FakePolicy(), kind(TIMES), config, 0, batch_size, FakePairs(0.5), TEXTS, CONDITION)
    given.embeddings = FakeEmbeddings() if module is rpo else None
    return getattr(sources, module.SOURCE)(given)


def same(one, other, rows) -> bool:
    return all(torch.equal(getattr(one, k)[rows], getattr(other, k)[rows]) for k in ("n", "x", "answer"))


# ---- pairs and noise ----


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("times", ["uniform", "sampler_grid"])
def test_all_methods_see_the_same_pairs_at_the_same_times_with_the_same_eps(kind, times):
    for update in (0, 3):
        dpo, again, naive, contrast = (
            new(m, kind, times=times).batch(update) for m in (diffusion_dpo, mapo, diffusion, rpo)
        )
        assert same(dpo.target, again.target, ...) and same(dpo.reference, again.reference, ...)
        assert same(dpo.target, naive.target, ...) and naive.reference is None
        for batch in (again, naive, contrast):
            assert torch.equal(batch.prompts, dpo.prompts)
        leaders = [0, 2]  # of the two groups
        assert same(dpo.target, contrast.target, leaders) and same(dpo.reference, contrast.reference, leaders)
        assert not same(dpo.target, contrast.target, [1, 3])


def test_grid_times_have_the_noise_of_offline_pso():
    everything = sources.PreferencePairs(
        replace(new(diffusion_dpo).given, cfg=pso_offline.Config(beta=5.0, timestep_mode="trajectory_sum"))
    ).batch(2)
    batch = new(diffusion_dpo, times="sampler_grid").batch(2)
    shared = batch.target.n[:, 0] > 1  # Offline-PSO has no last transition
    column = (4 - batch.target.n[:, 0]).clamp(max=2)
    for side, of_all in zip(batch.sides, everything.sides, strict=True):
        found = [torch.equal(a, b) for a, b in zip(side.x[:, 0], of_all.x[torch.arange(4), column], strict=True)]
        assert found == shared.tolist() and any(found)


@pytest.mark.parametrize("module", BASELINES)
def test_a_pair_has_one_time_and_one_eps(module):
    batch = new(module).batch(0)
    assert torch.equal(batch.target.n, batch.reference.n) and batch.target.n.shape == (4, 1)
    assert torch.equal(batch.target.answer, batch.reference.answer)
    assert not torch.equal(batch.target.x, batch.reference.x)


# ---- times ----


def times_of(source, updates: int = 400) -> np.ndarray:
    steps = torch.cat([source.steps(u, source.samples(u)) for u in range(updates)])
    return source.chain.time(steps).numpy().reshape(updates, -1)


@pytest.mark.parametrize("module", BASELINES)
def test_times_are_uniform_or_all_of_the_samplers(module):
    found = times_of(new(module))[:, ::2].ravel()  # a pair of each group
    assert kstest(found, "randint", args=(0, 1000)).pvalue > 0.01
    grid = times_of(new(module, times="sampler_grid"))[:, ::2].ravel()
    counts = dict(zip(*np.unique(grid, return_counts=True), strict=True))
    assert sorted(counts) == sorted(TIMES) and chisquare(list(counts.values())).pvalue > 0.01


def test_only_a_contrast_group_shares_its_time():
    for size in (1, 2, 4):
        found = times_of(new(rpo, group_size=size)).reshape(-1, size)
        assert (found == found[:, :1]).all()
        assert len({*found[:, 0]}) > 0.6 * min(len(found), 1000)
    assert np.mean([len({*row}) for row in times_of(new(diffusion_dpo))]) > 3.9


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_a_kl_is_told_only_of_steps_that_the_sampler_takes(kind):
    for times, told in (("uniform", False), ("sampler_grid", True)):
        source = new(diffusion_dpo, kind, times=times)
        n = torch.tensor([[4], [3]])
        side = source.noised("target", 0, [0, 1], n, True)
        evidence = gather(source.chain, side, side.answer + 0.1, side.answer, EvidenceConfig())
        assert (evidence.kl is not None) is told
    with_kernel = gather(kind(list(range(999, -1, -1))), side, side.answer + 0.1, side.answer, EvidenceConfig())
    assert with_kernel.kl is not None  # of a chain of a thousand steps, which nobody samples


# ---- captions ----


@pytest.mark.parametrize("module", DROPPING)
def test_a_share_of_captions_is_replaced_by_the_empty_one(module):
    source, whole = new(module, caption_dropout=0.2), new(module)
    condition = source.given.condition
    assert len(condition) == PAIRS + 1 and condition.pooled[-1].item() == -1  # what FakePolicy makes of ""
    assert torch.equal(condition.pooled[:-1], CONDITION.pooled)
    rows, before = (torch.stack([s.batch(u).prompts for u in range(300)]) for s in (source, whole))
    dropped = rows == PAIRS
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.04)  # 1200 captions
    assert torch.equal(rows[~dropped], before[~dropped]) and not torch.equal(dropped[0], dropped[1])
    assert whole.given.condition is CONDITION and (before < PAIRS).all()


def test_methods_drop_the_same_captions_and_embeddings_stay():
    dropping = [new(m, caption_dropout=0.5).batch(1) for m in (diffusion_dpo, rpo, diffusion)]
    assert all(torch.equal(b.prompts, dropping[0].prompts) for b in dropping)
    assert (dropping[0].prompts == PAIRS).any()
    assert torch.equal(dropping[1].embeddings["text"], new(rpo).batch(1).embeddings["text"])


# ---- embeddings of a batch ----


def test_embeddings_are_those_of_the_batchs_pairs():
    batch, plain = new(rpo).batch(5), new(diffusion_dpo).batch(5)
    expected = FakeEmbeddings().rows(batch.prompts.tolist(), None)  # a fake pair has its own prompt
    assert batch.embeddings.keys() == {"text", "target", "reference"} and plain.embeddings is None
    assert all(torch.equal(batch.embeddings[k], expected[k]) for k in expected)
    assert not torch.equal(batch.embeddings["text"], batch.embeddings["text"].roll(1, 0))


def test_what_a_contrast_source_needs():
    given = new(rpo).given
    with pytest.raises(ConfigError, match="no embeddings, by which its SOURCE ContrastPairs tells"):
        ContrastPairs(replace(given, embeddings=None))
    with pytest.raises(ConfigError, match=r"objective.group_size is 3; expected a divisor of tune.batch_size \(4\)"):
        new(rpo, group_size=3)


def test_zero_terminal_snr_is_refused_without_the_ancestral_sampler():
    new(diffusion_dpo, Ancestral, zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="objective.zero_terminal_snr is true; expected false for a model whose"):
        new(diffusion_dpo, Renoise, zero_terminal_snr=True)


# ---- their file ----


class FakeClip:
    """Vectors that tell pictures and texts apart."""

    spec = {"metric": "fake"}

    def image_features(self, images):
        return torch.tensor(np.stack([np.asarray(i).reshape(-1, 3).mean(0) for i in images])).float()

    def text_features(self, prompts):
        return torch.tensor([[float(len(p)), float(p[-1]), 1.0] for p in prompts])


class OfTheFile:
    """A PairCache's pairs."""

    prompts, prompt_index = ["caption 0", "caption 1", "caption 2"], torch.arange(70) % 3

    def __len__(self) -> int:
        return 70


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The results folder with the embeddings of 70 pairs; the second of all rows is a tie."""
    config = load({"scale": "smoke"})
    rows = [row(n, label_0=float(n % 2), label_1=float(1 - n % 2)) for n in range(70)]
    rows.insert(1, row(70, label_0=0.5, label_1=0.5))
    shards(tmp_path / "smoke/hub" / config.datasets["pickapic_v2"].repo, rows)
    monkeypatch.setattr(file_of, "load_metric", lambda name, *_: FakeClip() if name == "clip_score" else object())
    file_of.build(config, "clip_score", "pickapic_v2", tmp_path)
    return tmp_path


def test_the_file_holds_every_pair_once_in_its_order(built):
    found = PairEmbeddings("smoke", "clip_score", "pickapic_v2", OfTheFile(), built)
    assert {k: len(v) for k, v in found.tensors.items()} == {"target": 70, "reference": 70, "text": 3}
    index = [69, 3, 64]
    rows, plain = found.rows(index, "cpu"), row(0)
    pictures = FakeClip().image_features([parse_image(plain[k]) for k in ("jpg_0", "jpg_1")])
    texts = FakeClip().text_features([f"caption {i % 3}" for i in index])
    for k, i in enumerate(index):
        target = pictures[0 if i % 2 else 1]  # label_0 is 1 where i is odd
        torch.testing.assert_close(rows["target"][k], target / target.norm(), rtol=1e-3, atol=1e-3)  # 16 bits
        torch.testing.assert_close(rows["text"][k], texts[k] / texts[k].norm(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rows["target"], rows["reference"], atol=1e-2)
    assert all(torch.allclose(v.norm(dim=-1), torch.ones(3), atol=1e-6) for v in rows.values())
    about = json.loads(embeddings_file("smoke", "clip_score", "pickapic_v2", built).with_suffix(".json").read_text())
    assert about["counts"]["dropped"]["tie"] == 1 and about["spec"] == {"metric": "fake"}
    assert len(about["inputs"]) == 2 and about["job"] == "embeddings"
    first = {"file": "cache/clip_score/pickapic_v2.safetensors", "sha256": about["sha256"]}
    assert {k: v for k, v in found.inputs[0].items() if k != "made_from"} == first
    assert found.inputs[1:] == about["inputs"]


def test_a_file_of_other_pairs_is_refused(built):
    other = OfTheFile()
    other.prompts = ["caption 0", "caption 2", "caption 1"]
    with pytest.raises(UserError, match="of other pairs than the cached latents; `python -m pso.embeddings --metric"):
        PairEmbeddings("smoke", "clip_score", "pickapic_v2", other, built)
    with pytest.raises(
        UserError, match="is missing; `python -m pso.embeddings --metric pick_score --dataset pickapic_"
    ):
        PairEmbeddings("smoke", "pick_score", "pickapic_v2", OfTheFile(), built)


def test_a_run_whose_embeddings_are_not_there_ends_before_it_begins(built):
    found = PairEmbeddings("smoke", "clip_score", "pickapic_v2", OfTheFile(), built)
    found.require(0, 1000, ())
    found.place[9] = -1
    with pytest.raises(UserError, match="lacks 1 of 70 pairs that 1000 visits with seed 0 need; `python -m pso.embed"):
        found.require(0, 1000, ())
    with pytest.raises(UserError, match=r"no embedding is kept of a pair of \[3, 9\]; `python -m pso.embeddings"):
        found.rows([3, 9], "cpu")


def test_a_damaged_file_is_refused(built):
    path = embeddings_file("smoke", "clip_score", "pickapic_v2", built)
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.raises(UserError, match="sha256 differs.; `python -m pso.embeddings --metric clip_score .* it anew"):
        PairEmbeddings("smoke", "clip_score", "pickapic_v2", OfTheFile(), built)


def test_the_files_behind_embeddings_stand_in_the_record_of_a_run(built):
    given = new(rpo).given
    given.pairs.inputs = [{"file": "latents", "sha256": "0"}]
    given.embeddings = PairEmbeddings("smoke", "clip_score", "pickapic_v2", OfTheFile(), built)
    names = [entry["file"] for entry in inputs_of(Hub(built), given)]
    assert names[:2] == ["latents", "cache/clip_score/pickapic_v2.safetensors"] and len(names) == 4


def test_a_metric_that_embeds_nothing_is_refused(built):
    with pytest.raises(ConfigError, match="--metric is 'sharpness', which embeds no captions and pictures; expected"):
        file_of.build(load({"scale": "smoke"}), "sharpness", "pickapic_v2", built)


# ---- entries ----

TWICE = ["dpo", "rpo", "mapo"]
WHOSE = r"# .*(authors'|their|launcher's|our adaptation|\bopen\b)"
NEW = [*(f"{m}_{kind}" for m in TWICE for kind in ("transplant", "adapted")), "published_turbo_dpo", "sft"]


@pytest.mark.parametrize("method", ["rpo_transplant", "rpo_adapted"])
def test_a_contrast_method_needs_the_name_of_a_metric(method):
    assert refusal(nested(f"methods.{method}.embeddings", None)) == (
        f"methods.{method}.embeddings is None; expected the name of a metric, by whose CLIP ContrastPairs of "
        "baselines.rpo compares its pairs."
    )
    text = refusal(nested(f"methods.{method}.embeddings", "clip_scor"))
    assert text == f"methods.{method}.embeddings is 'clip_scor' (text), which has no entry; did you mean clip_score?"


@pytest.mark.parametrize("name", TWICE)
def test_a_baseline_stands_twice_and_differs_in_what_the_spec_says(name):
    first, second = (dict(SHIPPED["methods"][f"{name}_{kind}"]) for kind in ("transplant", "adapted"))
    assert (first["objective"]["times"], second["objective"]["times"]) == ("uniform", "sampler_grid")
    assert {k for k in first if first[k] != second[k]} == {"title", "objective"}
    changed = {k for k, v in first["objective"].items() if second["objective"].get(k) != v}
    assert changed == {"times"} | (set() if name == "mapo" else {"beta", "caption_dropout"})
    offline = SHIPPED["methods"]["pso_offline"]
    assert first["tune"] == second["tune"] == offline["tune"] and first["data"] == offline["data"]


@pytest.mark.parametrize("scale", ["miniature", "smoke"])
@pytest.mark.parametrize("name", NEW)
def test_a_baseline_has_offline_psos_budget_at_every_small_scale(scale, name):
    methods = load({"scale": scale}).methods
    assert methods[name].tune == methods["pso_offline"].tune


def test_values_of_the_recipes():
    methods = SHIPPED["methods"]
    assert [methods[f"{m}_transplant"]["objective"]["beta"] for m in TWICE] == [5000.0, 5000.0, 0.1]
    assert methods["mapo_adapted"]["objective"] == {
        "beta": 0.1, "margin_scale": 1000.0, "snr": 0.5, "times": "sampler_grid",
    }  # fmt: skip
    assert [m for m in methods if methods[m]["objective"].get("zero_terminal_snr")] == ["published_turbo_dpo"]
    assert all("reconstruction" in methods[m]["title"] for m in methods if methods[m]["module"] == "baselines.rpo")


def test_every_value_of_a_baseline_says_whose_it_is_or_that_it_is_open():
    keys = {k for m in NEW for k in SHIPPED["methods"][m]["objective"]}
    stated = [(o, k, line) for o, k, line in lines_of("methods") if o in NEW and k in keys]
    assert len({o for o, _, _ in stated}) == len(NEW)
    for owner, key, line in stated:
        assert re.search(WHOSE, line), f"{owner}.{key}: {line.strip()!r}"


# ---- what a Config refuses ----

WHERE = "methods.m.objective"
REFUSALS = [
    (diffusion_dpo, {"beta": "5e3"}, "beta is '5e3' (text); expected a number; YAML reads it as text, write 5000.0."),
    (diffusion_dpo, {"times": "grid"}, "times is 'grid' (text); expected 'uniform' or 'sampler_grid'."),
    (diffusion_dpo, {"timestep_mode": "sample_one"}, "timestep_mode is not a known key; known keys: beta, "),
    (diffusion_dpo, {"caption_dropout": 1.0}, "caption_dropout is 1.0; expected a number below 1.0."),
    (rpo, {"temperature": 0.0}, "temperature is 0.0; expected a number above 0.0."),
    (rpo, {"distance": "clip"}, "distance is 'clip' (text); expected 'text', 'image' or 'multi'."),
    (rpo, {"group_size": 0}, "group_size is 0; expected a number above 0."),
    (mapo, {"reduction": "sum"}, "reduction is not a known key; known keys: beta, margin_scale, snr, times."),
    (mapo, {"margin_scale": -1.0}, "margin_scale is -1.0; expected a number above 0.0."),
]


@pytest.mark.parametrize(("module", "change", "sentence"), REFUSALS)
def test_config_refuses_in_one_sentence(module, change, sentence):
    check(module.Config, CONFIGS[module] | {"times": "uniform"}, WHERE)
    with pytest.raises(ConfigError) as caught:
        check(module.Config, CONFIGS[module] | {"times": "uniform"} | change, WHERE)
    assert str(caught.value).startswith(f"{WHERE}.{sentence}")
