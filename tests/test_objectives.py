"""Eq. 5, 6 and 7 against the golden numbers of the authors' functions, formulas in float64 and their invariants."""

import math

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from toy import ALPHA_BAR, CONFIGS, METHODS, MODES, STOCHASTIC, TIMES, both, exact, few, loss, randn, ratios

from baselines import diffusion
from pso import pso, pso_offline, pso_online
from pso.config import ConfigError, check
from pso.entries import EvidenceConfig
from pso.evidence import Batch, Side, forward_ratio, gather, reverse_ratio
from pso.mdp import Ancestral, Renoise


def drawn(process: str, seed: int = 0, steps=((4, 3, 2), (4, 3, 2))) -> tuple[Side, Tensor, Tensor]:
    """A float64 side and the outputs of theta and pre."""
    n = torch.tensor(steps)
    x, answer, pre, change = (randn(seed + s, *n.shape, 4, 8, 8, dtype=torch.float64) for s in range(4))
    return Side(process, n, x, answer), pre + 0.2 * change, pre


# ---- golden numbers, Section 6.2 ----


@pytest.mark.parametrize("name", toy.GOLDEN)
def test_kernel_gives_the_authors_log_probs(name):
    golden, chain, pair = toy.GOLDEN[name], toy.GOLDEN[name]["chain"], toy.members(name)

    def log_prob(side, eps, a):
        return Normal(chain.mean(toy.N, side.x, eps), chain.std(toy.N, side.x)).log_prob(a).flatten(1).mean(1).tolist()

    assert [log_prob(s, e, s.answer) for s, e, _ in pair] == [pytest.approx(v, abs=5e-6) for v in golden["logp"]]
    assert [log_prob(s, r, s.answer) for s, _, r in pair] == [pytest.approx(v, abs=5e-6) for v in golden["logp_pre"]]
    side, eps, pre = pair[0]
    assert log_prob(side, eps, torch.zeros_like(eps)) == pytest.approx(golden["logp_at_0"], abs=5e-6)
    assert chain.mean(toy.N, side.x, eps)[:, 0, 0, 0, :3].flatten().tolist() == pytest.approx(golden["mean"], abs=5e-6)
    assert log_prob(side, pre, side.answer) != pytest.approx(golden["logp"][0], abs=5e-6)


def released(name: str, beta: float, reduction="mean", mode="per_step_mean", signs=(True, False)) -> dict:
    """The released loss: per transition, ratios clipped at 0.1; member 0 wins where `signs`, else member 1."""
    pair, chain = toy.members(name), toy.GOLDEN[name]["chain"]
    d = [reverse_ratio(chain, side, eps, pre, reduction) for side, eps, pre in pair]
    first = torch.tensor(signs)[:, None]
    target, reference = torch.where(first, d[0], d[1]), torch.where(first, d[1], d[0])
    if mode == "trajectory_sum":
        target, reference = target.T, reference.T
    value = loss(pso_online, target, reference, **toy.RELEASED | {"beta": beta, "timestep_mode": mode})
    grads = torch.autograd.grad(value, [eps for _, eps, _ in pair])
    return {
        "d": [v[:, 0].tolist() for v in d],
        "loss": value.item(),
        "norms": [g.norm().item() for g in grads],
        "first": [g.flatten()[0].item() for g in grads],
    }


def is_golden(found: dict, name: str, beta: float) -> bool:
    value, norms, first = toy.GOLDEN[name][beta]
    known = [(a, b) for a, b in zip(found["first"], first, strict=True) if b is not None]
    return (
        found["d"] == [pytest.approx(v, abs=5e-6) for v in toy.GOLDEN[name]["d"]]
        and found["loss"] == pytest.approx(value, abs=5e-6)
        and found["norms"] == pytest.approx(norms, rel=1e-4)
        and all(a == pytest.approx(b, rel=1e-4) for a, b in known)
    )


@pytest.mark.parametrize("name", toy.GOLDEN)
@pytest.mark.parametrize("beta", [5.0, 50.0])
def test_online_loss_and_gradients_are_the_authors(name, beta):
    assert is_golden(released(name, beta), name, beta)


@pytest.mark.parametrize(
    "wrong", [{"reduction": "sum"}, {"mode": "trajectory_sum"}, {"signs": (False, True)}, {"signs": (True, True)}]
)
def test_golden_check_rejects(wrong):
    assert not is_golden(released("DMD2", 5.0, **wrong), "DMD2", 5.0)


def test_log_ratio_is_the_float64_closed_form():
    side, eps, pre = toy.members("DMD2", torch.float64)[0]
    found = reverse_ratio(exact(Renoise), side, eps, pre, "mean").flatten().tolist()
    assert found == pytest.approx([-0.011325235807801048, -0.004187825387411487], rel=1e-12)
    with_float32 = reverse_ratio(Renoise(TIMES), side, eps, pre, "mean").flatten().tolist()
    assert with_float32 != pytest.approx(found, rel=1e-12)


def offline_margins() -> tuple[Tensor, Tensor]:
    eps = toy.fill(1.31, 0.5)
    side = Side("forward", toy.N, eps, eps)
    outputs = [toy.fill(0.71, 0.2, 0.3), toy.fill(0.91, 0.3, 0.32), toy.fill(0.29, 1.1, 0.3), toy.fill(0.83, 0.9, 0.31)]
    theta_w, pre_w, theta_l, pre_l = (eps + v for v in outputs)
    cfg = EvidenceConfig()
    return tuple(forward_ratio(exact(Renoise), side, *v, cfg) for v in ((theta_w, pre_w), (theta_l, pre_l)))


@pytest.mark.parametrize(
    ("beta", "singles", "mean"),
    [(50.0, [0.5856223477, 0.6208549108], 0.6032386292), (2500.0, [1.11843057e-5, 5.46861897e-4], None)],
)
def test_offline_loss_is_the_golden_one(beta, singles, mean):
    target, reference = offline_margins()
    assert (reference - target).flatten().tolist() == pytest.approx([-0.004560397379, -0.003004416327], abs=5e-13)
    each = [loss(pso_offline, target[i, None], reference[i, None], beta=beta).item() for i in (0, 1)]
    assert each == pytest.approx(singles, rel=5e-9)
    assert loss(pso_offline, target, reference, beta=beta).item() == pytest.approx(mean or sum(singles) / 2, rel=5e-9)
    assert loss(pso_offline, reference, target, beta=beta).item() != pytest.approx(sum(singles) / 2, rel=0.01)


def test_offline_sum_over_a_trajectory_is_the_golden_one():
    target, reference = (v.T for v in offline_margins())  # two transitions of one sample
    assert loss(pso_offline, target, reference, beta=50.0).item() == pytest.approx(0.5218044922, abs=5e-11)
    per_step = loss(pso_offline, target, reference, beta=50.0, timestep_mode="per_step_mean")
    assert per_step.item() == pytest.approx(0.6032386292, abs=5e-11)


# ---- values and gradients, Section 6.3 ----


@pytest.mark.parametrize("module", METHODS)
@few
@given(rows=st.lists(st.lists(st.tuples(*[st.floats(-0.5, 0.5)] * 2), min_size=3, max_size=3), min_size=1, max_size=4))
def test_loss_is_minus_log_sigmoid_of_the_summed_margin(module, rows):
    target, reference = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    margin = (target - reference).numpy()
    inside, outside = toy.minus_log_sigmoid(5 * margin.sum(1)).mean(), toy.minus_log_sigmoid(5 * margin).mean()
    assert loss(module, target, reference).item() == pytest.approx(inside, rel=1e-12)
    per_step = loss(module, target, reference, timestep_mode="per_step_mean").item()
    assert per_step == pytest.approx(outside, rel=1e-12)
    assert per_step >= toy.minus_log_sigmoid(5 * margin.mean(1)).mean() - 1e-12  # convexity, Section 2.4


def test_a_sigmoid_of_the_mean_would_be_another_loss():
    margin = torch.tensor([[0.3, -0.2, 0.1], [-0.4, 0.0, 0.2]], dtype=torch.float64)
    of_mean = toy.minus_log_sigmoid(5 * margin.mean())
    for mode in MODES:
        assert loss(pso_offline, margin, 0 * margin, timestep_mode=mode).item() != pytest.approx(of_mean, rel=1e-3)


def at_sides(module, kind: type, leaf: bool = False, moved: bool = False, **changes):
    """The loss through the network's outputs: (loss, [(side, eps_theta, eps_pre)])."""
    cfg, chain = module.Config(**CONFIGS[module] | changes), exact(kind)
    sides = [drawn(process, 10 * k) for k, process in enumerate(toy.PROCESSES[module])]
    sides = [(s, (theta if moved else pre.clone()).requires_grad_(leaf), pre) for s, theta, pre in sides]
    options = EvidenceConfig(reduction=cfg.reduction, omega=cfg.omega, forward_coupling=cfg.forward_coupling)
    evidence = [gather(chain, *v, options) for v in sides]
    batch = Batch(torch.arange(2), sides[0][0], sides[1][0])
    return module.loss(*evidence, batch, cfg)[0], sides


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("mode", MODES)
def test_loss_is_log_2_while_theta_is_pre(module, kind, mode):
    assert at_sides(module, kind, timestep_mode=mode)[0].item() == pytest.approx(toy.LOG_2, abs=1e-15)
    assert at_sides(module, kind, timestep_mode=mode, moved=True)[0].item() != pytest.approx(toy.LOG_2, abs=1e-3)


def slope(side: Side, eps: Tensor, kind: type, omega: str) -> Tensor:
    """d lr_n / d eps_theta at theta = pre, before the reduction, from the definitions."""
    a, b = (ALPHA_BAR[torch.tensor([0, *reversed(TIMES)])[n]][..., None, None, None] for n in (side.n, side.n - 1))
    rho = b / (1 - b) / (a / (1 - a)) - (1 if kind is Ancestral else 0)
    if side.process == "forward":
        return 2 * (side.answer - eps) * (rho / 2 if omega == "kl" else 1)
    std = exact(kind).std(side.n, side.x)
    return (side.answer - exact(kind).mean(side.n, side.x, eps)) / std**2 * -(std * rho.sqrt())


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("mode", "omega"), [("trajectory_sum", "one"), ("per_step_mean", "kl")])
def test_gradient_at_pre_is_half_beta_towards_target_and_away_from_reference(module, kind, reduction, mode, omega):
    value, sides = at_sides(module, kind, leaf=True, timestep_mode=mode, reduction=reduction, omega=omega)
    grads = torch.autograd.grad(value, [eps for _, eps, _ in sides])
    share = 5.0 / 2 / 2 / (256 if reduction == "mean" else 1) / (1 if mode == "trajectory_sum" else 3)
    for sign, grad, (side, eps, _) in zip((-1, 1), grads, sides, strict=True):
        expected = sign * share * slope(side, eps.detach(), kind, omega)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(grad, -expected, rtol=1e-3)


@pytest.mark.parametrize("module", METHODS)
@few
@given(pairs=ratios)
def test_gradient_in_the_margin(module, pairs):
    target, reference = (v.requires_grad_() for v in both(pairs))
    up, down = torch.autograd.grad(loss(module, target, reference), (target, reference))
    expected = -5.0 * torch.sigmoid(-5.0 * (target - reference).detach()) / len(pairs)
    torch.testing.assert_close(up, expected)
    torch.testing.assert_close(down, -expected)
    assert (up < 0).all()


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_a_small_step_raises_target_over_reference(module, kind):
    value, sides = at_sides(module, kind, leaf=True, moved=True)
    grads = torch.autograd.grad(value, [eps for _, eps, _ in sides])

    def margin(step: float) -> float:
        moved = [(s, e.detach() - step * g, p) for (s, e, p), g in zip(sides, grads, strict=True)]
        target, reference = (gather(exact(kind), *v, EvidenceConfig()).ratio for v in moved)
        return (target - reference).mean().item()

    assert margin(-1.0) < margin(0.0) < margin(1.0)


def margin_of(value: Tensor) -> float:
    return -math.log(math.expm1(value.item())) / 5.0


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_online_argument_is_the_log_ratio_of_the_trajectories(kind):
    """1 / (2 sigma_n^2) stands inside the sum."""
    chain, sides = exact(kind), [drawn("reverse", 10 * k, [[4, 3, 2]]) for k in (0, 1)]
    found = margin_of(loss(pso_online, *(reverse_ratio(chain, *v, "mean") for v in sides)))
    normals = [
        [Normal(chain.mean(s.n, s.x, e), chain.std(s.n, s.x)).log_prob(s.answer) for e in eps] for s, *eps in sides
    ]
    target, reference = ((theta - pre).flatten(2).mean(2).sum() for theta, pre in normals)
    assert found == pytest.approx((target - reference).item(), rel=1e-11)
    std = chain.std(sides[0][0].n, sides[0][0].x)
    outside = [((t - p) * std**2).flatten(2).mean(2).sum() / std[0, 0].item() ** 2 for t, p in normals]
    assert found != pytest.approx((outside[0] - outside[1]).item(), rel=1e-2)


def forward_and_reverse(kind: type, seed: int) -> tuple[Tensor, Tensor]:
    """Ratios [1, 3] of a clean latent, noised, and of a sampled trajectory."""
    clean, sampled = drawn("forward", seed, [[4, 3, 2]]), drawn("reverse", seed + 5, [[4, 3, 2]])
    return forward_ratio(exact(kind), *clean, EvidenceConfig()), reverse_ratio(exact(kind), *sampled, "mean")


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_eq_5_is_half_eq_6_and_half_eq_7(kind):
    forward, reverse = forward_and_reverse(kind, 0)
    target_half = margin_of(loss(pso_offline, forward, 0 * forward))
    reference_half = margin_of(loss(pso_online, 0 * reverse, reverse))
    assert margin_of(loss(pso, forward, reverse)) == pytest.approx(target_half + reference_half, rel=1e-10)
    assert margin_of(loss(pso, forward, reverse)) != pytest.approx(target_half - reference_half, rel=1e-2)


@pytest.mark.parametrize("module", METHODS)
def test_only_general_pso_is_not_symmetric(module):
    """Swapping the roles of two members negates the margin only if both sides have one kind of evidence."""
    members = [dict(zip(("forward", "reverse"), forward_and_reverse(Renoise, seed), strict=True)) for seed in (0, 10)]
    target, reference = toy.PROCESSES[module]
    there, back = (loss(module, u[target], v[reference]).item() for u, v in (members, members[::-1]))
    margin = (members[0][target] - members[1][reference]).sum().item()
    assert (there - back == pytest.approx(-5.0 * margin, rel=1e-9)) is (module is not pso)


@pytest.mark.parametrize("module", [pso_offline, pso_online])
@few
@given(pair=st.tuples(*[st.floats(-0.5, 0.5)] * 2))
def test_swapping_the_sides_negates_the_margin(module, pair):
    there, back = (loss(module, *both([v])).item() for v in (pair, pair[::-1]))
    assert there - back == pytest.approx(-5.0 * (pair[0] - pair[1]), abs=1e-12)
    assert there + back >= 2 * toy.LOG_2 - 1e-12


def diffusion_dpo(side_w, side_l, beta: float) -> float:
    """Wallace et al.: -logsigmoid(-beta/2 [(mse_w - mse_l) - (ref_w - ref_l)]), mean over latents and pairs."""
    (w, theta_w, pre_w), (l, theta_l, pre_l) = side_w, side_l
    errors = (w.answer - theta_w, l.answer - theta_l, w.answer - pre_w, l.answer - pre_l)
    mse = [(e**2).flatten(1).mean(1).numpy() for e in errors]
    return toy.minus_log_sigmoid(-beta / 2 * ((mse[0] - mse[1]) - (mse[2] - mse[3]))).mean()


def test_offline_is_diffusion_dpo_with_twice_the_beta():
    sides = [drawn("forward", seed, [[4], [3], [2], [3]]) for seed in (0, 10)]
    ours = loss(pso_offline, *(forward_ratio(exact(Renoise), *v, EvidenceConfig()) for v in sides)).item()
    assert ours == pytest.approx(diffusion_dpo(*sides, beta=10.0), rel=1e-12)
    assert ours != pytest.approx(diffusion_dpo(*sides, beta=5.0), rel=1e-3)


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_sum_with_beta_is_mean_with_d_beta(module, mode):
    options = {"timestep_mode": mode, "moved": True}
    total = at_sides(module, Ancestral, reduction="sum", beta=0.01, **options)[0].item()
    assert total == pytest.approx(at_sides(module, Ancestral, beta=0.01 * 256, **options)[0].item(), rel=1e-10)
    assert total != pytest.approx(at_sides(module, Ancestral, beta=0.01, **options)[0].item(), rel=1e-3)


# ---- any grouping of pairs and transitions ----


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_order_of_pairs_and_transitions_does_not_matter(module, mode):
    target, reference = randn(0, 2, 6, 3, dtype=torch.float64)
    pairs, steps = torch.tensor([3, 1, 5, 0, 2, 4])[:, None], torch.tensor([1, 2, 0])
    value = loss(module, target, reference, timestep_mode=mode).item()
    assert loss(module, target[pairs, steps], reference[pairs, steps], timestep_mode=mode).item() == pytest.approx(
        value
    )
    assert loss(module, target[pairs, steps], reference, timestep_mode=mode).item() != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_the_weighted_mean_of_its_parts(module, mode):
    target, reference = randn(0, 2, 6, 3, dtype=torch.float64)

    def part(rows):
        return loss(module, target[rows], reference[rows], timestep_mode=mode).item()

    singles = [part([i]) for i in range(6)]
    assert part(range(6)) == pytest.approx(sum(singles) / 6, rel=1e-12)
    assert part(range(6)) == pytest.approx((4 * part(range(4)) + 2 * part([4, 5])) / 6, rel=1e-12)
    assert part(range(6)) != pytest.approx((part(range(4)) + part([4, 5])) / 2, rel=1e-3)


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_finite_where_log_of_sigmoid_is_not(module, logit):
    margin = torch.tensor([[logit / 5.0]], requires_grad=True)
    value = loss(module, margin, torch.zeros_like(margin))
    value.backward()
    assert value.item() == pytest.approx(max(-logit, 0.0))
    assert margin.grad.item() == pytest.approx(-5.0 if logit < 0 else 0.0)
    assert -torch.log(torch.sigmoid(torch.tensor(-200.0))) == math.inf


def test_one_step_is_the_same_inside_and_outside():
    target, reference = randn(0, 2, 4, 1, dtype=torch.float64)
    values = {loss(pso_offline, target, reference, timestep_mode=m).item() for m in [*MODES, "sample_one"]}
    assert len(values) == 1


# ---- the naive diffusion loss ----


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_diffusion_loss_is_the_mean_error(reduction):
    side, theta, _ = drawn("forward", 0, [[3], [1]])
    cfg = diffusion.Config(times="uniform", reduction=reduction)
    evidence = gather(exact(Renoise), side, theta, None, EvidenceConfig(reduction=reduction))
    error = torch.nn.functional.mse_loss(theta, side.answer).item() * (256 if reduction == "sum" else 1)
    found = diffusion.loss(evidence, None, Batch(torch.arange(2), side), cfg)[0].item()
    assert found == pytest.approx(error, rel=1e-12)
    assert found != pytest.approx(-error, rel=1e-3)


# ---- what a Config refuses ----

WHERE = "methods.m.objective"
NUMBER_AS_TEXT = "expected a number; YAML reads it as text, write"
PREFERENCE_REFUSALS = [
    ({"bta": 5.0}, f"{WHERE}.bta is not a known key; did you mean beta?"),
    ({"beta": "1e-1"}, f"{WHERE}.beta is '1e-1' (text); {NUMBER_AS_TEXT} 0.1."),
    ({"beta": "five"}, f"{WHERE}.beta is 'five' (text); expected a number."),
    ({"beta": 0.0}, f"{WHERE}.beta is 0.0; expected a number above 0.0."),
    ({"reduction": "avg"}, f"{WHERE}.reduction is 'avg' (text); expected 'mean' or 'sum'."),
    ({"beta": None}, f"{WHERE}.beta is None; expected a number."),
]
ONLINE_REFUSALS = [
    ({"ratio_clip": "1e-1"}, f"{WHERE}.ratio_clip is '1e-1' (text); {NUMBER_AS_TEXT} 0.1."),
    ({"tie_rules": "no_grad"}, f"{WHERE}.tie_rules is not a known key; did you mean tie_rule?"),
    ({"pairs_per_round": 12.5}, f"{WHERE}.pairs_per_round is 12.5; expected"),
]
DIFFUSION_REFUSALS = [
    ({"beta": 5.0}, f"{WHERE}.beta is not a known key; known keys: caption_dropout, reduction, times."),
    ({"time": "uniform"}, f"{WHERE}.time is not a known key; did you mean times?"),
    ({"times": "1e-1"}, f"{WHERE}.times is '1e-1' (text); expected 'uniform' or 'sampler_grid'."),
]
REFUSALS = [
    *((m, *r) for m in CONFIGS for r in PREFERENCE_REFUSALS),
    *((pso_online, *r) for r in ONLINE_REFUSALS),
    *((diffusion, *r) for r in DIFFUSION_REFUSALS),
]


@pytest.mark.parametrize(("module", "change", "message"), REFUSALS)
def test_config_refuses_in_one_sentence(module, change, message):
    valid = CONFIGS.get(module, {"times": "uniform"})
    check(module.Config, valid, WHERE)
    with pytest.raises(ConfigError) as caught:
        check(module.Config, valid | change, WHERE)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("module", METHODS)
def test_config_needs_a_beta(module):
    with pytest.raises(ConfigError, match=f"{WHERE}.beta is missing; it is needed."):
        check(module.Config, {k: v for k, v in CONFIGS[module].items() if k != "beta"}, WHERE)
