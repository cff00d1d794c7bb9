"""Few-step samplers as Markov chains of Gaussian kernels (paper, Sections 2.1 and A.2).

A chain has N = `num_steps` transitions, counted down as in the paper: transition n takes x_n at time
t_n to x_{n-1}, n = N..1. Its kernel is N(mean(n, x, eps), std(n)^2 I); n = 1 is deterministic, so it
is no kernel, and asking for its mean, std or kappa raises `LastTransition`.

`Renoise` is Eq. 4 (SDXL-DMD2, SDXL-LCM), `Ancestral` is Eq. 14 in its correct form (SDXL-Turbo).
`Ddim` and `Euler` are the deterministic samplers of the multi-step rows; they have no kernel at all, and
asking them for one raises `NoKernel`.

Shapes: `n` is a CPU LongTensor [...]; `x`, `eps` and `noise` are [..., C, H, W]; whatever depends on
n alone comes back as [..., 1, 1, 1]. Everything is computed in the dtype of x, float32 in runs.
One step equals diffusers' scheduler bit for bit when given the same noise (tests/test_mdp.py).
"""

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pso.provenance import UserError

# SDXL's noise schedule (scheduler_config.json of every base in Tables 1 to 4).
SDXL_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


class LastTransition(ValueError):
    """A log-probability was asked for the deterministic last transition."""

    def __init__(self):
        super().__init__(
            "transition n = 1 is deterministic (its variance is 0) and has no log-probability; train on n = 2..N only"
        )


class NoKernel(UserError):
    """A density was asked of a deterministic sampler."""

    def __init__(self, chain: "Chain"):
        super().__init__(
            f"the sampler {type(chain).__name__} is deterministic, so its transitions have no mean, std or "
            "log-probability; take a model with sampler: renoise or ancestral."
        )


def sdxl_alphas_cumprod(zero_terminal_snr: bool = False) -> Tensor:
    """alpha_bar_t of SDXL, t = 0..999, float32 as diffusers computes it; rescaled to alpha_bar_999 = 0 if asked to."""
    return DDPMScheduler(**SDXL_SCHEDULE, rescale_betas_zero_snr=zero_terminal_snr).alphas_cumprod


class Chain:
    """What all samplers share: a grid of times, look-ups by transition, and no kernel until a subclass has one."""

    stochastic = False

    def __init__(self, timesteps: list[int], alphas_cumprod: Tensor | None = None):
        """timesteps: t_N, ..., t_1, the times at which the network is called, falling."""
        alphas = sdxl_alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
        if sorted(set(timesteps), reverse=True) != list(timesteps) or not timesteps:
            raise ValueError(f"timesteps is {timesteps}; expected different times in falling order")
        if not 0 <= timesteps[-1] <= timesteps[0] < len(alphas):
            raise ValueError(f"timesteps is {timesteps}; expected times from 0 to {len(alphas) - 1}")
        self.num_steps = len(timesteps)
        # index n = 1..N; index 0 is "clean"
        self.times = torch.tensor([0, *reversed(timesteps)])
        self.alpha_bar = alphas[self.times].clone()
        self.alpha_bar[0] = 1.0
        self.alphas_cumprod = alphas

    @property
    def all_steps(self) -> list[int]:
        return list(range(self.num_steps, 0, -1))

    @property
    def trained_steps(self) -> list[int]:
        """N..2: every transition that has a density."""
        if not self.stochastic:
            raise NoKernel(self)
        return list(range(self.num_steps, 1, -1))

    def time(self, n: Tensor) -> Tensor:
        """t_n, the network's time input [...]."""
        return self.times[n]

    def init(self, noise: Tensor) -> Tensor:
        """x_N from standard normal noise."""
        return noise

    def scale_input(self, n: Tensor, x: Tensor) -> Tensor:
        """What the network is shown at x_n."""
        return x

    # -- the kernel N(mean, std^2 I), n >= 2 --

    def mean(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        raise NoKernel(self)

    def std(self, n: Tensor, x: Tensor) -> Tensor:
        raise NoKernel(self)

    def mean_per_eps(self, n: Tensor, x: Tensor) -> Tensor:
        """d mean / d eps, a number per transition."""
        raise NoKernel(self)

    def kappa(self, n: Tensor, x: Tensor) -> Tensor:
        """(d mean / d eps)^2 / (2 std^2): KL(p_theta | p_pre) = kappa |eps_theta - eps_pre|^2."""
        return self.mean_per_eps(n, x) ** 2 / (2 * self.std(n, x) ** 2)

    @staticmethod
    def _at(table: Tensor, n: Tensor, x: Tensor) -> Tensor:
        """table[n] as [..., 1, 1, 1] with x's dtype and device. The host does not wait for the copy."""
        return table.to(x.dtype)[n].to(x.device, non_blocking=True)[..., None, None, None]

    @staticmethod
    def _refuse_last(n: Tensor) -> None:
        if bool((n < 2).any()):
            raise LastTransition


class Renoise(Chain):
    """Eq. 4: predict the clean latent, noise it anew to the next level (SDXL-DMD2, SDXL-LCM).

    mean = sqrt(alpha_bar_{n-1}) x0_hat and std = sqrt(1 - alpha_bar_{n-1}): the paper's sigma_{t_n}
    is the std at the time of *arrival*.
    `boundary_condition` applies LCMScheduler's c_skip and c_out, so that a step is the scheduler's
    bit for bit; Eq. 4 as printed and the authors' sampler leave them out (at t >= 124 a change below
    2e-7).
    """

    stochastic = True

    def __init__(self, timesteps, alphas_cumprod=None, boundary_condition: bool = True):
        super().__init__(timesteps, alphas_cumprod)
        scaled = self.times * 10.0  # LCMScheduler's timestep_scaling; sigma_data = 0.5
        self.c_skip = 0.25 / (scaled**2 + 0.25)
        self.c_out = scaled / (scaled**2 + 0.25) ** 0.5
        if not boundary_condition:
            self.c_skip, self.c_out = torch.zeros_like(scaled), torch.ones_like(scaled)

    def x0_hat(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        alpha_bar = self._at(self.alpha_bar, n, x)
        x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return self._at(self.c_out, n, x) * x0 + self._at(self.c_skip, n, x) * x

    def mean(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        self._refuse_last(n)
        return self._at(self.alpha_bar, n - 1, x).sqrt() * self.x0_hat(n, x, eps)

    def std(self, n: Tensor, x: Tensor) -> Tensor:
        self._refuse_last(n)
        return (1 - self._at(self.alpha_bar, n - 1, x)).sqrt()

    def step(self, n: Tensor, x: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        """x_{n-1}; `noise` is unused in the last transition."""
        if bool((n == 1).all()):
            return self.x0_hat(n, x, eps)
        return self.mean(n, x, eps) + self.std(n, x) * noise

    def noise_to(self, n: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """The forward process: x_n given the clean latent."""
        alpha_bar = self._at(self.alpha_bar, n, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def mean_per_eps(self, n: Tensor, x: Tensor) -> Tensor:
        self._refuse_last(n)
        here, there = self._at(self.alpha_bar, n, x), self._at(self.alpha_bar, n - 1, x)
        return -self._at(self.c_out, n, x) * (there * (1 - here) / here).sqrt()


class VarianceExploding(Chain):
    """The picture x = x0 + sigma eps, in which both Euler samplers of SDXL work."""

    def __init__(self, timesteps, alphas_cumprod=None):
        super().__init__(timesteps, alphas_cumprod)
        self.sigma = ((1 - self.alpha_bar) / self.alpha_bar) ** 0.5

    def scale_input(self, n: Tensor, x: Tensor) -> Tensor:
        return x / (self._at(self.sigma, n, x) ** 2 + 1) ** 0.5

    def x0_hat(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        return x - self._at(self.sigma, n, x) * eps

    def noise_to(self, n: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """The forward process: x_n given the clean latent."""
        return x0 + self._at(self.sigma, n, x0) * noise

    def _drift(self, n: Tensor, x: Tensor, eps: Tensor, to: Tensor) -> Tensor:
        """x moved along eps from sigma_n to the level `to`."""
        sigma = self._at(self.sigma, n, x)
        # (x - x0_hat) / sigma is eps; written out so that the step is the scheduler's bit for bit
        return x + (x - self.x0_hat(n, x, eps)) / sigma * (to - sigma)


class Ancestral(VarianceExploding):
    """Eq. 14 in its correct form: Euler ancestral in the variance-exploding picture (SDXL-Turbo).

    As printed, Eq. 14 swaps the two levels (and its noise std is imaginary). From sigma_n to
    sigma_{n-1}: std = sigma_up with sigma_up^2 = sigma_{n-1}^2 (sigma_n^2 - sigma_{n-1}^2) / sigma_n^2,
    and the drift goes to sigma_down = sqrt(sigma_{n-1}^2 - sigma_up^2) = sigma_{n-1}^2 / sigma_n.
    That is exactly the posterior q(x_{n-1} | x_n, x_0 = x0_hat).
    """

    stochastic = True

    def init(self, noise: Tensor) -> Tensor:
        return noise * self.sigma[-1].to(noise)

    def _up_down(self, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sigma_n, sigma_up and sigma_down."""
        here, there = self._at(self.sigma, n, x), self._at(self.sigma, n - 1, x)
        up = (there**2 * (here**2 - there**2) / here**2) ** 0.5
        return here, up, (there**2 - up**2) ** 0.5

    def mean(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        self._refuse_last(n)
        _, _, down = self._up_down(n, x)
        return self._drift(n, x, eps, to=down)

    def std(self, n: Tensor, x: Tensor) -> Tensor:
        self._refuse_last(n)
        return self._up_down(n, x)[1]

    def step(self, n: Tensor, x: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        """x_{n-1}; `noise` is unused in the last transition."""
        if bool((n == 1).all()):
            return self._drift(n, x, eps, to=self._at(self.sigma, n - 1, x))  # sigma_0 = 0
        return self.mean(n, x, eps) + noise * self.std(n, x)

    def mean_per_eps(self, n: Tensor, x: Tensor) -> Tensor:
        self._refuse_last(n)
        sigma, _, down = self._up_down(n, x)
        return down - sigma


class Ddim(Chain):
    """DDIM with eta = 0: deterministic, for multi-step rows."""

    def x0_hat(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        alpha_bar = self._at(self.alpha_bar, n, x)
        return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()

    def step(self, n: Tensor, x: Tensor, eps: Tensor, noise: Tensor | None = None) -> Tensor:
        there = self._at(self.alpha_bar, n - 1, x)
        return there.sqrt() * self.x0_hat(n, x, eps) + (1 - there).sqrt() * eps


class Euler(VarianceExploding):
    """Deterministic Euler in the variance-exploding picture (SDXL's own scheduler), multi-step rows."""

    def init(self, noise: Tensor) -> Tensor:
        """diffusers' rule: a grid that starts below t = 999 ("leading") has data variance left in x_N."""
        sigma = self.sigma[-1]
        top = self.times[-1] == len(self.alphas_cumprod) - 1
        return noise * (sigma if top else (sigma**2 + 1).sqrt()).to(noise)

    def step(self, n: Tensor, x: Tensor, eps: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._drift(n, x, eps, to=self._at(self.sigma, n - 1, x))
