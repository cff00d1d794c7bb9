"""Diffusion-DPO, RPO and MaPO: formulas in float64, limits, gradients through the toy network, and one pair overfitted.

Numbers of properties are those of spec/baselines.md, Section 9.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import PropertyMock, patch

import numpy as np
import pytest
import torch
import toy
from test_objectives import diffusion_dpo as published_dpo
from test_objectives import drawn
from torch import Tensor
from toy import LOG_2, SHAPE, TIMES, exact, new_policy, randn

from baselines import diffusion, diffusion_dpo, mapo, rpo
from pso import pso_offline
from pso.entries import EvidenceConfig
from pso.evidence import Batch, Evidence, Side, gather
from pso.mdp import Ancestral, Renoise
from pso.objective import Objective, numbers
from pso.policy import Policy
from pso.sources import Given, PreferencePairs

DPO = {"beta": 10.0, "times": "uniform"}
RPO = DPO | {"distance": "multi", "temperature": 0.5, "group_size": 4}
MAPO = {"beta": 0.1, "margin_scale": 1000.0, "snr": 0.5, "times": "uniform"}
SETTINGS = {diffusion_dpo: DPO, rpo: RPO, mapo: MAPO, diffusion: {"times": "uniform"}}
BASELINES = [pytest.param(m, id=m.__name__) for m in (diffusion_dpo, rpo, mapo)]
AGAINST_PRE = BASELINES[:2]


def randn64(seed: int, *shape: int) -> Tensor:
    return randn(seed, *shape, dtype=torch.float64)


def embeddings(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Unit vectors, with a common part, so that cosines are not all near 0."""
    found = {k: 1 + randn(seed + i, count, 6, dtype=dtype) for i, k in enumerate(("text", "target", "reference"))}
    return {k: torch.nn.functional.normalize(v, dim=-1) for k, v in found.items()}


def loss(module, target: Tensor, reference: Tensor, **changes) -> Tensor:
    """The loss on ratios, or on errors for MaPO, [B] each."""
    column, sign = ("raw", -1) if module is mapo else ("ratio", 1)
    evidence = [Evidence(**{column: sign * v[:, None]}) for v in (target, reference)]
    batch = Batch(torch.arange(len(target)), None, embeddings=embeddings(len(target)))
    return module.loss(*evidence, batch, module.Config(**SETTINGS[module] | changes))[0]


# ---- formulas in float64, by loops ----


def rpo_by_loops(u, v, e, cfg: dict, wrong: str = "") -> float:
    """The parent's algebra, pair by pair; `wrong` is one of its misreadings."""
    size, total = cfg["group_size"], []
    e = {k: x.numpy() for k, x in e.items()}
    for start in range(0, len(u), size):
        group = range(start, start + size)
        for i in group:
            text = [1 - e["text"][i] @ e["text"][j] for j in group]
            image = [1 - e["target"][i] @ e["reference"][j] for j in group]
            if wrong == "same side":
                image = [1 - e["target"][i] @ e["target"][j] for j in group]
            distance = {"text": text, "image": image, "multi": [(a + b) / 2 for a, b in zip(text, image, strict=True)]}
            near = [math.exp(-d / cfg["temperature"]) for d in distance[cfg["distance"]]]
            for j, w in zip(group, near, strict=True):
                w = w / (max(near) if wrong == "not normalised" else sum(near))
                margin = u[j] - v[i] if wrong == "transposed" else u[i] - v[j]
                logit = cfg["beta"] / (1 if wrong == "no half" else 2) * margin
                if wrong == "weight outside":
                    total.append(w * toy.minus_log_sigmoid(logit) * size)
                else:
                    total.append(toy.minus_log_sigmoid(w * logit))
    return float(np.mean(total))


@pytest.mark.parametrize("distance", ["text", "image", "multi"])
@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_rpo_is_the_parents_formula(distance, group_size):
    u, v, cfg = *randn64(0, 2, 8), RPO | {"distance": distance, "group_size": group_size}
    expected = rpo_by_loops(u.numpy(), v.numpy(), embeddings(8), cfg)
    assert loss(rpo, u, v, **cfg).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", ["same side", "not normalised", "transposed", "no half", "weight outside"])
def test_a_misread_rpo_is_another_number(wrong):
    u, v = randn64(0, 2, 8)
    other = rpo_by_loops(u.numpy(), v.numpy(), embeddings(8), RPO, wrong)
    assert loss(rpo, u, v).item() != pytest.approx(other, rel=1e-3)


def dpo_through_outputs(chain=Renoise, beta: float = 10.0, **changes) -> tuple[Tensor, list]:
    sides = [drawn("forward", seed, [[4], [3], [2], [1]]) for seed in (0, 10)]
    evidence = [gather(exact(chain), *v, EvidenceConfig()) for v in sides]
    cfg = diffusion_dpo.Config(**DPO | {"beta": beta} | changes)
    return diffusion_dpo.loss(*evidence, Batch(torch.arange(4), sides[0][0]), cfg)[0], sides


@pytest.mark.parametrize("beta", [10.0, 5000.0])
def test_dpo_is_the_published_formula(beta):
    """From the network's outputs: the half is there, and each pair has its own sigmoid (diffusers#6702)."""
    found, sides = dpo_through_outputs(beta=beta)
    assert found.item() == pytest.approx(published_dpo(*sides, beta=beta), rel=1e-11)
    assert found.item() != pytest.approx(published_dpo(*sides, beta=2 * beta), rel=1e-3)
    u, v = randn64(0, 2, 8)
    of_mean = toy.minus_log_sigmoid(5 * (u - v).mean().item())
    assert loss(diffusion_dpo, u, v).item() != pytest.approx(of_mean, rel=1e-3)


def mapo_formula(d_target, d_reference, s: float = 0.5, T: float = 1000.0, beta: float = 0.1) -> float:
    """The authors' code, in float64: exp(x) - 1 as they write it."""
    odds = [s * d / (np.exp(s * d) - 1) for d in (d_target, d_reference)]
    return d_target.mean() + beta * toy.minus_log_sigmoid(T * (odds[0] - odds[1])).mean()


def test_mapo_is_the_formula_of_its_code():
    d_target, d_reference = 0.3 + 0.1 * randn64(0, 2, 8).abs()
    found, (a, b) = loss(mapo, d_target, d_reference).item(), (d_target.numpy(), d_reference.numpy())
    assert found == pytest.approx(mapo_formula(a, b), rel=1e-11)
    for wrong in (mapo_formula(b, a), mapo_formula(a, b, s=1.0), mapo_formula(a, b, T=4.0), mapo_formula(a, b, beta=1)):
        assert found != pytest.approx(wrong, rel=1e-3)


# ---- property 1: where nothing has moved ----


@pytest.mark.parametrize("module", AGAINST_PRE)
@pytest.mark.parametrize("beta", [10.0, 5000.0])
def test_loss_is_log_2_while_theta_is_pre(module, beta):
    zero, moved = torch.zeros(8, dtype=torch.float64), randn64(0, 8)
    assert loss(module, zero, zero, beta=beta).item() == pytest.approx(LOG_2, abs=1e-15)
    assert loss(module, moved, zero, beta=beta).item() != pytest.approx(LOG_2, abs=1e-3)


def test_mapo_of_two_equal_sides_is_their_error_and_a_tenth_of_log_2():
    d = 0.2 + randn64(0, 8).abs()
    assert loss(mapo, d, d).item() == pytest.approx(d.mean().item() + 0.1 * LOG_2, rel=1e-12)
    assert loss(mapo, d, 1.01 * d).item() != pytest.approx(d.mean().item() + 0.1 * LOG_2, rel=1e-3)


# ---- property 2: the limits of RPO ----


def with_gradients(module, u: Tensor, v: Tensor, **changes) -> list[Tensor]:
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    value = loss(module, u, v, **changes)
    return [value.detach(), *torch.autograd.grad(value, (u, v))]


@pytest.mark.parametrize("distance", ["text", "image", "multi"])
def test_rpo_of_groups_of_one_is_dpo(distance):
    u, v = randn64(0, 2, 8)
    dpo = with_gradients(diffusion_dpo, u, v)
    torch.testing.assert_close(with_gradients(rpo, u, v, distance=distance, group_size=1), dpo, rtol=1e-13, atol=0)
    pairs = with_gradients(rpo, u, v, distance=distance, group_size=2)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(pairs, dpo, strict=True))


def weights(**changes) -> Tensor:
    return rpo.weights(embeddings(8), rpo.Config(**RPO | changes))


def test_weights_are_a_softmax_over_the_references_of_the_group():
    found = weights()
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert not torch.allclose(found.sum(-2), torch.ones(2, 4, dtype=torch.float64), rtol=1e-3)


def test_a_hot_rpo_weighs_all_alike_and_a_cold_one_of_texts_is_dpo_among_others():
    torch.testing.assert_close(weights(temperature=1e12), torch.full((2, 4, 4), 0.25, dtype=torch.float64))
    assert (weights() - 0.25).abs().max() > 0.01
    u, v = randn64(0, 2, 8)
    cold = loss(rpo, u, v, distance="text", temperature=1e-6).item()
    assert cold == pytest.approx(loss(diffusion_dpo, u, v).item() / 4 + 3 / 4 * LOG_2, rel=1e-9)
    assert cold != pytest.approx(loss(diffusion_dpo, u, v).item(), rel=1e-3)
    own = weights(distance="image", temperature=1e-6).diagonal(dim1=-2, dim2=-1)
    assert (own < 1e-6).any()  # of pictures a pair's own reference need not be the nearest


# ---- property 3: MaPO's f ----


def f_and_slope(d: Tensor) -> tuple[Tensor, Tensor]:
    d = d.clone().requires_grad_()
    value = mapo.f(d, 0.5)
    return value.detach(), torch.autograd.grad(value.sum(), d)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_has_its_limit_at_0(dtype):
    value, slope = f_and_slope(torch.zeros(1, dtype=dtype))
    assert (value.item(), slope.item()) == (1.0, -0.25)
    naive = torch.zeros(1, dtype=dtype, requires_grad=True)
    (0.5 * naive / torch.expm1(0.5 * naive)).backward()
    assert naive.grad.isnan().all()


def test_f_and_its_slope_are_right_in_float32():
    d = torch.logspace(-9, 3, 2001, dtype=torch.float64)
    x = 0.5 * d.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.where(x < 500, x / np.expm1(x), 0.0)
        slope = 0.5 * np.where(x < 500, (1 - x / -np.expm1(-x)) / np.expm1(x), 0.0)
    slope = np.where(x < 1e-3, -0.25 + x / 12, slope)  # which cancels near 0 even in float64
    found, its_slope = f_and_slope(d.float())
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(its_slope, slope, rtol=2e-5, atol=1e-7)
    naive = d.float().requires_grad_()
    (0.5 * naive / torch.expm1(0.5 * naive)).sum().backward()
    assert not np.allclose(naive.grad, slope, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_at_no_margin_pushes_13_5_to_12_5(dtype):
    up, down = with_gradients(mapo, *torch.full((2, 1), 1e-7, dtype=dtype))[1:]
    assert (up.item(), down.item()) == (pytest.approx(13.5, rel=1e-5), pytest.approx(-12.5, rel=1e-5))
    up, down = with_gradients(mapo, *torch.full((2, 1), 0.5, dtype=dtype))[1:]  # f is flatter there
    assert 1 < up.item() - 1 < 12 and up.item() + down.item() == pytest.approx(1, abs=1e-4)
    assert with_gradients(mapo, torch.tensor([0.1]), torch.tensor([0.9]))[1].item() == pytest.approx(1, abs=1e-6)


# ---- property 6 ----


def test_offline_pso_is_dpo_with_twice_the_beta_at_one_transition():
    u, v = randn64(0, 2, 8)
    value = toy.loss(pso_offline, u[:, None], v[:, None], beta=5.0).item()
    assert value == pytest.approx(loss(diffusion_dpo, u, v, beta=10.0).item(), rel=1e-14)
    assert value != pytest.approx(loss(diffusion_dpo, u, v, beta=5.0).item(), rel=1e-3)
    three = toy.loss(pso_offline, *randn64(0, 2, 4, 3), beta=5.0).item()  # the sum stands inside the sigmoid
    assert three != pytest.approx(loss(diffusion_dpo, *randn64(0, 2, 12), beta=10.0).item(), rel=1e-3)


# ---- through the network ----


def pairs_of(count: int, steps: list[int], chain=None, seed: int = 0) -> Batch:
    """Forward pairs with shared eps, one time each, and embeddings."""
    chain, n = chain or Renoise(TIMES), torch.tensor(steps)[:, None]
    eps = randn(seed, count, 1, *SHAPE)
    sides = [Side("forward", n, chain.noise_to(n, randn(seed + k, count, 1, *SHAPE), eps), eps) for k in (1, 2)]
    return Batch(torch.arange(count) % 4, *sides, embeddings=embeddings(count, dtype=torch.float32))


def step(policy, module, batch: Batch, micro_batch: int = 100, chain=None, **changes):
    """(gradient in one vector, loss, logs) of one training step."""
    cfg = module.Config(**SETTINGS[module] | changes)
    objective = Objective(module, cfg, policy, chain or Renoise(TIMES), micro_batch)
    value, logs = objective.backward(batch, policy.encode_prompts(toy.PROMPTS))
    vector = torch.cat([p.grad.flatten() for p in policy.lora_parameters()])
    for p in policy.lora_parameters():
        p.grad = None
    logs = numbers({"loss": value, **logs})
    return vector, logs.pop("loss"), logs


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


STRONG = {diffusion_dpo: {"beta": 500.0}, rpo: {"beta": 500.0, "group_size": 2}, mapo: {}}


@pytest.mark.parametrize("module", BASELINES)
@pytest.mark.parametrize("steps", [[3, 3, 4, 4], [4, 4, 1, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_gradient_and_logs_do_not_depend_on_the_micro_batch(module, steps, micro_batch):
    """Cross terms included; and times of which one part has a KL and another none."""
    policy, batch = new_policy(moved=0.3), pairs_of(4, steps)
    whole, value, logs = step(policy, module, batch, **STRONG[module])
    parts, same_value, same_logs = step(policy, module, batch, micro_batch, **STRONG[module])
    assert apart(parts, whole) < 1e-4  # float32: 1e-5, on another CPU 3e-5
    assert same_value == pytest.approx(value, rel=1e-5)
    assert same_logs == pytest.approx(logs, rel=1e-3, abs=1e-7)
    assert ("kl_batch" in logs) is (1 not in steps and module is not mapo)


def test_rpo_chunk_by_chunk_would_be_another_gradient():
    policy, batch = new_policy(moved=0.3), pairs_of(4, [3] * 4)
    together, in_twos = (step(policy, rpo, batch, beta=500.0, group_size=size)[0] for size in (4, 2))
    assert apart(in_twos, together) > 0.05


@pytest.mark.parametrize("module", AGAINST_PRE)
def test_loss_of_a_fresh_adapter_is_log_2(module):
    batch = pairs_of(4, [3, 3, 4, 4])
    more = {"group_size": 2} if module is rpo else {}
    assert step(new_policy(), module, batch, **more)[1] == pytest.approx(LOG_2, abs=1e-7)
    assert step(new_policy(moved=0.3), module, batch, **more)[1] != pytest.approx(LOG_2, abs=1e-5)


def test_mapo_never_runs_pre_and_the_others_do():
    policy, batch = new_policy(moved=0.3), pairs_of(4, [3] * 4)
    for micro_batch, forwards in ((100, 8), (3, 16)):  # two passes run theta twice
        before = policy.unet_forwards
        with patch.object(Policy, "pre_unet", PropertyMock(side_effect=AssertionError("pre"))):
            step(policy, mapo, batch, micro_batch)
            for module in (diffusion_dpo, rpo):
                with pytest.raises(AssertionError, match="pre"):
                    step(policy, module, batch, micro_batch)
        assert policy.unet_forwards - before == forwards
    assert [m.NEEDS_PRE for m in (mapo, diffusion_dpo, rpo)] == [False, True, True]


# ---- property 13: the published recipe for SDXL-Turbo ----


def turbo_batch(zero_terminal_snr: bool, steps: list[int]):
    """(chain, batch) of the source on the toy's latents, at given steps of the ancestral sampler."""
    cfg = diffusion_dpo.Config(beta=5000.0, times="sampler_grid", zero_terminal_snr=zero_terminal_snr)
    device = SimpleNamespace(device=torch.device("cpu"))
    source = PreferencePairs(Given(device, Ancestral(TIMES), cfg, 0, len(steps), toy.FakePairs(shape=SHAPE)))
    index, n = list(range(len(steps))), torch.tensor(steps)[:, None]
    sides = [source.noised(side, 0, index, n, True) for side in ("target", "reference")]
    return source.chain, Batch(torch.arange(len(steps)) % 4, *sides)


def test_at_zero_terminal_snr_the_first_time_teaches_nothing():
    policy, norms = new_policy(moved=0.3), {}
    for flag in (True, False):
        for n in (4, 3):
            chain, batch = turbo_batch(flag, [n, n])
            gradient, _, logs = step(policy, diffusion_dpo, batch, chain=chain, beta=5000.0)
            norms[flag, n] = gradient.norm().item()
            assert torch.equal(batch.target.x, batch.reference.x) is (flag and n == 4)
            assert (logs["margin"] == 0) is (flag and n == 4)
    assert norms[True, 4] < 1e-5 * norms[True, 3]
    assert min(norms[True, 3], norms[False, 4], norms[False, 3]) > 1e-3 * max(norms.values())


def test_that_gradient_is_exactly_0_where_rows_do_not_differ_by_rounding():
    def slope(flag: bool, n: int) -> float:
        chain, batch = turbo_batch(flag, [n, n])
        weight = torch.tensor(0.3, requires_grad=True)  # a network of one weight
        evidence = [gather(chain, s, weight * s.x, 0.1 * s.x, EvidenceConfig()) for s in batch.sides]
        value, _ = diffusion_dpo.loss(*evidence, batch, diffusion_dpo.Config(beta=5000.0, times="sampler_grid"))
        return torch.autograd.grad(value, weight)[0].item()

    assert slope(True, 4) == 0.0
    assert 0.0 not in (slope(True, 3), slope(False, 4))


def test_zero_terminal_snr_is_the_variance_preserving_picture_of_the_rescaled_schedule():
    chain, batch = turbo_batch(True, [4, 3, 2, 1])
    assert chain.time(torch.tensor([4, 3, 2, 1])).tolist() == TIMES
    assert chain.alpha_bar[[4, 3, 2, 1]].tolist() == pytest.approx([0, 0.0332, 0.2424, 0.6542], abs=1e-4)
    assert chain.alpha_bar[4] == 0 and not chain.stochastic
    side, clean = batch.target, toy.FakePairs(shape=SHAPE).means["target"][:4, None]
    assert torch.equal(side.x[0], side.answer[0])  # eps alone
    scale = chain.alpha_bar[side.n][..., None, None, None]
    torch.testing.assert_close(side.x, scale.sqrt() * clean + (1 - scale).sqrt() * side.answer)
    assert torch.equal(chain.scale_input(side.n, side.x), side.x)  # as it is shown to the network
    exploding, plain = turbo_batch(False, [4, 3, 2, 1])
    assert type(exploding) is Ancestral and not torch.allclose(plain.target.x, side.x, atol=0.1)


# ---- property 15: each objective overfits one pair ----


def errors(policy, batch: Batch) -> np.ndarray:
    """d of target and reference, over the pairs."""
    condition = policy.encode_prompts(toy.PROMPTS).rows(batch.prompts)
    with torch.no_grad():
        outputs = [policy.eps(Renoise(TIMES), s.n, s.x, condition) for s in batch.sides]
    return np.array([((e - s.answer) ** 2).mean().item() for e, s in zip(outputs, batch.sides, strict=True)])


def overfit(module, batch: Batch, updates: int = 25, **changes) -> tuple[np.ndarray, np.ndarray]:
    """Changes of both errors, and the losses."""
    policy = new_policy()
    condition, cfg = policy.encode_prompts(toy.PROMPTS), module.Config(**SETTINGS[module] | changes)
    objective = Objective(module, cfg, policy, Renoise(TIMES), 100)
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=1e-2)
    before, losses = errors(policy, batch), []
    for _ in range(updates):
        losses.append(objective.backward(batch, condition)[0].item())
        optimizer.step()
        optimizer.zero_grad()
    return errors(policy, batch) - before, np.array(losses)


ONE_PAIR = {diffusion_dpo: {"beta": 1000.0}, rpo: {"beta": 1000.0, "group_size": 1}, mapo: {}}


@pytest.mark.parametrize("module", BASELINES)
def test_one_pair_is_overfitted_and_its_margin_rises(module):
    batch, more = pairs_of(1, [3]), ONE_PAIR[module]
    (target, reference), losses = overfit(module, batch, **more)
    assert reference - target > 0.01 and losses[-1] < 0.7 * losses[0]
    right = module.loss
    with patch.object(module, "loss", lambda t, r, b, cfg: right(r, t, b, cfg)):
        (target, reference), _ = overfit(module, batch, **more)
    assert reference - target < -0.01


def test_groups_of_pairs_are_overfitted_too():
    (target, reference), losses = overfit(rpo, pairs_of(4, [3] * 4), beta=1000.0)
    assert reference - target > 0.01 and losses[-1] < 0.9 * losses[0]


def test_sft_lowers_the_error_of_the_target_and_sees_no_reference():
    (target,), losses = overfit(diffusion, replace(pairs_of(1, [3]), reference=None))
    assert target < -0.01 and losses[-1] < losses[0]
    evidence, cfg = Evidence(raw=-torch.rand(2, 1)), diffusion.Config(times="uniform", caption_dropout=0.2)
    assert diffusion.loss(evidence, None, None, cfg)[0] == -evidence.raw.mean()
