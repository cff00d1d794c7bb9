"""The samplers against diffusers' schedulers, closed forms in float64 and the constants of spec/pso.md, Section 1."""

import sys
from unittest.mock import patch

import pytest
import torch
import toy
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor
from toy import ALPHA_BAR, LCM_TIMES, ONE, SDXL, STOCHASTIC, TIMES, exact, number, randn

from pso.mdp import Ancestral, Chain, Ddim, Euler, LastTransition, Renoise
from pso.models import spaced_times

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)


# ---- one step equals diffusers' scheduler ----


def scheduler(kind: type, num_steps: int = 4, times: list[int] | None = None, **settings):
    made = kind(**SDXL, **settings)
    made.set_timesteps(**({"num_inference_steps": num_steps} if times is None else {"timesteps": times}))
    return made


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "DMD2": lambda: scheduler(LCMScheduler, times=TIMES),
    "LCM": lambda: scheduler(LCMScheduler),
    "Turbo": lambda: scheduler(EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
    "Turbo, 1 step": lambda: scheduler(EulerAncestralDiscreteScheduler, 1, timestep_spacing="trailing"),
    "SDXL": lambda: scheduler(EulerDiscreteScheduler, 50, **LEADING),
    "SDXL, DDIM": lambda: scheduler(DDIMScheduler, 50, clip_sample=False, **LEADING),
}
CHAINS = {
    "DMD2": Renoise(TIMES),
    "LCM": Renoise(LCM_TIMES),
    "Turbo": Ancestral(TIMES),
    "Turbo, 1 step": Ancestral([999]),
    "SDXL": Euler(spaced_times("leading", 50)),
    "SDXL, DDIM": Ddim(spaced_times("leading", 50)),
}


def walked(chain: Chain, x: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    """All states after x; eps and noise are [N, B, C, H, W], one per transition."""
    states = []
    for n, e, z in zip(chain.all_steps, eps, noise, strict=True):
        x = chain.step(number(n, len(x)), x, e, z)
        states.append(x)
    return torch.stack(states)


def walked_by(scheduler, x: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    states = []
    for t, e, z in zip(scheduler.timesteps, eps, noise, strict=True):
        scheduler.scale_model_input(x, t)
        with patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, z=z, **__: z):
            x = scheduler.step(e, t, x).prev_sample
        states.append(x)
    return torch.stack(states)


def gap(chain: Chain, name: str, seed: int = 0, batch: int = 3, side: int = 8, shared_noise: bool = False) -> float:
    """Largest difference between the chain's states and the scheduler's, for the same noise."""
    theirs = SCHEDULERS[name]()
    shape = (len(theirs.timesteps), batch, 4, side, side)
    x, eps, noise = randn(seed, *shape[1:]), randn(seed + 1, *shape), randn(seed + 2, *shape)
    x = x * theirs.init_noise_sigma
    ours = walked(chain, x, eps, noise[:, :1].expand(shape) if shared_noise else noise)
    return (ours - walked_by(theirs, x, eps, noise)).abs().max().item()


@pytest.mark.parametrize("name", CHAINS)
@few
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 4), side=st.sampled_from([1, 3, 8]))
def test_steps_are_the_schedulers_bit_for_bit(name, seed, batch, side):
    assert gap(CHAINS[name], name, seed, batch, side) == 0


@pytest.mark.parametrize(
    ("chain", "name", "shared_noise"),
    [
        pytest.param(toy.StdAtDeparture(TIMES), "DMD2", False, id="std at departure"),
        pytest.param(Renoise(TIMES), "LCM", False, id="other grid"),
        pytest.param(Renoise(TIMES), "DMD2", True, id="shared noise"),
        pytest.param(toy.SwappedLevels(TIMES), "Turbo", False, id="Eq. 14 with its levels swapped"),
        pytest.param(toy.DriftTooFar(TIMES), "Turbo", False, id="Euler's drift"),
        pytest.param(Ancestral(TIMES), "Turbo", True, id="shared noise, Turbo"),
        pytest.param(Euler(spaced_times("trailing", 50)), "SDXL", False, id="trailing grid"),
        pytest.param(Ddim([t - 1 for t in spaced_times("leading", 50)]), "SDXL, DDIM", False, id="no steps_offset"),
    ],
)
def test_parity_rejects(chain, name, shared_noise):
    assert gap(chain, name, shared_noise=shared_noise) > 0.01


def starts_alike(chain: Chain, name: str) -> bool:
    noise = randn(0, 2, 4, 8, 8)
    return torch.equal(chain.init(noise), noise * SCHEDULERS[name]().init_noise_sigma)


@pytest.mark.parametrize("name", CHAINS)
def test_start_is_the_schedulers_init_noise_sigma(name):
    assert starts_alike(CHAINS[name], name)


def test_start_rejects_another_samplers():
    assert not starts_alike(CHAINS["DMD2"], "Turbo")
    assert not starts_alike(Ancestral(spaced_times("leading", 50)), "SDXL")  # sigma without the + 1


def shows_alike(chain: Chain, name: str, later: int = 0) -> bool:
    x, theirs = 5 * randn(0, 2, 4, 8, 8), SCHEDULERS[name]()
    same = []
    for n, t in zip(chain.all_steps, theirs.timesteps, strict=True):
        theirs._step_index = None
        shown = chain.scale_input(number((n + later - 1) % chain.num_steps + 1, 2), x)
        same.append(torch.equal(shown, theirs.scale_model_input(x, t)))
    return all(same)


@pytest.mark.parametrize("name", CHAINS)
def test_networks_input_is_scaled_as_the_scheduler_does(name):
    assert shows_alike(CHAINS[name], name)


def test_input_scaling_rejects_the_neighbouring_sigma():
    assert not shows_alike(CHAINS["Turbo"], "Turbo", later=1)


@pytest.mark.parametrize("name", CHAINS)
def test_networks_times_are_the_schedulers(name):
    chain = CHAINS[name]
    assert chain.time(torch.tensor(chain.all_steps)).tolist() == SCHEDULERS[name]().timesteps.tolist()
    assert chain.num_steps == 1 or chain.time(torch.tensor(chain.all_steps[::-1])).tolist() != TIMES


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 8, 10, 16, 20, 25, 28, 30, 40, 50, 100])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_spaced_times_are_diffusers(kind, num_steps):
    grids = {s: scheduler(kind, num_steps, **LEADING | {"timestep_spacing": s}) for s in ("leading", "trailing")}
    for spacing, theirs in grids.items():
        assert spaced_times(spacing, num_steps) == theirs.timesteps.tolist()
    assert spaced_times("leading", num_steps) != grids["trailing"].timesteps.tolist()


# ---- closed forms in float64 ----


def pair_of_times(n: int, times: list[int]) -> tuple[Tensor, Tensor]:
    """alpha_bar at departure and at arrival of transition n."""
    return ALPHA_BAR[times[-n]], ALPHA_BAR[times[1 - n]]


@pytest.mark.parametrize("times", [TIMES, LCM_TIMES])
@pytest.mark.parametrize("n", [4, 3, 2])
def test_renoise_is_eq_4_as_printed(n, times):
    chain, (here, there) = exact(Renoise, times), pair_of_times(n, times)
    x, eps = (randn(s, 2, 4, 8, 8, dtype=torch.float64) for s in (0, 1))
    x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
    torch.testing.assert_close(chain.x0_hat(number(n, 2), x, eps), x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chain.mean(number(n, 2), x, eps), there.sqrt() * x0, rtol=1e-12, atol=1e-12)
    assert chain.std(number(n), ONE).item() == pytest.approx((1 - there).sqrt().item(), rel=1e-12)
    assert chain.std(number(n), ONE).item() != pytest.approx((1 - here).sqrt().item(), rel=1e-2)


@pytest.mark.parametrize("t", [124, 249, 499, 749, 999])
def test_lcms_boundary_condition_is_negligible_from_124_on(t):
    chain = Renoise([t])
    assert 0 < chain.c_skip[1] <= 1.7e-7
    assert abs(1 - chain.c_out[1].double()) <= 8.2e-8 + 6e-8  # and one rounding to float32


def posterior(n: int, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{n-1} | x_n, x0), where x_n = x_{n-1} + sqrt(sigma_n^2 - sigma_{n-1}^2) v."""
    here, there = ((1 - a) / a for a in pair_of_times(n, TIMES))  # sigma^2
    gain = there / here  # Cov(x_{n-1}, x_n | x0) / Var(x_n | x0)
    return x0 + gain * (x - x0), there - gain * there


@pytest.mark.parametrize("n", [4, 3, 2])
def test_ancestral_kernel_is_the_variance_exploding_posterior(n):
    x, eps = (randn(s, 2, 4, 8, 8, dtype=torch.float64) for s in (0, 1))
    chain = exact(Ancestral)
    mean, variance = posterior(n, x, x - ((1 - chain.alpha_bar[n]) / chain.alpha_bar[n]).sqrt() * eps)
    torch.testing.assert_close(chain.mean(number(n, 2), x, eps), mean, rtol=1e-12, atol=1e-12)
    assert chain.std(number(n), ONE).item() ** 2 == pytest.approx(variance.item(), rel=1e-12)
    assert (exact(toy.SwappedLevels).mean(number(n, 2), x, eps) - mean).abs().max() > 0.1


def up_and_down(chain: Ancestral, n: int) -> tuple[float, float, float, float]:
    """sigma at departure and arrival; sigma_up; sigma_down, from d mean / d eps = sigma_down - sigma."""
    here, there = chain.sigma[n].item(), chain.sigma[n - 1].item()
    return here, there, chain.std(number(n), ONE).item(), here + chain.mean_per_eps(number(n), ONE).item()


@pytest.mark.parametrize("n", [4, 3, 2])
def test_ancestral_levels_keep_the_marginal(n):
    here, there, up, down = up_and_down(exact(Ancestral), n)
    assert down == pytest.approx(there**2 / here, rel=1e-11)
    assert up**2 + down**2 == pytest.approx(there**2, rel=1e-11)
    assert up_and_down(exact(toy.SwappedLevels), n)[3] != pytest.approx(there**2 / here, rel=0.1)


@pytest.mark.parametrize("n", [4, 3, 2])
def test_eq_14_as_printed_has_no_real_noise(n):
    here, there = exact(Ancestral).sigma[n], exact(Ancestral).sigma[n - 1]
    assert (there**2 - here**2).sqrt().isnan()  # its sigma hat
    printed_drift = ((here**2 - there**2) * there**2 / here**2).sqrt()  # its sigma bar is the noise
    assert printed_drift.item() == pytest.approx(exact(Ancestral).std(number(n), ONE).item(), rel=1e-12)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("n", [4, 3, 2])
def test_mean_per_eps_is_the_derivative_of_the_mean(kind, n):
    chain, eps = exact(kind), ONE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(chain.mean(number(n), ONE, eps).sum(), eps)
    assert chain.mean_per_eps(number(n), ONE).item() == pytest.approx(slope.item(), rel=1e-12)
    assert chain.mean_per_eps(number(n % 3 + 2), ONE).item() != pytest.approx(slope.item(), rel=0.01)


# ---- the constants of spec/pso.md, Sections 1.1 to 1.3 ----

RENOISE_TABLE = [  # times, n: sqrt(alpha_bar_t'), sigma_n, rho_n
    (TIMES, 4, 0.2379569, 0.9712757, 12.819996),
    (TIMES, 3, 0.5269437, 0.8499002, 6.404437),
    (TIMES, 2, 0.8218470, 0.5697083, 5.413576),
    (LCM_TIMES, 4, 0.2285015, 0.9735436, 11.766399),
    (LCM_TIMES, 3, 0.5269437, 0.8499002, 6.977909),
    (LCM_TIMES, 2, 0.8117731, 0.5839730, 5.026795),
]
ANCESTRAL_TABLE = [  # n: sigma_up, sigma_down, sigma_down - sigma, r^2, rho_n - 1
    (4, 3.919305, 1.139988, -13.474659, 0.0780031, 11.819997),
    (3, 1.481626, 0.637329, -3.444402, 0.1561418, 5.404435),
    (2, 0.625915, 0.297934, -1.314953, 0.1847209, 4.413573),
]


@pytest.mark.parametrize(("chain", "rel"), [(exact(Renoise), 1e-7), (Renoise(TIMES), 2e-6)])
def test_alpha_bar_of_dmd2(chain, rel):
    expected = [0.00466010, 0.05662349, 0.27766965, 0.67543241]
    assert chain.alpha_bar[1:].flip(0).tolist() == pytest.approx(expected, rel=rel, abs=6e-9)


@pytest.mark.parametrize(("times", "n", "root", "sigma", "rho"), RENOISE_TABLE)
def test_constants_of_renoise(times, n, root, sigma, rho):
    for chain, rel in ((exact(Renoise, times), 1e-7), (Renoise(times), 2e-6)):  # the table's float64; float32
        assert chain.alpha_bar[n - 1].sqrt().item() == pytest.approx(root, rel=rel, abs=6e-8)
        assert chain.std(number(n), ONE).item() == pytest.approx(sigma, rel=rel, abs=6e-8)
        assert chain.kappa(number(n), ONE).item() == pytest.approx(rho / 2, rel=rel)
        assert chain.mean_per_eps(number(n), ONE).item() == pytest.approx(-sigma * rho**0.5, rel=2 * rel)


def test_constants_of_the_released_eight_step_grid():
    chain = exact(Renoise, [999, 874, 749, 624, 499, 374, 249, 124])
    rho = [2 * chain.kappa(number(n), ONE).item() for n in chain.trained_steps]
    assert rho == pytest.approx([4.0109, 3.1963, 2.6817, 2.3882, 2.2766, 2.3779, 3.0375], abs=6e-5)


@pytest.mark.parametrize(("n", "up", "down", "drift", "r_squared", "rho_less_1"), ANCESTRAL_TABLE)
def test_constants_of_ancestral(n, up, down, drift, r_squared, rho_less_1):
    chain = Ancestral(TIMES)  # the table was made with diffusers' float32 schedule
    here, there, *found = up_and_down(chain, n)
    assert chain.sigma.flip(0).tolist() == pytest.approx([14.614647, 4.081731, 1.612887, 0.693205, 0], abs=6e-7)
    assert [*found, chain.mean_per_eps(number(n), ONE).item()] == pytest.approx([up, down, drift], abs=6e-7)
    assert (there / here) ** 2 == pytest.approx(r_squared, abs=6e-8)
    assert (here / there) ** 2 - 1 == pytest.approx(rho_less_1, abs=6e-7)  # SNR ratio = ratio of sigma^2
    assert chain.kappa(number(n), ONE).item() == pytest.approx(rho_less_1 / 2, abs=6e-7)


# ---- the last transition, and what a chain refuses ----

DENSITIES = {
    "mean": lambda chain, n, x: chain.mean(n, x, x),
    "std": lambda chain, n, x: chain.std(n, x),
    "kappa": lambda chain, n, x: chain.kappa(n, x),
    "mean_per_eps": lambda chain, n, x: chain.mean_per_eps(n, x),
}


class LastKept(Ancestral):
    _refuse_last = staticmethod(lambda n: None)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("what", DENSITIES)
@pytest.mark.parametrize("n", [[1], [4, 1], [2, 3, 1]])
def test_last_transition_has_no_density(kind, what, n):
    with pytest.raises(LastTransition, match="train on n = 2..N only"):
        DENSITIES[what](kind(TIMES), torch.tensor(n), randn(0, len(n), 4, 2, 2))


def test_a_kept_last_transition_would_be_infinite():
    assert DENSITIES["kappa"](LastKept(TIMES), number(1, 1), randn(0, 1, 4, 2, 2)).isinf().all()


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_every_trained_transition_has_a_finite_density(kind):
    chain = kind(TIMES)
    assert (chain.trained_steps, kind([999]).trained_steps) == ([4, 3, 2], [])
    n = torch.tensor(chain.trained_steps)
    assert all(DENSITIES[what](chain, n, randn(0, 3, 4, 2, 2)).isfinite().all() for what in DENSITIES)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("times", [TIMES, [999]])
def test_last_transition_returns_the_clean_estimate(kind, times):
    x, eps, noise = (randn(s, 2, 4, 8, 8) for s in range(3))
    n, chain = number(1, 2), kind(times)
    torch.testing.assert_close(chain.step(n, x, eps, noise), chain.x0_hat(n, x, eps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chain.step(n, x, eps, None), chain.x0_hat(n, x, eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times", [[], [249, 499], [999, 999, 499], [999, 499, 749], [1000, 500], [10, -1]])
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(ValueError, match="timesteps is .*; expected"):
        Renoise(times)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_steps_mixed_in_a_batch_equal_steps_one_by_one(kind):
    chain, n = kind(TIMES), torch.tensor([[4, 2, 3], [3, 3, 2]])
    x, eps, noise = (randn(s, 2, 3, 4, 8, 8) for s in range(3))
    together = chain.step(n, x, eps, noise)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        assert torch.equal(together[i, j], chain.step(n[i, j], x[i, j], eps[i, j], noise[i, j]))
    assert not torch.equal(together, chain.step(number(4, 2, 3), x, eps, noise))


# ---- the forward process, and replay ----


@pytest.mark.parametrize("name", ["DMD2", "LCM", "Turbo"])
def test_noise_to_is_the_schedulers(name):
    chain, theirs, n = CHAINS[name], SCHEDULERS[name](), torch.tensor([4, 3, 2, 1])
    x0, noise = randn(0, 4, 4, 8, 8), randn(1, 4, 4, 8, 8)
    expected = theirs.add_noise(x0, noise, theirs.timesteps)
    torch.testing.assert_close(chain.noise_to(n, x0, noise), expected, rtol=1e-6, atol=1e-6)
    assert (chain.noise_to(n.flip(0), x0, noise) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("n", [4, 3, 2, 1])
def test_both_pictures_show_the_network_the_same_noised_latent(kind, n):
    """Variance exploding and variance preserving: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""
    x0, noise = (randn(s, 1, 4, 8, 8, dtype=torch.float64) for s in (0, 1))
    shown = exact(kind).scale_input(number(n, 1), exact(kind).noise_to(number(n, 1), x0, noise))
    alpha_bar = ALPHA_BAR[TIMES[-n]]
    torch.testing.assert_close(shown, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise)


@pytest.mark.parametrize("kind", [*STOCHASTIC, toy.DriftTooFar, toy.StdAtDeparture])
@pytest.mark.parametrize("n", [4, 3, 2])
def test_only_the_right_kernels_keep_the_forward_marginal(kind, n):
    """One step with the true noise, from x_n = a x0 + b eps, by its coefficients of x0 and of noise."""
    chain, zero = kind(TIMES, ALPHA_BAR), torch.zeros_like(ONE)
    signal = chain.mean(number(n), chain.noise_to(number(n), ONE, zero), zero).item()
    drift = chain.mean(number(n), chain.noise_to(number(n), zero, ONE), ONE).item()
    spread = (drift**2 + chain.std(number(n), ONE).item() ** 2) ** 0.5
    marginal = [chain.noise_to(number(n - 1), *v).item() for v in ((ONE, zero), (zero, ONE))]
    kept = [signal, spread] == pytest.approx(marginal, rel=2e-6)  # LCM's boundary condition is float32
    assert kept is (kind in STOCHASTIC)


def replayed(kind: type[Chain], later: int = 0, judged_as: type[Chain] | None = None) -> float:
    """p-value of (x_{n-1} - mean) / std being N(0, 1), recomputed `later` transitions off or by another kernel."""
    chain, judge = kind(TIMES), (judged_as or kind)(TIMES)
    states = [chain.init(randn(0, 32, 4, 8, 8))]
    for n in chain.trained_steps:
        eps = torch.tanh(chain.scale_input(number(n, 32), states[-1]))  # any network
        states.append(chain.step(number(n, 32), states[-1], eps, randn(n, 32, 4, 8, 8)))
    before, after = torch.stack(states[:-1], 1), torch.stack(states[1:], 1)
    n = torch.tensor(chain.trained_steps).expand(32, 3)
    eps, n = torch.tanh(chain.scale_input(n, before)), (n + later).clamp(2, 4)
    return kstest(((after - judge.mean(n, before, eps)) / judge.std(n, before)).flatten(), "norm").pvalue


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_replayed_transitions_are_standard_normal(kind):
    assert replayed(kind) > 0.01


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("later", [-1, 1])
def test_replay_detects_times_that_are_out_of_step(kind, later):
    assert replayed(kind, later) < 1e-6


@pytest.mark.parametrize(("kind", "wrong"), [(Renoise, toy.StdAtDeparture), (Ancestral, toy.SwappedLevels)])
def test_replay_detects_another_kernel(kind, wrong):
    assert replayed(kind, judged_as=wrong) < 1e-6
