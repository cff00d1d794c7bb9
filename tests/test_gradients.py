"""The toy policy under the training step: adapter, two-pass gradients, sampling noise, and the clip and ties."""

import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import toy
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from toy import CONFIGS, METHODS, MODES, SHAPE, STEPS, STOCHASTIC, TIMES, both, few, lora, loss, new_policy, ratios

from baselines import diffusion
from pso import pso_online
from pso.evidence import Batch, Evidence
from pso.mdp import Renoise
from pso.objective import Call, Objective, flatten, numbers
from pso.policy import Conditioning
from pso.rollout import INITIAL, keyed_noise, rollout
from pso.sources import Given, OnlinePairs, rank, reverse_side

KEYS = [("eval", 0, name) for name in "abcd"]


def backward(policy, module, kind=Renoise, micro_batch=100, batch=None, keep=False, **changes):
    """(gradient in one vector, loss, logs) of one training step; the gradients are cleared unless `keep`."""
    chain = kind(TIMES)
    cfg = module.Config(**CONFIGS.get(module, {"times": "uniform"}) | changes)
    step = Objective(module, cfg, policy, chain, micro_batch)
    value, logs = step.backward(batch or toy.new_batch(module, chain), policy.encode_prompts(toy.PROMPTS))
    vector = torch.cat([p.grad.flatten() for p in policy.lora_parameters()])
    for p in () if keep else policy.lora_parameters():
        p.grad = None
    logs = numbers({"loss": value, **logs})
    return vector, logs.pop("loss"), logs


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- the adapter ----


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("micro_batch", [4, 100])
def test_loss_of_a_fresh_adapter_is_log_2(module, kind, micro_batch):
    assert backward(new_policy(), module, kind, micro_batch)[1] == pytest.approx(toy.LOG_2, abs=1e-7)
    assert backward(new_policy(moved=0.2), module, kind, micro_batch)[1] != pytest.approx(toy.LOG_2, abs=1e-4)


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("micro_batch", [4, 100])
def test_first_backward_moves_only_lora_b(module, micro_batch):
    def moves(policy) -> list[bool]:
        backward(policy, module, micro_batch=micro_batch, keep=True)
        return [any(bool(p.grad.any()) for p in lora(policy, kind)) for kind in ("lora_A", "lora_B")]

    assert moves(new_policy()) == [False, True]
    assert moves(new_policy(moved=0.2)) == [True, True]


def outputs(policy, pre: bool) -> torch.Tensor:
    condition = policy.encode_prompts(toy.PROMPTS[:3])
    return policy.eps(Renoise(TIMES), STEPS, toy.randn(0, 3, *SHAPE), condition, pre=pre)


def test_pre_is_the_network_before_the_adapter_bit_for_bit():
    before = outputs(new_policy(rank=None), pre=False)
    policy = new_policy(moved=0.2)
    outputs(policy, pre=False)
    assert torch.equal(outputs(policy, pre=True), before)
    assert not torch.equal(outputs(policy, pre=False), before)


def trains(policy) -> bool:
    outputs(policy, pre=False).sum().backward()
    return all(p.requires_grad and p.grad is not None for p in policy.lora_parameters())


def test_gradients_flow_after_a_look_at_pre():
    policy = new_policy(moved=0.2)
    assert not outputs(policy, pre=True).requires_grad
    assert trains(policy)


def test_training_leaves_the_frozen_network_alone():
    policy = new_policy(moved=0.2)
    frozen = {k: p for k, p in policy.unet.named_parameters() if "lora" not in k}
    before, adapter = {k: p.clone() for k, p in frozen.items()}, [p.clone() for p in policy.lora_parameters()]
    pre = outputs(policy, pre=True)
    backward(policy, pso_online, micro_batch=5, keep=True)
    torch.optim.AdamW(policy.lora_parameters(), lr=0.1).step()
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in frozen.items())
    assert torch.equal(outputs(policy, pre=True), pre)
    assert not any(torch.equal(p, q) for p, q in zip(policy.lora_parameters(), adapter, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_float32_whatever_the_base_is(dtype):
    policy = new_policy(rank=None)
    policy.unet.to(dtype)
    policy.add_lora(4, toy.TARGETS, seed=0)
    assert {p.dtype for p in policy.lora_parameters()} == {torch.float32}
    assert policy.unet.dtype == dtype
    assert outputs(policy, pre=False).dtype == outputs(policy, pre=True).dtype == torch.float32


def test_a_fresh_adapter_depends_on_its_seed_alone():
    first = [p.clone() for p in lora(new_policy(), "lora_A")]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert all(torch.equal(p, q) for p, q in zip(lora(new_policy(), "lora_A"), first, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    other = new_policy(rank=None)
    other.add_lora(4, toy.TARGETS, seed=9)
    assert not any(torch.equal(p, q) for p, q in zip(lora(other, "lora_A"), first, strict=True))


# ---- two passes equal one ----

STRONG = {"beta": 50.0}  # so that the sigmoid is far from linear
CASES = [*((m.values[0], mode) for m in METHODS for mode in MODES), (diffusion, None)]


def settings_of(module, mode) -> dict:
    return {} if module is diffusion else STRONG | {"timestep_mode": mode}


@pytest.mark.parametrize(("module", "mode"), CASES)
@pytest.mark.parametrize("micro_batch", [1, 4, 17])
def test_gradient_and_logs_do_not_depend_on_the_micro_batch(module, mode, micro_batch):
    policy, more = new_policy(moved=0.3), settings_of(module, mode)
    whole, value, logs = backward(policy, module, **more)
    parts, same_value, same_logs = backward(policy, module, micro_batch=micro_batch, **more)
    assert apart(parts, whole) < 2e-5
    assert same_value == pytest.approx(value, rel=1e-5)
    assert flat(same_logs) == pytest.approx(flat(logs), rel=1e-4, abs=1e-7)


def flat(logs: dict) -> dict:
    return {k: v for k, v in logs.items() if not isinstance(v, dict)} | logs.get("kl_batch", {})


@pytest.mark.parametrize("module", METHODS)
def test_a_sigmoid_per_chunk_would_be_another_gradient(module):
    """Each transition as a pair of its own is what a loss applied chunk by chunk would see."""
    policy, whole = new_policy(moved=0.3), toy.new_batch(module, Renoise(TIMES))
    rows = replace(whole, prompts=whole.prompts.repeat_interleave(3), target=flatten(whole.target))
    rows = replace(rows, reference=flatten(whole.reference))
    right, per_chunk = (backward(policy, module, batch=b, **STRONG)[0] for b in (whole, rows))
    assert apart(per_chunk, right) > 0.05


@pytest.mark.parametrize(("module", "mode"), CASES)
def test_gradient_of_a_batch_is_the_mean_of_its_pairs(module, mode):
    policy, batch, more = new_policy(moved=0.3), toy.new_batch(module, Renoise(TIMES)), settings_of(module, mode)
    singles = []
    for i in range(3):
        sides = [side.rows(slice(i, i + 1)) for side in batch.sides]
        singles.append(backward(policy, module, batch=Batch(batch.prompts[[i]], *sides), **more)[0])
    whole = backward(policy, module, micro_batch=4, batch=batch, **more)[0]
    assert apart(sum(singles) / 3, whole) < 2e-5
    assert apart(sum(singles), whole) > 0.05


# ---- noise and sampling ----


def test_noise_belongs_to_its_image():
    together = keyed_noise(KEYS, 3, SHAPE)
    for i in (2, 0, 3, 1):
        assert torch.equal(keyed_noise([KEYS[i]], 3, SHAPE)[0], together[i])
    stream = torch.Generator().manual_seed(0)
    one, other = (torch.randn(SHAPE, generator=stream) for _ in range(2))
    assert not torch.equal(one, other)  # a shared stream depends on the order


@pytest.mark.parametrize(
    ("key", "step"), [(("eval", 1, "a"), 3), (("eval", 0, "b"), 3), (("eval", 0, "a"), 2), (("eval", 0, "a"), INITIAL)]
)
def test_noise_differs_by_seed_prompt_and_step(key, step):
    one, other = keyed_noise([KEYS[0]], 3, SHAPE), keyed_noise([key], step, SHAPE)
    assert not torch.equal(one, other)
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.25


def sample(policy, kind, which=(0, 1, 2, 3), **more):
    condition = policy.encode_prompts([toy.PROMPTS[i] for i in which])
    return rollout(policy, kind(TIMES), condition, [KEYS[i] for i in which], **more)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_rollout_of_a_batch_is_the_rollout_of_its_images(kind):
    policy = new_policy(moved=0.2)
    together = sample(policy, kind)
    for i in range(4):
        alone = sample(policy, kind, (i,))
        assert torch.equal(alone.states[0, 0], together.states[i, 0])  # noise is bitwise
        torch.testing.assert_close(alone.states[0], together.states[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.x0[0], together.x0[i], rtol=1e-4, atol=1e-5)
        assert (alone.x0[0] - together.x0[(i + 1) % 4]).abs().max() > 0.1


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_rollout_is_the_diffusers_pipeline(kind):
    policy = new_policy(moved=0.2)
    pipe, ours = policy.pipeline, sample(policy, kind).x0
    noises = iter([keyed_noise(KEYS, step, SHAPE) for step in (4, 3, 2, 1)])
    if kind is Renoise:
        pipe.scheduler, grid, module = LCMScheduler(**toy.SDXL), {"timesteps": TIMES}, scheduling_lcm
    else:
        pipe.scheduler = EulerAncestralDiscreteScheduler(**toy.SDXL, timestep_spacing="trailing")
        grid, module = {"num_inference_steps": 4}, scheduling_euler_ancestral_discrete
    settings = grid | {"guidance_scale": 0.0, "height": 16, "width": 16, "output_type": "latent"}
    with patch.object(module, "randn_tensor", lambda *_, **__: next(noises)):
        theirs = pipe(toy.PROMPTS, latents=keyed_noise(KEYS, INITIAL, SHAPE), **settings).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - theirs.flip(0)).abs().max() > 0.1


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_leaving_out_x0_changes_no_state(kind):
    policy = new_policy(moved=0.2)
    full, part = sample(policy, kind), sample(policy, kind, to_x0=False)
    assert torch.equal(full.states, part.states)
    assert (full.states.shape, len(full.x0), len(part.x0)) == ((4, 4, *SHAPE), 4, 0)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_steps_share_their_noise_only_if_asked_to(kind):
    def step_noise(**more):
        policy = new_policy(moved=0.2)
        found = sample(policy, kind, (0, 0), **more)
        return replayed(policy, kind, found, STEPS.expand(2, 3), (0, 0))

    keys = [KEYS[0], KEYS[1]]
    shared, own = step_noise(step_keys=[KEYS[2]] * 2), step_noise(step_keys=keys)
    torch.testing.assert_close(shared[0], shared[1], rtol=1e-4, atol=1e-4)
    assert (own[0] - own[1]).abs().max() > 1


def replayed(policy, kind, trajectory, n, which) -> torch.Tensor:
    """(x_{n-1} - mean) / std of the chosen transitions [B, S], recomputed from the stored states."""
    chain, side = kind(TIMES), reverse_side(kind(TIMES), trajectory.states, n)
    rows = policy.encode_prompts([toy.PROMPTS[i] for i in which]).rows(
        torch.arange(len(n)).repeat_interleave(n.shape[1])
    )
    with torch.no_grad():
        eps = policy.eps(chain, n, side.x, rows)
    return (side.answer - chain.mean(n, side.x, eps)) / chain.std(n, side.x)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("n", [[[4, 3, 2]] * 4, [[3], [2], [4], [2]]])
def test_replay_finds_the_noise_that_was_drawn(kind, n):
    policy, n = new_policy(moved=0.2), torch.tensor(n)
    trajectory = sample(policy, kind)
    found = replayed(policy, kind, trajectory, n, range(4))
    drawn = [keyed_noise([key], step, SHAPE) for key, steps in zip(KEYS, n.tolist(), strict=True) for step in steps]
    torch.testing.assert_close(found, torch.cat(drawn).view_as(found), rtol=1e-3, atol=1e-3)
    assert kstest(found.flatten(), "norm").pvalue > 0.01
    shifted = replace(trajectory, states=trajectory.states.roll(1, 1))
    assert kstest(replayed(policy, kind, shifted, n, range(4)).flatten(), "norm").pvalue < 1e-6


@pytest.mark.parametrize("pair_shares", [False, True])
@pytest.mark.parametrize("over", [1, 2])
def test_online_pairs_share_noise_as_configured(pair_shares, over):
    policy, chain = new_policy(moved=0.2), Renoise(TIMES)
    more = {"pairs_per_round": 4, "pair_shares_initial_noise": pair_shares, "shared_noise_over": over}
    cfg = pso_online.Config(**CONFIGS[pso_online] | more)
    condition, texts = policy.encode_prompts(toy.PROMPTS), toy.PROMPTS
    source = OnlinePairs(Given(policy, chain, cfg, 0, 4, prompts=texts, condition=condition, reward=toy.Brightness()))
    batch = source.batch(0)
    assert torch.equal(batch.target.x[:, 0], batch.reference.x[:, 0]) is pair_shares
    assert len({x.sum().item() for x in batch.target.x[:, 0]}) == 4  # every pair has its own x_N
    with torch.no_grad():
        rows = condition.rows(batch.prompts.repeat_interleave(3))
        eps = [policy.eps(chain, s.n, s.x, rows) for s in batch.sides]
    z = [(s.answer - chain.mean(s.n, s.x, e)) / chain.std(s.n, s.x) for s, e in zip(batch.sides, eps, strict=True)]
    members = torch.stack(z, 1).flatten(0, 1)  # both members of pair 0, of pair 1, ...
    alike = [[torch.allclose(a, b, atol=1e-2) for b in members] for a in members]
    assert sum(map(sum, alike)) == 8 * over  # each is like itself, and like one more where noise is shared


def test_evidence_of_a_guided_sampler_is_that_of_its_own_steps():
    """The log-ratio by torch.distributions, with the guidance written out; that of the bare network is another."""
    policy, chain = new_policy(moved=0.2), Renoise(TIMES)
    policy.guidance_scale = 3.0
    condition, n = policy.encode_prompts(toy.PROMPTS[:4]), STEPS.expand(4, 3)
    with torch.no_grad():
        states = rollout(policy, chain, condition, KEYS).states
    side = reverse_side(chain, states, n)
    rows = condition.rows(torch.arange(4).repeat_interleave(3))
    step = Objective(pso_online, pso_online.Config(**CONFIGS[pso_online]), policy, chain, 100)
    with torch.no_grad():
        call = Call([flatten(side)], torch.arange(4).repeat_interleave(3), [(0, 0)])
        (found,) = step.evidence(call, condition, step.pre(call, condition))

    def log_density(pre: bool, scale: float) -> torch.Tensor:
        nothing = Conditioning(torch.zeros_like(rows.hidden), torch.zeros_like(rows.pooled))
        with torch.no_grad():
            given, none = (policy.eps(chain, n, side.x, c, pre=pre) for c in (rows, nothing))
        mean = chain.mean(n, side.x, none + scale * (given - none))
        return torch.distributions.Normal(mean.double(), chain.std(n, side.x).double()).log_prob(side.answer.double())

    for scale, same in ((3.0, True), (1.0, False)):
        expected = (log_density(False, scale) - log_density(True, scale)).mean((-3, -2, -1)).flatten()
        close = torch.allclose(found.ratio.flatten().double(), expected, rtol=1e-3, atol=1e-5)
        assert close is same and expected.abs().max() > 0.1


# ---- online: the clip and ties ----

LOW, HIGH = math.log(0.9), math.log(1.1)


def clipped(target, reference) -> np.ndarray:
    """Section 2.4: beta (log clamp(exp d_target) - log clamp(exp d_reference)), each ratio on its own."""
    return 5.0 * (np.log(np.clip(np.exp(target), 0.9, 1.1)) - np.log(np.clip(np.exp(reference), 0.9, 1.1)))


WRONG_CLIPS = {
    "margin": lambda t, r: 5.0 * np.clip(t - r, LOW, HIGH),
    "symmetric": lambda t, r: 5.0 * (np.clip(t, -0.1, 0.1) - np.clip(r, -0.1, 0.1)),
    "from one side": lambda t, r: 5.0 * (np.minimum(t, HIGH) - np.maximum(r, LOW)),
    "against the other side": lambda t, r: 5.0 * (np.clip(t - r, LOW, HIGH) - np.clip(r - t, LOW, HIGH)),
}


@few
@given(pairs=ratios)
def test_clip_bounds_each_ratio_to_pre(pairs):
    target, reference = both(pairs)
    expected = toy.minus_log_sigmoid(clipped(target.numpy(), reference.numpy())).mean()
    assert loss(pso_online, target, reference, ratio_clip=0.1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", WRONG_CLIPS)
def test_clip_check_rejects(wrong):
    pairs = [(0.2, 0.0), (0.0, 0.2), (-0.2, 0.0), (0.0, -0.2), (0.2, 0.2)]
    found = [loss(pso_online, *both([p]), ratio_clip=0.1).item() for p in pairs]
    assert found == pytest.approx([toy.minus_log_sigmoid(clipped(*p)) for p in pairs], rel=1e-12)
    assert found != pytest.approx([toy.minus_log_sigmoid(WRONG_CLIPS[wrong](*p)) for p in pairs], rel=1e-3)


@pytest.mark.parametrize("outside", [LOW - 1e-6, HIGH + 1e-6, -1.0, 1.0])
@pytest.mark.parametrize("cut", ["target", "reference"])
def test_a_clipped_member_alone_has_no_gradient(outside, cut):
    target, reference = (v.requires_grad_() for v in both([(outside, 0.05) if cut == "target" else (0.05, outside)]))
    up, down = torch.autograd.grad(loss(pso_online, target, reference, ratio_clip=0.1), (target, reference))
    silent, free = (up, down) if cut == "target" else (down, up)
    assert silent.item() == 0.0
    assert free.item() != 0.0


@few
@given(pairs=st.lists(st.tuples(*[st.floats(LOW + 1e-9, HIGH - 1e-9)] * 2), min_size=1, max_size=4))
def test_inside_the_clip_nothing_changes(pairs):
    found = []
    for clip in (0.1, None):
        target, reference = (v.requires_grad_() for v in both(pairs))
        value = loss(pso_online, target, reference, ratio_clip=clip)
        found.append([value, *torch.autograd.grad(value, (target, reference))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("beta", "low", "high"), [(50.0, 4.39e-5, 10.0336), (5.0, 0.31236, 1.31571)])
def test_clip_bounds_the_loss(beta, low, high):
    values = [loss(pso_online, *both([p]), beta=beta, ratio_clip=0.1).item() for p in ((9.0, -9.0), (-9.0, 9.0))]
    assert values == [pytest.approx(low, rel=2e-4), pytest.approx(high, rel=1e-5)]
    assert loss(pso_online, *both([(-9.0, 9.0)]), beta=beta).item() > 2 * high


def test_clip_fraction_counts_members():
    batch = Batch(torch.arange(2), None)
    target, reference = both([(0.2, 0.0), (-0.2, 0.3)])
    cfg = pso_online.Config(**CONFIGS[pso_online], ratio_clip=0.1)
    assert pso_online.loss(Evidence(ratio=target), Evidence(ratio=reference), batch, cfg)[1]["clip_fraction"] == 0.75


def test_the_second_member_wins_a_tie():
    """The authors' `sample_compare([.2, .3, .1], [.1, .3, .2])`: the first wins only if strictly better."""
    first, second = (torch.full((3, 2, 1, 1, 1), v) for v in (1.0, 2.0))
    rewards = [torch.tensor([0.2, 0.3, 0.1]), torch.tensor([0.1, 0.3, 0.2])]
    ranked = rank(torch.arange(3), [first, second], rewards)
    assert ranked["target"][:, 0].flatten().tolist() == [1, 2, 2]  # a tie to the first would be [1, 1, 2]
    assert ranked["reference"][:, 0].flatten().tolist() == [2, 1, 1]
    assert ranked["reward_target"].tolist() == pytest.approx([0.2, 0.3, 0.2])
    assert ranked["reward_reference"].tolist() == pytest.approx([0.1, 0.3, 0.1])
    assert ranked["tied"].tolist() == [False, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_a_tie_without_gradient_is_exactly_log_2(mode):
    target, reference = (v.requires_grad_() for v in toy.randn(0, 2, 3, 3, dtype=torch.float64))
    options = {"tie_rule": "no_grad", "timestep_mode": mode, "tied": torch.tensor([False, True, False])}
    value = loss(pso_online, target, reference, **options)
    up, down = torch.autograd.grad(value, (target, reference))
    others = [loss(pso_online, target[[i]], reference[[i]], timestep_mode=mode).item() for i in (0, 2)]
    assert value.item() == pytest.approx((sum(others) + toy.LOG_2) / 3, rel=1e-12)
    assert (up[1].abs().sum(), down[1].abs().sum()) == (0, 0)
    assert (up[[0, 2]] != 0).all()
    second_wins = loss(pso_online, target, reference, **options | {"tie_rule": "second_wins"}).item()
    assert second_wins != pytest.approx(value.item(), rel=1e-3)
