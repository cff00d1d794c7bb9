"""Evidence per transition against torch.distributions, the eps-forms of spec/pso.md (2.1, 2.6, 6.3) and Monte Carlo."""

import pytest
import torch
import toy
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from toy import ALPHA_BAR, STOCHASTIC, TIMES, exact, randn

from pso.entries import EvidenceConfig
from pso.evidence import Side, forward_ratio, gather, kl, raw, reduce, reverse_ratio
from pso.mdp import Ancestral, Ddim, Euler, NoKernel, Renoise

TIME = torch.tensor([0, *reversed(TIMES)])
STEPS = torch.tensor([[4, 3, 2], [2, 4, 3]])  # 2 samples x 3 transitions, in any order
D = 4 * 8 * 8
REDUCTIONS = {"mean": lambda v: v.flatten(2).mean(2), "sum": lambda v: v.flatten(2).sum(2)}


def alpha_bar(n: Tensor) -> Tensor:
    return ALPHA_BAR[TIME[n]][..., None, None, None]


def kernel(kind: type, n: Tensor, x: Tensor, eps: Tensor) -> Normal:
    """Eq. 4 (Renoise) or the variance-exploding posterior q(x_{n-1} | x_n, x0_hat) (Ancestral)."""
    here, there = alpha_bar(n), alpha_bar(n - 1)
    if kind is Renoise:
        return Normal(there.sqrt() * (x - (1 - here).sqrt() * eps) / here.sqrt(), (1 - there).sqrt())
    here, there = (1 - here) / here, (1 - there) / there  # sigma^2
    x0 = x - here.sqrt() * eps
    return Normal(x0 + there / here * (x - x0), (there - there**2 / here).sqrt())


def twice_kappa(kind: type, n: Tensor) -> Tensor:
    """rho_n (Renoise) or rho_n - 1 (Ancestral), from signal-to-noise ratios."""
    here, there = (a / (1 - a) for a in (alpha_bar(n), alpha_bar(n - 1)))
    return there / here - (1 if kind is Ancestral else 0)


def drawn(*, process: str = "reverse", apart: float = 0.2) -> tuple[Side, Tensor, Tensor]:
    """A float64 side and the outputs of theta and pre."""
    x, answer, pre, change = (randn(s, 2, 3, 4, 8, 8, dtype=torch.float64) for s in range(4))
    return Side(process, STEPS, x, answer), pre + apart * change, pre


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


# ---- reverse ----


def ratio_of_normals(kind: type, side: Side, theta: Tensor, pre: Tensor, reduction: str) -> Tensor:
    log_probs = (kernel(kind, side.n, side.x, eps).log_prob(side.answer) for eps in (theta, pre))
    return REDUCTIONS[reduction](next(log_probs) - next(log_probs))


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reverse_ratio_is_the_difference_of_two_log_probs(kind, reduction):
    side, theta, pre = drawn()
    expected = ratio_of_normals(kind, side, theta, pre, reduction)
    assert same(reverse_ratio(exact(kind), side, theta, pre, reduction), expected)


def one_sigma_for_all(chain, side, theta, pre):
    """Eq. 7 as printed: 1 / (2 sigma^2) in front of the sum, so one sigma for every n."""
    std = chain.std(side.n, side.x)
    return reverse_ratio(chain, side, theta, pre, "mean") * (std / std[:, :1]).flatten(1) ** 2


WRONG_RATIOS = {
    "theta and pre swapped": lambda c, s, theta, pre: reverse_ratio(c, s, pre, theta, "mean"),
    "other reduction": lambda c, s, theta, pre: reverse_ratio(c, s, theta, pre, "sum"),
    "sigma at departure": lambda c, s, theta, pre: reverse_ratio(
        toy.StdAtDeparture(TIMES, ALPHA_BAR), s, theta, pre, "mean"
    ),
    "the other kernel": lambda c, s, theta, pre: reverse_ratio(exact(Ancestral), s, theta, pre, "mean"),
    "transitions out of step": lambda c, s, theta, pre: reverse_ratio(
        c, Side("reverse", s.n.flip(1), s.x, s.answer), theta, pre, "mean"
    ),
    "sigma outside the sum": one_sigma_for_all,
}


@pytest.mark.parametrize("wrong", WRONG_RATIOS)
def test_reverse_ratio_check_rejects(wrong):
    side, theta, pre = drawn()
    expected = ratio_of_normals(Renoise, side, theta, pre, "mean")
    assert not same(WRONG_RATIOS[wrong](exact(Renoise), side, theta, pre), expected, 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("sampled_by", ["pre", "theta"])
def test_reverse_ratio_has_the_eps_form(kind, sampled_by):
    """a = mu_b + sigma z: lr = -/+ rho/2 |change|^2 - sqrt(rho) <z, change>; rho - 1 for Ancestral."""
    side, theta, pre = drawn()
    z, behaviour = side.answer, kernel(kind, side.n, side.x, pre if sampled_by == "pre" else theta)
    side = Side("reverse", side.n, side.x, behaviour.mean + behaviour.stddev * z)
    rho, sign = twice_kappa(kind, side.n), -1 if sampled_by == "pre" else 1
    expected = sign * rho / 2 * (theta - pre) ** 2 - rho.sqrt() * z * (theta - pre)
    found = reverse_ratio(exact(kind), side, theta, pre, "mean")
    assert same(found, REDUCTIONS["mean"](expected), 1e-11)
    assert not same(found, REDUCTIONS["mean"](-expected), 1e-3)
    assert not same(found, REDUCTIONS["mean"](expected * (rho - 1) / rho), 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_reverse_and_forward_are_one_object_in_two_units(kind):
    """lr = kappa (|eps* - eps_pre|^2 - |eps* - eps_theta|^2), where eps* puts the mean on the next state."""
    side, theta, pre = drawn()
    nothing, one = (kernel(kind, side.n, side.x, v).mean for v in (torch.zeros_like(pre), torch.ones_like(pre)))
    slope = one - nothing  # the mean is linear in eps
    eps_star = (side.answer - nothing) / slope
    kappa = slope**2 / (2 * kernel(kind, side.n, side.x, pre).variance)
    expected = REDUCTIONS["mean"](kappa * ((eps_star - pre) ** 2 - (eps_star - theta) ** 2))
    found = reverse_ratio(exact(kind), side, theta, pre, "mean")
    assert same(found, expected, 1e-10)
    as_forward = Side("forward", side.n, side.x, eps_star)
    assert same(forward_ratio(exact(kind), as_forward, theta, pre, EvidenceConfig(omega="kl")), found, 1e-10)
    assert not same(forward_ratio(exact(kind), as_forward, theta, pre, EvidenceConfig(omega="one")), found, 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_kappa_is_half_the_ratio_of_signal_to_noise(kind):
    kappa = exact(kind).kappa(STEPS, randn(0, 2, 3, 1, 1, 1, dtype=torch.float64))
    assert same(kappa, twice_kappa(kind, STEPS) / 2)
    assert not same(kappa, twice_kappa(kind, STEPS.flip(1)) / 2, 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kl_is_that_of_torch(kind, reduction):
    side, theta, pre = drawn()
    p, q = (kernel(kind, side.n, side.x, eps) for eps in (theta, pre))
    expected = REDUCTIONS[reduction](kl_divergence(p, q))
    found = kl(exact(kind), side.n, side.x, theta, pre, reduction)
    assert same(found, expected, 1e-11)
    assert not same(found, REDUCTIONS[reduction]((theta - pre) ** 2), 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize(("sampled_by", "sign"), [("theta", 1), ("pre", -1)])
def test_expected_ratio_is_plus_or_minus_the_kl(kind, sampled_by, sign):
    n, shape = torch.tensor([[4, 3, 2]]), (1, 3, 4, 256, 256)
    x, pre, change, z = (randn(s, *shape, dtype=torch.float64) for s in range(4))
    theta = pre + 0.3 * change
    behaviour = kernel(kind, n, x, theta if sampled_by == "theta" else pre)
    side = Side("reverse", n, x, behaviour.mean + behaviour.stddev * z)
    found = reverse_ratio(exact(kind), side, theta, pre, "mean")
    expected = kl_divergence(*(kernel(kind, n, x, eps) for eps in (theta, pre))).flatten(2).mean(2)
    error = 5 * (2 * expected / 4 / 256**2).sqrt()  # Var lr = 2 KL per element
    assert ((found - sign * expected).abs() < error).all()
    assert ((found + sign * expected).abs() > error).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_raw_of_a_transition_is_its_log_prob(kind, reduction):
    side, theta, _ = drawn()
    distribution = kernel(kind, side.n, side.x, theta)
    found = raw(exact(kind), side, theta, reduction)
    assert same(found, REDUCTIONS[reduction](distribution.log_prob(side.answer)))
    without_constants = -((side.answer - distribution.mean) ** 2) / (2 * distribution.variance)
    assert not same(found, REDUCTIONS[reduction](without_constants), 1e-3)


# ---- forward ----


def errors(side: Side, theta: Tensor, pre: Tensor) -> Tensor:
    return (side.answer - theta) ** 2 - (side.answer - pre) ** 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("kind", "omega", "coupling", "weighted"),
    [
        (Renoise, "one", "paper", False),
        (Renoise, "kl", "paper", True),
        (Renoise, "one", "exact_independent", True),
        (Renoise, "kl", "exact_independent", True),
        (Ancestral, "one", "paper", False),
        (Ancestral, "kl", "paper", True),
    ],
)
def test_forward_ratio_is_the_weighted_difference_of_errors(kind, reduction, omega, coupling, weighted):
    side, theta, pre = drawn(process="forward")
    cfg = EvidenceConfig(reduction=reduction, omega=omega, forward_coupling=coupling)
    found = forward_ratio(exact(kind), side, theta, pre, cfg)
    one, by_kl = errors(side, theta, pre), twice_kappa(kind, side.n) / 2 * errors(side, theta, pre)
    assert same(found, REDUCTIONS[reduction](-by_kl if weighted else -one), 1e-11)
    assert not same(found, REDUCTIONS[reduction](-one if weighted else -by_kl), 1e-3)
    assert not same(found, REDUCTIONS[reduction](by_kl if weighted else one), 1e-3)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_only_renoise_has_a_cross_term(kind):
    """Section 2.6, item 6: exact lr = -rho/2 (...) - <eps, eps_theta - eps_pre> for a kernel that noises anew."""
    side, theta, pre = drawn(process="forward")
    found = forward_ratio(exact(kind), side, theta, pre, EvidenceConfig(forward_coupling="exact_markov"))
    without = -twice_kappa(kind, side.n) / 2 * errors(side, theta, pre)
    crossed = without - side.answer * (theta - pre)
    right, wrong = (crossed, without) if kind is Renoise else (without, crossed)
    assert same(found, REDUCTIONS["mean"](right), 1e-11)
    assert not same(found, REDUCTIONS["mean"](wrong), 1e-3)


def simulated(kind: type, independent: bool) -> tuple[Side, Side, Tensor, Tensor]:
    """x_{n-1} and x_n of the forward process, as a transition and as a noised latent; outputs of two networks."""
    n, shape = torch.tensor([[4, 3, 2]]), (1, 3, 4, 256, 256)
    x0, first, second = (randn(s, *shape, dtype=torch.float64) for s in range(3))
    here, there = alpha_bar(n), alpha_bar(n - 1)
    if kind is Renoise:
        x_next = there.sqrt() * x0 + (1 - there).sqrt() * first
        keep = (here / there).sqrt()
        x = (
            here.sqrt() * x0 + (1 - here).sqrt() * second
            if independent
            else keep * x_next + (1 - keep**2).sqrt() * second
        )
        eps = (x - here.sqrt() * x0) / (1 - here).sqrt()
    else:
        here, there = (1 - here) / here, (1 - there) / there
        x_next = x0 + there.sqrt() * first
        x = x_next + (here - there).sqrt() * second
        eps = (x - x0) / here.sqrt()
    shown = exact(kind).scale_input(n, x)
    return Side("reverse", n, x, x_next), Side("forward", n, x, eps), torch.tanh(shown), 0.8 * torch.tanh(shown) + 0.05


def farthest(kind: type, independent: bool, coupling: str, **more) -> float:
    """Largest distance of the forward form from the mean sampled log-ratio, in standard errors."""
    transition, noised, theta, pre = simulated(kind, independent)
    log_probs = [kernel(kind, transition.n, transition.x, v).log_prob(transition.answer) for v in (theta, pre)]
    sampled = (log_probs[0] - log_probs[1]).flatten(2)
    cfg = EvidenceConfig(forward_coupling=coupling, **more)
    found = forward_ratio(exact(kind), noised, theta, pre, cfg)
    return ((found - sampled.mean(2)).abs() / (sampled.std(2) / sampled.shape[2] ** 0.5)).max().item()


@pytest.mark.parametrize(
    ("kind", "independent", "right", "wrong"),
    [
        (Renoise, False, "exact_markov", "exact_independent"),
        (Renoise, True, "exact_independent", "exact_markov"),
        (Ancestral, False, "exact_markov", None),
    ],
)
def test_exact_couplings_are_the_mean_sampled_ratio(kind, independent, right, wrong):
    assert farthest(kind, independent, right) < 4.5
    assert farthest(kind, independent, "paper") > 20  # omega = 1
    if wrong is not None:
        assert farthest(kind, independent, wrong) > 20


def test_the_papers_form_is_exact_for_turbo_with_the_right_weight():
    assert farthest(Ancestral, False, "paper", omega="kl") < 4.5
    assert farthest(Renoise, False, "paper", omega="kl") > 20


def test_raw_of_a_noised_latent_is_minus_its_error():
    side, theta, _ = drawn(process="forward")
    error = (side.answer - theta) ** 2
    assert same(raw(exact(Renoise), side, theta, "mean"), -REDUCTIONS["mean"](error))
    assert same(raw(exact(Renoise), side, theta, "sum"), -REDUCTIONS["sum"](error))
    assert not same(raw(exact(Renoise), side, theta, "mean"), REDUCTIONS["mean"](error), 1e-3)


# ---- reduction, precision, columns ----


def columns(process: str, reduction: str) -> dict[str, Tensor]:
    side, theta, pre = drawn(process=process)
    found = gather(exact(Ancestral), side, theta, pre, EvidenceConfig(reduction=reduction))
    return {"ratio": found.ratio, "kl": found.kl, "raw": raw(exact(Ancestral), side, theta, reduction)}


@pytest.mark.parametrize("process", ["forward", "reverse"])
@pytest.mark.parametrize("column", ["ratio", "kl", "raw"])
def test_sum_is_d_times_the_mean(process, column):
    mean, total = (columns(process, reduction)[column] for reduction in ("mean", "sum"))
    assert same(total, D * mean, 1e-10)
    assert not same(total, mean, 1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduction_leaves_samples_and_transitions_apart(reduction):
    values = randn(0, 2, 3, 4, 5, 6, dtype=torch.float64)
    assert same(reduce(values, reduction), REDUCTIONS[reduction](values))


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_small_changes_survive_float32(kind):
    """SDXL's latents, a change of 1e-4: subtracting two float32 log-probs loses what the difference of means keeps."""
    n, shape = torch.tensor([[4, 3, 2]]), (1, 3, 4, 128, 128)
    x, pre, change, z = (randn(s, *shape) for s in range(4))
    chain = kind(TIMES)
    x, theta = chain.init(x), pre + 1e-4 * change
    side = Side("reverse", n, x, chain.mean(n, x, pre) + chain.std(n, x) * z)
    double = Side("reverse", n, x.double(), side.answer.double())
    expected = reverse_ratio(chain, double, theta.double(), pre.double(), "mean").float()
    ours = reverse_ratio(chain, side, theta, pre, "mean")
    subtracted = raw(chain, side, theta, "mean") - raw(chain, side, pre, "mean")
    lost, kept = ((v - expected).abs().max() / expected.abs().max() for v in (subtracted, ours))
    assert kept < 5e-3
    assert lost > 3e-2


@pytest.mark.parametrize("process", ["forward", "reverse"])
def test_float32_in_float32_out(process):
    side, theta, pre = drawn(process=process)
    side = Side(process, side.n, side.x.float(), side.answer.float())
    found = gather(Renoise(TIMES), side, theta.float(), pre.float(), EvidenceConfig())
    assert (found.ratio.dtype, found.kl.dtype, found.ratio.shape) == (torch.float32, torch.float32, (2, 3))


@pytest.mark.parametrize("process", ["forward", "reverse"])
def test_gradients_flow_through_the_ratio_and_not_through_the_kl(process):
    side, theta, pre = drawn(process=process)
    theta.requires_grad_()
    found = gather(exact(Renoise), side, theta, pre, EvidenceConfig())
    assert (found.ratio.requires_grad, found.kl.requires_grad) == (True, False)
    assert kl(exact(Renoise), side.n, side.x, theta, pre, "mean").requires_grad  # without gather's care


@pytest.mark.parametrize("process", ["forward", "reverse"])
def test_without_pre_only_raw_can_be_had(process):
    side, theta, pre = drawn(process=process)
    without, with_pre = (gather(exact(Renoise), side, theta, v, EvidenceConfig()) for v in (None, pre))
    assert (without.ratio, without.kl) == (None, None)
    assert same(without.raw, raw(exact(Renoise), side, theta, "mean"))
    assert with_pre.ratio is not None and with_pre.kl is not None


def test_gather_tells_the_processes_apart():
    side, theta, pre = drawn()
    forward = Side("forward", side.n, side.x, side.answer)
    cfg, chain = EvidenceConfig(), exact(Renoise)
    assert same(gather(chain, side, theta, pre, cfg).ratio, reverse_ratio(chain, side, theta, pre, "mean"))
    assert same(gather(chain, forward, theta, pre, cfg).ratio, forward_ratio(chain, forward, theta, pre, cfg))
    assert not same(gather(chain, forward, theta, pre, cfg).ratio, gather(chain, side, theta, pre, cfg).ratio, 1e-3)


def test_independent_forward_states_give_ancestral_a_cross_term():
    """Monte-Carlo: x_{n-1} noised independently of x_n, judged by the posterior kernel."""
    generator = torch.Generator().manual_seed(0)
    chain, draws = Ancestral([999, 749, 499, 249]), 4000
    x0, eps, theta, pre = (torch.randn(1, 1, 4, 2, 2, generator=generator).double() for _ in range(4))
    theta, pre = eps + 0.3 * theta, eps + 0.3 * pre
    for step in (4, 3, 2):
        n = torch.tensor([[step]])
        x = chain.noise_to(n, x0, eps)
        noise = torch.randn(draws, 1, 4, 2, 2, generator=generator).double()
        arrived = chain.noise_to(n - 1, x0, noise)
        wide = [v.expand(draws, -1, -1, -1, -1) for v in (x, theta, pre)]
        sampled = reverse_ratio(chain, Side("reverse", n.expand(draws, 1), wide[0], arrived), *wide[1:], "mean")
        side, tolerance = Side("forward", n, x, eps), 4 * sampled.std() / draws**0.5
        exact, wrong = (
            forward_ratio(chain, side, theta, pre, EvidenceConfig(forward_coupling=c)).item()
            for c in ("exact_independent", "exact_markov")
        )
        assert abs(exact - sampled.mean()) < tolerance
        assert abs(wrong - sampled.mean()) > tolerance


# ---- deterministic samplers ----

DETERMINISTIC, PAPER = [Ddim, Euler], EvidenceConfig()
OF_A_KERNEL = {  # what needs a kernel, of a chain
    "mean": lambda c, s, theta, pre: c.mean(s.n, s.x, theta),
    **{k: lambda c, s, *_, k=k: getattr(c, k)(s.n, s.x) for k in ("std", "mean_per_eps", "kappa")},
    "trained_steps": lambda c, *_: c.trained_steps,
    "reverse_ratio": lambda c, *v: reverse_ratio(c, *v, "mean"),
    "raw": lambda c, s, theta, pre: raw(c, s, theta, "mean"),
    "kl": lambda c, s, *eps: kl(c, s.n, s.x, *eps, "mean"),
    "gather": lambda c, *v: gather(c, *v, PAPER),
    "omega": lambda c, *v: forward_ratio(c, *v, EvidenceConfig(omega="kl")),
    "independent": lambda c, *v: forward_ratio(c, *v, EvidenceConfig(forward_coupling="exact_independent")),
    "markov": lambda c, *v: forward_ratio(c, *v, EvidenceConfig(forward_coupling="exact_markov")),
}


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("what", OF_A_KERNEL)
def test_a_deterministic_sampler_has_no_kernel(kind, what):
    with pytest.raises(NoKernel, match=f"^the sampler {kind.__name__} is deterministic, .* renoise or ancestral.$"):
        OF_A_KERNEL[what](kind(TIMES, ALPHA_BAR), *drawn())
    for stochastic in STOCHASTIC:
        OF_A_KERNEL[what](stochastic(TIMES, ALPHA_BAR), *drawn())


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_noised_images_say_the_same_of_any_sampler(kind):
    """With omega 1 the forward evidence is one of eps alone; a KL there is none."""
    side, theta, pre = drawn(process="forward")
    found, of_kernel = (gather(c, side, theta, pre, PAPER) for c in (kind(TIMES), exact(Renoise)))
    assert torch.equal(found.ratio, of_kernel.ratio)
    assert found.kl is None and of_kernel.kl is not None
