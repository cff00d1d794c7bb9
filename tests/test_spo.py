"""SPO: its loss, the forks of a trajectory, and the stepwise pairs that come of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from hypothesis import given
from scipy.stats import chisquare, kstest
from toy import CONDITION, LATENT, PAIRS, STOCHASTIC, TEXTS, TIMES, FakePolicy, Judge, both, few, ratios

from baselines import spo
from pso import pso_online
from pso.config import ConfigError, check, load
from pso.evidence import Batch, Evidence
from pso.forks import Fork, forked_steps, forks, shown_times
from pso.mdp import Ddim, NoKernel, Renoise
from pso.objective import Objective, numbers
from pso.policy import to_images
from pso.provenance import UserError
from pso.rollout import INITIAL, keyed_noise, rollout
from pso.sources import Given, OnlinePairs
from pso.stepwise import EMPTY_ROUNDS, StepwisePairs, segments

SETTINGS = {"beta": 10.0, "ratio_clip": 0.1, "threshold": 0.0, "prompts_per_round": 8}
LOW, HIGH = math.log(0.9), math.log(1.1)
SEVEN = [900, 800, 700, 500, 300, 200, 100]  # six trained transitions: segments of 1, 2, 3 or 6


def loss(target, reference, **changes):
    cfg = spo.Config(**SETTINGS | changes)
    return spo.loss(Evidence(ratio=target), Evidence(ratio=reference), Batch(torch.arange(len(target)), None), cfg)[0]


# ---- the loss ----


def official(target, reference, beta=10.0, clip=0.1) -> float:
    """-log sigma(beta log clamp(ratio) - beta log clamp(ratio)) of each pair, then the mean, in float64."""
    a, b = (np.log(np.clip(np.exp(np.asarray(v, np.float64)), 1 - clip, 1 + clip)) for v in (target, reference))
    return toy.minus_log_sigmoid(beta * a - beta * b).mean()


@few
@given(pairs=ratios)
def test_each_transition_is_a_term_of_its_own(pairs):
    target, reference = both(pairs)
    assert loss(target, reference).item() == pytest.approx(official(target.numpy(), reference.numpy()), rel=1e-12)


WRONG = {
    "the sum inside": lambda t, r: toy.minus_log_sigmoid(10 * (np.clip(t, LOW, HIGH) - np.clip(r, LOW, HIGH)).sum()),
    "the margin clipped": lambda t, r: toy.minus_log_sigmoid(10 * np.clip(t - r, LOW, HIGH)).mean(),
    "log-ratios clipped to +- 0.1": lambda t, r: toy.minus_log_sigmoid(
        10 * (np.clip(t, -0.1, 0.1) - np.clip(r, -0.1, 0.1))
    ).mean(),
    "the sides swapped": lambda t, r: official(r, t),
    "beta / 2": lambda t, r: official(t, r, beta=5.0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_loss_check_rejects(wrong):
    target, reference = both([(0.03, -0.2), (0.2, 0.01), (-0.02, -0.05)])
    found = loss(target, reference).item()
    assert found == pytest.approx(official(target.numpy(), reference.numpy()), rel=1e-12)
    assert found != pytest.approx(WRONG[wrong](target.numpy(), reference.numpy()), rel=1e-3)


def test_loss_is_log_2_while_theta_is_pre():
    assert loss(*both([(0.0, 0.0)] * 3)).item() == toy.LOG_2


@pytest.mark.parametrize("outside", [LOW - 1e-6, HIGH + 1e-6, -3.0, 3.0])
@pytest.mark.parametrize("cut", [0, 1])
def test_gradient_is_exactly_zero_outside_the_clip(outside, cut):
    pair = [0.05, 0.05]
    pair[cut] = outside
    sides = [v.requires_grad_() for v in both([tuple(pair)])]
    grads = torch.autograd.grad(loss(*sides), sides)
    assert grads[cut].item() == 0.0 and grads[1 - cut].item() != 0.0
    free = torch.autograd.grad(loss(*sides, ratio_clip=None), sides)
    assert free[cut].item() != 0.0


@pytest.mark.parametrize("beta", [1.0, 10.0, 50.0])
def test_the_clip_bounds_the_logit(beta):
    """beta (log 1.1 - log 0.9) = 0.2007 beta: 2.0 at SPO's beta."""
    least, most = (loss(*both([p]), beta=beta).item() for p in ((9.0, -9.0), (-9.0, 9.0)))
    assert most - least == pytest.approx(0.2007 * beta, rel=1e-3)  # softplus(u) - softplus(-u) = u
    assert least == pytest.approx(toy.minus_log_sigmoid(0.2006707 * beta), rel=1e-5)
    assert loss(*both([(9.0, -9.0)]), beta=beta, ratio_clip=None).item() < least


# ---- forks ----


def keys_of(count: int, members: int = 2):
    """Keys of trajectories and of their candidates, as StepwisePairs makes them."""
    where = [(0, "rollout", 0, i) for i in range(count)]
    names = ("first", "second", "third", "fourth")[:members]
    return [(*k, "pair") for k in where], [[(*k, name) for k in where] for name in names]


def branched(kind, times=TIMES, inner=0, members=2, policy=None, count=4, micro_batch=1000, order=None) -> list[Fork]:
    policy = policy or FakePolicy()
    keys, candidates = keys_of(count, members)
    order = list(range(count)) if order is None else order
    keys, candidates = [keys[i] for i in order], [[c[i] for i in order] for c in candidates]
    condition = CONDITION.rows(torch.tensor(order) % PAIRS) if isinstance(policy, FakePolicy) else None
    if condition is None:
        condition = policy.encode_prompts([toy.PROMPTS[i % 4] for i in order])
    return list(forks(policy, kind(times), condition, keys, candidates, inner, micro_batch=micro_batch))


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize(("times", "inner"), [(TIMES, 0), (TIMES, 2), (SEVEN, 0), (SEVEN, 1), (SEVEN, 2), (SEVEN, 5)])
@pytest.mark.parametrize("members", [2, 4])
def test_every_fork_leaves_one_state_and_the_next_one_is_a_candidates_last(kind, times, inner, members):
    chain, found = kind(times), branched(kind, times, inner, members)
    length, total = inner + 1, len(times)
    assert [f.n for f in found] == list(range(total, 1, -length)) == forked_steps(chain, inner)
    assert [f.t for f in found] == [*times[length:-1:length], 0] == shown_times(chain, inner)
    x = chain.init(keyed_noise(keys_of(4)[0], INITIAL, LATENT))
    for fork in found:
        assert fork.states.shape == (4, members, length + 1, *LATENT)
        assert fork.shown.shape == (4, members, *LATENT)
        assert all(torch.equal(fork.states[:, k, 0], x) for k in range(members))
        last = fork.states[:, :, -1]
        assert (last[:, 0] - last[:, 1]).abs().amin((1, 2, 3)).max() > 0  # each has noise of its own
        x = last[torch.arange(4), fork.chosen]


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("inner", [0, 2])
def test_a_candidates_steps_have_the_noise_of_its_key(kind, inner):
    chain, policy = kind(TIMES), FakePolicy()
    _, candidates = keys_of(4)
    rows = CONDITION.rows(torch.arange(4))
    drawn = []
    for fork in branched(kind, inner=inner):
        for k in range(2):
            for j in range(inner + 1):
                n, x = torch.full((4,), fork.n - j), fork.states[:, k, j]
                mean = chain.mean(n, x, policy.guided_eps(chain, n, x, rows))
                z = (fork.states[:, k, j + 1] - mean) / chain.std(n, x)
                torch.testing.assert_close(z, keyed_noise(candidates[k], fork.n - j, LATENT), rtol=1e-3, atol=1e-3)
                drawn.append(z)
    assert kstest(torch.cat(drawn).flatten(), "norm").pvalue > 0.01
    assert len({z.sum().item() for z in torch.cat(drawn)}) == 4 * 2 * 3


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_a_candidate_is_shown_by_the_next_calls_prediction_and_the_last_one_finished(kind):
    chain, policy = kind(TIMES), FakePolicy()
    rows = CONDITION.rows(torch.arange(4))
    for fork in branched(kind):
        for k in range(2):
            n, x = torch.full((4,), fork.n - 1), fork.states[:, k, -1]
            eps = policy.guided_eps(chain, n, x, rows)
            expected = chain.step(n, x, eps, None) if fork.n == 2 else chain.x0_hat(n, x, eps)
            assert torch.equal(fork.shown[:, k], expected)
            n, x = torch.full((4,), fork.n), fork.states[:, k, 0]
            stale = chain.x0_hat(n, x, policy.guided_eps(chain, n, x, rows))
            assert (fork.shown[:, k] - stale).abs().max() > 0.1  # the call before the fork cannot tell them apart


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_one_fork_over_all_steps_is_two_rollouts_that_share_their_beginning(kind):
    (fork,) = branched(kind, inner=2)
    keys, candidates = keys_of(4)
    for k in range(2):
        whole = rollout(FakePolicy(), kind(TIMES), CONDITION.rows(torch.arange(4)), keys, candidates[k])
        assert torch.equal(fork.states[:, k], whole.states) and torch.equal(fork.shown[:, k], whole.x0)


def test_it_goes_on_from_a_candidate_drawn_uniformly_by_key():
    count = 600
    drawn = torch.stack([f.chosen for f in branched(Renoise, SEVEN, 0, 4, count=count)])
    assert all(chisquare(np.bincount(row, minlength=4)).pvalue > 0.01 for row in drawn.numpy())
    table = np.histogram2d(drawn[0].numpy(), drawn[1].numpy(), bins=4)[0]
    assert chisquare(table.flatten()).pvalue > 0.01  # one fork's choice says nothing about the next one's
    assert torch.equal(torch.stack([f.chosen for f in branched(Renoise, SEVEN, 0, 4, count=count)]), drawn)


def test_the_choice_does_not_look_at_the_score():
    fork = branched(Renoise, count=200)[0]
    brightness = torch.sigmoid(fork.shown[:, :, :3]).flatten(2).mean(2)
    share = (fork.chosen == brightness.argmax(1)).float().mean().item()
    assert 0.4 < share < 0.6


def test_order_and_company_change_no_trajectory():
    together, shuffled = branched(Renoise), branched(Renoise, order=[2, 0, 3])
    for one, other in zip(shuffled, together, strict=True):
        assert torch.equal(one.states, other.states[[2, 0, 3]]) and torch.equal(one.chosen, other.chosen[[2, 0, 3]])


class Counting(FakePolicy):
    def __init__(self):
        self.rows = []

    def guided_eps(self, chain, n, x, condition):
        assert len(n) == len(x) == len(condition)
        self.rows.append(len(x))
        return super().guided_eps(chain, n, x, condition)


@pytest.mark.parametrize("bound", [1, 3, 5, 1000])
@pytest.mark.parametrize(("inner", "members"), [(0, 2), (0, 4), (2, 2)])
def test_a_prompt_takes_one_call_and_one_for_each_candidate_of_each_step(bound, inner, members):
    policy = Counting()
    found = branched(Renoise, inner=inner, members=members, policy=policy, micro_batch=bound)
    assert sum(policy.rows) == 4 * (1 + 3 * members) and max(policy.rows) <= bound
    whole = branched(Renoise, inner=inner, members=members)
    assert all(torch.equal(a.states, b.states) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_toy_networks_forks_do_not_depend_on_the_micro_batch(kind):
    policy = toy.new_policy(moved=0.2)
    for one, other in zip(*(branched(kind, policy=policy, count=3, micro_batch=m) for m in (2, 100)), strict=True):
        torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.shown, other.shown, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.chosen, other.chosen)


def test_segments_have_to_tile_the_trained_transitions():
    with pytest.raises(UserError, match=r"objective.inner_steps is 1; expected 0 or 2, because the 3 trained"):
        branched(Renoise, inner=1)
    with pytest.raises(UserError, match=r"objective.inner_steps is 3; expected 0 or 1 or 2 or 5, "):
        forked_steps(Renoise(SEVEN), 3)
    with pytest.raises(NoKernel):
        branched(Ddim)


# ---- stepwise pairs ----


def new(batch_size: int = 6, kind=Renoise, seed: int = 0, micro_batch: int = 256, judge=None, **cfg) -> StepwisePairs:
    """A source on fakes; brightness / 20 gives gaps on both sides of 0.1."""
    config = spo.Config(**SETTINGS | cfg)
    judge = judge or Judge(1 / 20)
    return StepwisePairs(
        Given(FakePolicy(), kind(TIMES), config, seed, batch_size, None, TEXTS, CONDITION, judge, micro_batch)
    )


def tensors(batch: Batch):
    return [batch.prompts, *(v for s in batch.sides for v in (s.n, s.x, s.answer))]


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    names = ("prompts", "n", "target_x", "target_next", "n", "reference_x", "reference_next")
    return {k: torch.cat(v) for k, *v in zip(names, *map(tensors, batches), strict=True)}


@pytest.mark.parametrize("inner", [0, 2])
def test_both_sides_leave_one_state_and_then_part(inner):
    batch = new(24, inner_steps=inner).batch(0)
    n = batch.target.n[:, 0]
    assert torch.equal(batch.target.n, batch.reference.n) and sorted(set(n.tolist())) == [2, 3, 4]
    shared = [torch.equal(a, b) for a, b in zip(batch.target.x, batch.reference.x, strict=True)]
    assert shared == [inner == 0 or step == 4 for step in n.tolist()]
    assert not any(torch.equal(a, b) for a, b in zip(batch.target.answer, batch.reference.answer, strict=True))
    assert batch.target.process == batch.reference.process == "reverse" and batch.target.x.shape == (24, 1, *LATENT)


def shown_score(side, prompts, kind) -> torch.Tensor:
    """The judge's score of x_{n-1}, recomputed; inner = 0."""
    chain, policy, found = kind(TIMES), FakePolicy(), []
    for n, x, prompt in zip(side.n[:, 0], side.answer[:, 0], prompts, strict=True):
        after, x = n[None] - 1, x[None]
        eps = policy.guided_eps(chain, after, x, CONDITION.rows(prompt[None]))
        shown = chain.step(after, x, eps, None) if after == 1 else chain.x0_hat(after, x, eps)
        found.append(Judge(1 / 20).score(to_images(policy.decode(shown)), [""]))
    return torch.cat(found)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize(("members", "threshold"), [(2, 0.0), (2, 0.1), (4, 0.1)])
def test_best_and_worst_are_kept_where_they_are_apart(kind, members, threshold):
    source = new(6, kind, candidates=members, threshold=threshold)
    batch = source.batch(0)
    best, worst = (shown_score(side, batch.prompts, kind) for side in batch.sides)
    first, second = torch.stack([best, worst]).softmax(0)
    gap = first - second
    assert (gap > threshold).all() and (best > worst).all()
    assert threshold == 0.0 or gap.min() < 0.2  # the judge gives gaps near the threshold
    assert set(source.given.reward.times) == {749, 499, 0}


def test_the_threshold_decides_which_forks_are_kept():
    everything, some = new(24), new(1, threshold=0.1)
    everything.batch(0)
    kept = some.batch(0)
    share, gap = some.counts.last
    assert 0 < share < 1 == everything.counts.last[0]
    assert gap == everything.counts.last[1] == kept.log["gap"] and kept.log["accepted"] == share
    found = some.summary()["forks"]
    assert list(found) == ["749", "499", "0"] and [v["sampled"] for v in found.values()] == [8, 8, 8]
    assert sum(v["accepted"] for v in found.values()) == 1 + len(some.buffer["n"]) == pytest.approx(24 * share)
    assert some.summary()["rounds"] == 1 and some.reward_queries == 48


def test_the_best_and_the_worst_of_four():
    states = torch.arange(8.0).view(1, 4, 2, 1, 1, 1)  # candidate k: 2 k, 2 k + 1
    fork = Fork(3, states, torch.zeros(1, 4, 1, 1, 1), 0, torch.zeros(1))
    found = segments(fork, torch.tensor([7]), torch.tensor([2]), torch.tensor([1]), torch.tensor([True]))
    assert [found[k].item() for k in ("prompts", "n")] == [7, 3]
    sides = ("target_x", "target_next", "reference_x", "reference_next")
    assert [found[k].item() for k in sides] == [4, 5, 2, 3]
    none = segments(fork, torch.tensor([7]), torch.tensor([2]), torch.tensor([1]), torch.tensor([False]))
    assert {len(v) for v in none.values()} == {0}


def test_every_pair_is_trained_on_once_and_what_is_left_goes_first():
    source = new(7)  # 24 pairs a round
    batches = [source.batch(u) for u in range(4)]
    assert source.counts.rounds == 2 and len(source.buffer["n"]) == 20
    seen = joined(batches)
    first = joined([new(24).batch(0)])
    assert all(torch.equal(seen[k][:24], first[k]) for k in first)
    assert len({x.sum().item() for x in seen["target_next"]}) == 28
    counts = torch.bincount(first["prompts"] * 5 + first["n"][:, 0])
    assert sorted(counts[counts > 0].tolist()) == [1] * 24  # a prompt's fork gives one pair


def test_a_round_is_shuffled_over_prompts_and_steps_by_key():
    one, again, other = new(24).batch(0), new(24).batch(0), new(24, seed=1).batch(0)
    assert equal(one, again) and not equal(one, other)
    n = one.target.n[:, 0].tolist()
    assert sorted(n) == [2] * 8 + [3] * 8 + [4] * 8 and n != sorted(n) and n != sorted(n, reverse=True)
    assert one.prompts.tolist() != other.prompts.tolist()


def test_a_round_is_sampled_by_theta_as_it_is_then():
    moved, still = new(24), new(24)
    assert equal(moved.batch(0), still.batch(0))
    moved.given.policy.push = 1.0
    assert not equal(moved.batch(1), still.batch(1))


@pytest.mark.parametrize("bound", [1, 3, 1000])
def test_sampling_in_parts_changes_no_pair(bound):
    parts, whole = new(24, micro_batch=bound, judge=Judge(1 / 20)), new(24)
    assert equal(parts.batch(0), whole.batch(0))
    assert max(parts.given.reward.sizes) <= bound and sum(parts.given.reward.sizes) == 48
    texts = sorted(parts.given.reward.texts)
    assert texts == sorted(whole.given.reward.texts) and len(set(texts)) == 8


@pytest.mark.parametrize("size", [7, 8, 24])
def test_a_run_is_resumed_in_the_middle_of_a_round(size):
    made, later = new(size, threshold=0.02), new(size, threshold=0.02)
    made.batch(0)
    later.set_state({k: v.clone() for k, v in made.state().items()})
    later.given.policy.push = made.given.policy.push = 1.0  # a round sampled again would differ
    for update in (1, 2, 3):
        assert equal(made.batch(update), later.batch(update))
    assert later.summary() == made.summary() and later.reward_queries == made.reward_queries
    assert later.counts == made.counts


def test_a_threshold_that_nothing_exceeds_is_one_sentence():
    class Bored(Judge):
        def score(self, images, prompts, t=0):
            return torch.zeros(len(images))

    source = new(judge=Bored())
    with pytest.raises(UserError, match=r"objective.threshold is 0.0, and in 20 rounds of 8 prompts no .*; lower it\."):
        source.batch(0)
    assert source.counts.rounds == EMPTY_ROUNDS and source.reward_queries == EMPTY_ROUNDS * 48


def test_a_reward_has_to_know_of_steps_and_to_be_finite():
    class Broken(Judge):
        def score(self, images, prompts, t=0):
            return torch.full((len(images),), math.nan)

    with pytest.raises(ConfigError, match="does not know of time steps, .* such as spm_lite"):
        new(judge=toy.Brightness())
    with pytest.raises(ConfigError, match="does not know of time steps"):
        StepwisePairs(replace(new().given, reward=None))
    with pytest.raises(UserError, match="the reward of 16 of 16 sampled images is not finite"):
        new(judge=Broken()).batch(0)


# ---- D3PO ----


def by_pair(batch: Batch) -> dict[str, torch.Tensor]:
    """Stepwise pairs of whole trajectories as [P, 3]: ordered by prompt and step."""
    order = sorted(range(len(batch.prompts)), key=lambda i: (batch.prompts[i].item(), -batch.target.n[i, 0].item()))
    found = joined([batch])
    return {k: v[order].view(len(order) // 3, 3, *v.shape[2:]) for k, v in found.items()}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_segments_of_all_steps_are_d3pos_pairs(kind):
    """Its pairs are OnlinePairs that share x_N: the same states, bit for bit, from the same keys."""
    stepwise = by_pair(new(24, kind, inner_steps=2).batch(0))
    settings = toy.PAPER | {"pairs_per_round": 8, "pair_shares_initial_noise": True}
    given = replace(new(8, kind).given, cfg=pso_online.Config(**settings))
    online = OnlinePairs(given).batch(0)
    order = online.prompts.argsort()
    assert not online.tied.any()
    for k, v in zip(("n", "target_x", "target_next"), tensors(online)[1:4], strict=True):
        assert torch.equal(stepwise[k], v[order]), k
    for k, v in zip(("reference_x", "reference_next"), tensors(online)[5:], strict=True):
        assert torch.equal(stepwise[k], v[order]), k
    apart = replace(given, cfg=pso_online.Config(**settings | {"pair_shares_initial_noise": False}))
    assert not torch.equal(OnlinePairs(apart).batch(0).target.answer[order], stepwise["target_next"])


def test_its_loss_is_d3pos():
    """One sigmoid per transition, clipped at 0.1: the released form of Eq. 7 on pairs [P, 3]."""
    target, reference = 0.1 * toy.randn(0, 2, 5, 3, dtype=torch.float64)
    ours = loss(target.reshape(-1, 1), reference.reshape(-1, 1)).item()
    settings = toy.RELEASED | {"beta": 10.0}
    assert ours == pytest.approx(toy.loss(pso_online, target, reference, **settings).item(), rel=1e-12)
    assert loss(target, reference).item() == pytest.approx(ours, rel=1e-12)  # however they are grouped
    summed = toy.loss(pso_online, target, reference, **settings | {"timestep_mode": "trajectory_sum"}).item()
    assert ours != pytest.approx(summed, rel=1e-3)


# ---- training ----


def trained(swap: bool = False, **changes) -> list[tuple[float, float, float]]:
    """(loss, margin, share clipped) of AdamW steps of the toy network on one batch of stepwise pairs."""
    policy, chain = toy.new_policy(moved=0.05), Renoise(TIMES)
    cfg = spo.Config(**SETTINGS | {"prompts_per_round": 4} | changes)
    condition = policy.encode_prompts(toy.PROMPTS)
    judge = Judge(1 / 20)
    source = StepwisePairs(Given(policy, chain, cfg, 0, 4, None, toy.PROMPTS, condition, judge))
    batch = source.batch(0)
    if swap:
        batch = replace(batch, target=batch.reference, reference=batch.target)
    step = Objective(spo, cfg, policy, chain, 5)
    optimizer, found = torch.optim.AdamW(policy.lora_parameters(), lr=5e-3), []
    for _ in range(12):
        value, logged = step.backward(batch, condition)
        logged = numbers(logged)
        found.append((value.item(), logged["margin"], logged["clip_fraction"]))
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_it_overfits_one_batch_and_the_clip_holds_it_back():
    free, clipped = trained(ratio_clip=None), trained()
    assert free[-1][0] < 0.4 < 0.6 < free[0][0] and free[-1][1] > free[0][1] + 0.1
    assert clipped[-1][0] > toy.minus_log_sigmoid(2.007) - 1e-6
    assert free[-1][2] == 0.0 < clipped[-1][2]
    wrong = trained(swap=True, ratio_clip=None)
    assert wrong[-1][1] > wrong[0][1]  # of the sides as they are then: the other way round
    assert free[0][1] == pytest.approx(-wrong[0][1], abs=1e-6)


# ---- settings ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratio_clip": 1.0}, "ratio_clip is 1.0; expected a number below 1"),
        ({"candidates": 1}, "candidates is 1; expected a number of at least 2"),
        ({"threshold": -0.1}, "threshold is -0.1; expected a number of at least 0"),
        ({"thresold": 0.4}, "thresold is not a known key; did you mean threshold?"),
        ({"omega": "kl"}, "omega is not a known key"),
        ({"beta": "1e1"}, "beta is '1e1' (text); expected a number; YAML reads it as text, write 10.0."),
    ],
)
def test_config_refuses_in_one_sentence(change, words):
    check(spo.Config, SETTINGS, "methods.m.objective")
    with pytest.raises(ConfigError) as caught:
        check(spo.Config, SETTINGS | change, "methods.m.objective")
    assert str(caught.value).startswith(f"methods.m.objective.{words}")


def test_the_two_entries_are_spos_settings_and_ours():
    methods = load({"scale": "miniature"}).methods
    official_ = {"beta": 10.0, "ratio_clip": 0.1, "threshold": 0.4, "candidates": 2}
    assert methods["spo_transplant"].objective.items() >= official_.items()
    assert methods["spo_adapted"].objective["ratio_clip"] is None
    assert {m.reward for n, m in methods.items() if n.startswith("spo_")} == {"spm_lite", "spm_distilled"}


def test_a_plain_metric_is_no_reward_for_it():
    with pytest.raises(ConfigError, match=r"methods\.spo_adapted\.reward is None; expected the name of a metric"):
        load({"methods": {"spo_adapted": {"reward": None}}})
