"""The memo of pre's errors: the same gradients, no call of pre where a number is known, no number of another run."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toy
from safetensors.torch import load_file
from toy import ALPHA_BAR, SHAPE, TEXTS, TIMES, FakeEmbeddings, FakePairs, new_policy, quiet  # noqa: F401

from baselines import diffusion_dpo, mapo, rpo
from pso import memo as memos
from pso import pso, pso_offline, pso_online, sources
from pso.config import ConfigError
from pso.evidence import Side, forward_ratio, gather_remembered, squared_error
from pso.mdp import Ancestral, Renoise
from pso.memo import Memo, identity, refuse
from pso.objective import Objective, numbers
from pso.sources import ContrastPairs, Given, OnlinePairs, PreferencePairs, TargetsAgainstModel

PAPER = {"beta": 5.0, "timestep_mode": "trajectory_sum"}
DEFAULTS = {
    pso_offline: PAPER,
    rpo: {"beta": 5.0, "distance": "multi", "temperature": 1.0, "group_size": 2, "times": "sampler_grid"},
    diffusion_dpo: {"beta": 5.0, "times": "uniform"},
}
PAIRS = 4  # in an update


def double_policy():
    policy = new_policy(rank=None)
    policy.unet.double()
    policy.add_lora(4, toy.TARGETS, seed=1)
    toy.move(policy, 0.2)
    return policy


class Learner:
    """Updates of a method on the toy, with the calls of pre counted by row."""

    def __init__(self, folder=None, name="run", seed=0, policy=None, module=pso_offline, micro_batch=100, **changes):
        self.policy = policy or double_policy()
        cfg, chain = module.Config(**DEFAULTS[module] | changes), Renoise(TIMES, ALPHA_BAR)
        data = FakePairs(std=0.3, shape=SHAPE)
        condition = self.policy.encode_prompts(TEXTS)
        given = Given(self.policy, chain, cfg, seed, PAIRS, data, TEXTS, condition, embeddings=FakeEmbeddings())
        self.source = getattr(sources, module.SOURCE)(given)
        self.objective = Objective(module, cfg, self.policy, self.source.chain, micro_batch)
        if folder is not None:
            self.objective.memo = Memo(folder, name)
        self.pre_rows, network = 0, self.policy.eps

        def counted(chain, n, x, condition, pre=False):
            self.pre_rows += x.shape[0] if pre else 0
            return network(chain, n, x, condition, pre)

        self.policy.eps = counted

    @property
    def memo(self):
        return self.objective.memo

    def __call__(self, update: int = 0):
        """(gradient, loss, logs), without a step."""
        value, logs = self.objective.backward(self.source.batch(update), self.source.given.condition)
        vector = torch.cat([p.grad.flatten() for p in self.policy.lora_parameters()])
        for parameter in self.policy.lora_parameters():
            parameter.grad = None
        logs = numbers({"loss": value, **logs})
        return vector, logs.pop("loss"), logs


def apart(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- the same numbers ----

METHODS = [
    (pso_offline, {}),
    (pso_offline, {"timestep_mode": "sample_one", "reduction": "sum", "pair_shares_eps": False}),
    (rpo, {}),
    (diffusion_dpo, {"caption_dropout": 0.5}),
]


@pytest.mark.parametrize(("module", "changes"), METHODS)
@pytest.mark.parametrize("micro_batch", [5, 100])
def test_gradients_are_those_without_it(module, changes, micro_batch, tmp_path):
    plain = Learner(module=module, micro_batch=micro_batch, **changes)
    first, second = (
        Learner(tmp_path, name, module=module, micro_batch=micro_batch, **changes) for name in ("first", "second")
    )
    expected = plain(3)
    made = first(3)
    first.memo.write()
    second.objective.memo = Memo(tmp_path, "second")
    found = second(3)
    rows = plain.pre_rows
    assert first.pre_rows == rows > 0 and second.pre_rows == 0
    for vector, loss, _ in (made, found):
        assert apart(vector, expected[0]) < 1e-10 and abs(loss - expected[1]) < 1e-10
    assert torch.equal(made[0], found[0]) and made[1] == found[1], "found or made: the same bits"
    assert second.memo.counts() == {"pre_found": rows, "pre_made": 0}
    assert second.policy.unet_forwards == first.policy.unet_forwards - rows


def test_numbers_of_other_noise_change_the_gradient(tmp_path):
    """What the test above would notice: the numbers of the next update, under this one's keys."""
    first = Learner(tmp_path)
    expected = first(0)[0]
    first(1)
    own, others = (learner_keys(first, update) for update in (0, 1))
    first.memo.write()
    told = load_file(first.memo.path)
    told = dict(zip(told["keys"].tolist(), told["errors"].tolist(), strict=True))
    wrong = Memo(tmp_path / "nothing", "wrong")
    wrong.made = {mine: told[other] for mine, other in zip(own, others, strict=True)}
    second = Learner(tmp_path)
    second.objective.memo = wrong
    assert apart(second(0)[0], expected) > 1e-3 and second.pre_rows == 0


def learner_keys(learner, update) -> list[int]:
    return [key for side in learner.source.batch(update).sides for key in side.keys.flatten().tolist()]


def test_the_kl_is_not_measured(tmp_path):
    assert "kl_batch" in Learner()(0)[2] and "kl_batch" not in Learner(tmp_path)(0)[2]


def test_a_float32_network_gets_float32_evidence_as_good(tmp_path):
    x, eps, theta, pre = (toy.randn(seed, 3, 2, *SHAPE) for seed in range(4))
    theta, pre = eps + 1e-3 * theta, eps + 1e-3 * theta + 1e-5 * pre
    side = Side("forward", torch.tensor([[4, 3]] * 3), x, eps)
    for reduction in ("mean", "sum"):
        cfg = pso_offline.Config(**PAPER, reduction=reduction)
        found = gather_remembered(side, theta, squared_error(side, pre), cfg)
        expected = -((eps.double() - theta.double()) ** 2 - (eps.double() - pre.double()) ** 2)
        expected = getattr(expected, reduction)((-3, -2, -1))
        assert found.ratio.dtype == torch.float32 and found.kl is None
        assert torch.allclose(found.ratio.double(), expected, rtol=1e-6, atol=0)
        assert torch.allclose(forward_ratio(Renoise(TIMES), side, theta, pre, cfg).double(), expected, rtol=1e-3)


# ---- whose numbers ----


@pytest.mark.parametrize("changes", [{"seed": 1}, {"pair_shares_eps": False}])
def test_another_stream_finds_nothing_of_this_one(changes, tmp_path):
    first = Learner(tmp_path)
    first(0)
    first.memo.write()
    other = Learner(tmp_path, "other", **changes)
    other(0)
    targets = first.pre_rows // 2
    expected = 0 if "seed" in changes else targets  # of a pair with an eps of its own the target's is the pair's still
    assert other.memo.hits == expected and other.pre_rows == first.pre_rows - expected


def test_another_update_finds_nothing(tmp_path):
    learner = Learner(tmp_path)
    learner(0)
    rows = learner.pre_rows
    learner(1)
    assert learner.pre_rows == 2 * rows and learner.memo.hits == 0
    learner(0)
    assert learner.pre_rows == 2 * rows and learner.memo.hits == rows, "what this process made it knows before a write"


def test_no_two_rows_have_the_same_key():
    learner = Learner()
    keys = [key for update in range(6) for key in learner_keys(learner, update)]
    assert len(set(keys)) == len(keys) == 6 * PAIRS * 2 * 3


def test_a_dropped_caption_is_another_row():
    keep, drop = (Learner(module=diffusion_dpo, caption_dropout=share) for share in (0.0, 0.999))
    one, other = learner_keys(keep, 0), learner_keys(drop, 0)
    assert not set(one) & set(other)


def who(policy=None, chain=None, data=("cache",), source=PreferencePairs, cfg=None) -> str:
    return identity(
        policy or new_policy(), chain or Renoise(TIMES), list(data), source, cfg or pso_offline.Config(**PAPER)
    )


class Elsewhere(PreferencePairs):
    """A user's own source."""


def test_the_identity_is_that_of_the_frozen_network():
    other = new_policy(moved=0.3)
    assert who() == who(other) == who(new_policy(rank=8)) == who(new_policy(rank=None)), "the adapter does not count"
    fewer = new_policy(rank=None)
    fewer.add_lora(4, ["to_q"], seed=1)
    assert who(fewer) == who()


@pytest.mark.parametrize("changed", ["weights", "dtype", "resolution", "chain", "times", "data", "source", "embedding"])
def test_whatever_pre_depends_on_is_in_the_identity(changed):
    policy = new_policy()
    given = {"policy": policy}
    if changed == "weights":
        with torch.no_grad():
            next(p for name, p in policy.unet.named_parameters() if "base_layer.weight" in name)[0, 0] += 1e-6
    elif changed == "dtype":
        policy.unet.to(torch.bfloat16)
    elif changed == "resolution":
        policy.resolution = 32
    elif changed == "embedding":
        policy.timestep_cond = torch.ones(1, 4)
    elif changed == "chain":
        given["chain"] = Ancestral(TIMES)
    elif changed == "times":
        given["chain"] = Renoise([999, 759, 499, 259])
    elif changed == "data":
        given["data"] = ("another cache",)
    elif changed == "source":
        given["source"] = Elsewhere
    assert who(**given) != who()


def test_methods_of_one_stream_share_their_numbers_and_a_users_own_source_does_not():
    assert who(source=ContrastPairs, cfg=pso_offline.Config(beta=50.0, timestep_mode="sample_one")) == who()
    assert who(source=Elsewhere) != who(source=Elsewhere, cfg=pso_offline.Config(**PAPER | {"beta": 50.0}))


# ---- the files ----


def test_each_run_writes_its_own_file_and_reads_all(tmp_path):
    one, other = Memo(tmp_path, "one"), Memo(tmp_path, "other")
    keys = torch.tensor([5, -3, 2**62])
    one(keys[:2], lambda rows: torch.tensor([0.1, 0.2])[rows])
    other(keys[1:], lambda rows: torch.tensor([0.25, 0.3])[rows])
    one.write(), other.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "other.safetensors"]
    third = Memo(tmp_path, "third")
    found = third(keys, lambda rows: pytest.fail("all are known"))
    assert found.tolist() == pytest.approx([0.1, 0.2, 0.3]) and found.dtype == torch.float64
    third.write()
    assert len(list(tmp_path.iterdir())) == 2, "nothing new, no file"


def test_a_run_that_goes_on_keeps_what_it_had(tmp_path):
    first = Memo(tmp_path, "run")
    first(torch.tensor([1, 2]), lambda rows: torch.tensor([0.1, 0.2])[rows])
    first.write()
    again = Memo(tmp_path, "run")
    again(torch.tensor([2, 3]), lambda rows: torch.full((len(rows),), 0.3))
    again.write()
    assert load_file(tmp_path / "run.safetensors")["keys"].tolist() == [1, 2, 3] and again.hits == 1


def test_a_file_cut_short_costs_calls_and_no_more(tmp_path, caplog):
    memo = Memo(tmp_path, "run")
    memo(torch.arange(100), lambda rows: rows.double())
    memo.write()
    whole = memo.path.read_bytes()
    memo.path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level("WARNING", logger="tune"):
        again = Memo(tmp_path, "run")
    assert "its numbers are made anew" in caplog.text and len(again.keys) == 0
    again(torch.arange(100), lambda rows: rows.double())
    again.write()
    assert memo.path.read_bytes() == whole


def test_runs_at_once_leave_whole_files(tmp_path):
    def work(name: int) -> None:
        for start in range(0, 50, 10):
            memo = Memo(tmp_path, f"run{name}")
            memo(torch.arange(start, start + 10), lambda rows, start=start: (rows + start).double())
            memo.write()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    memo = Memo(tmp_path, "last")
    assert memo(torch.arange(50), lambda rows: pytest.fail("all are known")).tolist() == list(range(50))
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_key_in_two_files_has_the_first_ones_number(tmp_path):
    for name, value in (("b", 2.0), ("a", 1.0)):
        memo = Memo(tmp_path / name, name)
        memo(torch.tensor([7]), lambda rows, value=value: torch.tensor([value]))
        memo.write()
        memo.path.rename(tmp_path / memo.path.name)
    assert Memo(tmp_path, "c")(torch.tensor([7]), lambda rows: None).tolist() == [1.0]


# ---- where there is none ----


@pytest.mark.parametrize(
    ("module", "source", "changes", "words"),
    [
        (mapo, PreferencePairs, None, "mapo never asks for pre"),
        (pso_online, OnlinePairs, None, "OnlinePairs samples with theta"),
        (pso, TargetsAgainstModel, None, "TargetsAgainstModel samples with theta"),
        (pso_offline, PreferencePairs, {"omega": "kl"}, "objective.omega is kl; expected one"),
        (pso_offline, PreferencePairs, {"forward_coupling": "exact_markov"}, "expected paper"),
    ],
)
def test_other_evidence_is_refused(module, source, changes, words):
    cfg = SimpleNamespace() if changes is None else pso_offline.Config(**PAPER, **changes)
    with pytest.raises(ConfigError, match=f"methods.own.tune.pre_memo is true, but .*{words}"):
        refuse("own", module, source, cfg)


@pytest.mark.parametrize(
    ("module", "source"), [(pso_offline, PreferencePairs), (rpo, ContrastPairs), (diffusion_dpo, PreferencePairs)]
)
def test_evidence_of_labelled_pairs_is_not_refused(module, source):
    refuse("own", module, source, SimpleNamespace())


# ---- in a run ----


def test_a_run_opens_the_folder_of_its_model_and_writes_at_checkpoints(tmp_path):
    from pso.loop import Loop
    from pso.ranks import Ranks
    from pso.tune import Run, memo_of

    learner = Learner()
    learner.source.given.pairs.inputs = [{"file": "cache/m/d.safetensors", "sha256": "1", "made_from": "a"}]
    entry = SimpleNamespace(tune=SimpleNamespace(pre_memo=True))
    config = SimpleNamespace(scale="smoke", methods={"own": entry})
    run = Run(config, "concept/dog", "m", "own", 3, tmp_path / "run", tmp_path)
    memo = memo_of(run, learner.source.given, learner.source, Ranks())
    folder, name = memo.path.parent, memo.path.name
    assert folder.parent == tmp_path / "smoke" / "cache" / "m" / "pre" and len(folder.name) == 16
    assert name == "concept--dog--own--seed3--0of1.safetensors"

    learner.source.given.pairs.inputs[0]["sha256"] = "2"  # the cache has grown
    assert memo_of(run, learner.source.given, learner.source, Ranks()).path == memo.path
    learner.source.given.pairs.inputs[0]["made_from"] = "b"
    assert memo_of(run, learner.source.given, learner.source, Ranks()).path != memo.path
    entry.tune.pre_memo = False
    assert memo_of(run, learner.source.given, learner.source, Ranks()) is None

    learner.objective.memo = memo
    learner(0)
    loop = SimpleNamespace(objective=learner.objective)
    Loop.remember(loop)
    assert len(load_file(memo.path)["keys"]) == learner.pre_rows
    learner.objective.memo = None
    Loop.remember(loop)  # nothing to write


def test_the_identity_can_be_told_again(monkeypatch):
    """It holds no address and no order of a process: another one finds the folder."""
    assert who() == who() and json.dumps(who())
    assert replace(Side("forward", *[torch.zeros(1, 1)] * 3), keys=torch.ones(1, 1)).rows([0]).keys.tolist() == [[1]]
    assert memos.weights(new_policy()) == memos.weights(new_policy())
