"""What the mathematics tests share: wrong kernels, a random SDXL-type policy for CPUs, and the golden numbers."""

import contextlib
import copy
import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pso import pso, pso_offline, pso_online
from pso.evidence import Batch, Evidence, Side
from pso.mdp import Ancestral, Chain, Renoise
from pso.miniature import world
from pso.miniature.clip import new_clip, save_clip
from pso.miniature.text import WINDOW, write_tokenizer
from pso.policy import Conditioning, Policy


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers says nothing while the tests of a file that imports this run."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


# ---- pictures and a judge ----


def clip_files(folder: Path, activation: str = "gelu") -> dict[str, Path]:
    """A tiny random CLIPModel of three vision layers with its tokenizer, in the real folder."""
    torch.manual_seed(0)
    save_clip(new_clip(write_tokenizer(folder / "first"), activation), folder / "clip")
    return {"model": folder / "clip", "processor": folder / "clip"}


def pictures(count: int) -> list[Image.Image]:
    images, *_ = world.render_many(count, 5)
    return [Image.fromarray(image) for image in images]


# ---- schedules and kernels ----

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMES = [999, 749, 499, 249]  # DMD2 and Turbo
LCM_TIMES = [999, 759, 499, 259]
# alpha_bar_t in float64, from the definition of "scaled_linear"
ALPHA_BAR = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
STOCHASTIC = [Renoise, Ancestral]


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(kind: type[Chain], times: list[int] = TIMES) -> Chain:
    """The chain on the float64 schedule; Renoise without LCM's boundary condition: Eq. 4 as printed."""
    return kind(times, ALPHA_BAR, boundary_condition=False) if kind is Renoise else kind(times, ALPHA_BAR)


def number(n: int, *shape: int) -> Tensor:
    return torch.full(shape, n)


ONE = torch.ones(1, 1, 1, dtype=torch.float64)  # a latent, where only its dtype matters


class StdAtDeparture(Renoise):
    def std(self, n, x):
        return (1 - self.alpha_bar[n]).sqrt()[..., None, None, None]


class SwappedLevels(Ancestral):
    """Eq. 14 as printed, in that the drift goes to sigma_up; the noise then has sigma_down."""

    def _up_down(self, n, x):
        sigma, up, down = super()._up_down(n, x)
        return sigma, down, up


class DriftTooFar(Ancestral):
    """The drift of the deterministic Euler step, and noise on top of it."""

    def _up_down(self, n, x):
        sigma, up, _ = super()._up_down(n, x)
        return sigma, up, self._at(self.sigma, n - 1, x)


# ---- a policy ----

PROMPTS = ["a red circle", "a blue square on a black background", "two green circles", "text that is in no caption"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SHAPE = (4, 8, 8)
STEPS = torch.tensor([4, 3, 2])


def new_unet() -> UNet2DConditionModel:
    """The toy of spec/pso.md, Section 6.4: 8 x 8 latents, about a million parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


def text_config(tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pipeline() -> StableDiffusionXLPipeline:
    """Weights of its own in each, all drawn alike: a test may change their precision and no other test sees it."""
    parts = _built().components
    own = {name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    return StableDiffusionXLPipeline(**own, add_watermarker=False)


@functools.cache
def _built() -> StableDiffusionXLPipeline:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        first = write_tokenizer(Path(folder) / "tokenizer")
        second = write_tokenizer(Path(folder) / "tokenizer_2", pad="!")
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.13025,
        )
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config(first)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(second)),
            tokenizer=first,
            tokenizer_2=second,
            unet=new_unet(),
            scheduler=EulerDiscreteScheduler(**SDXL),
            add_watermarker=False,
        ).to(torch.float32)


def new_policy(rank: int | None = 4, moved: float = 0.0) -> Policy:
    """A policy with a UNet of its own. rank None: no adapter; moved: std of lora_B (0: theta = pre)."""
    policy = Policy(pipeline(), resolution=16)
    if rank is not None:
        policy.add_lora(rank, TARGETS, seed=1)
        move(policy, moved)
    return policy


@torch.no_grad()
def move(policy: Policy, std: float, seed: int = 2) -> None:
    """Draw lora_B anew, so that theta differs from pre."""
    for i, parameter in enumerate(lora(policy, "lora_B")):
        parameter.copy_(std * randn(seed + i, *parameter.shape))


def lora(policy: Policy, kind: str) -> list[torch.nn.Parameter]:
    """The adapter's parameters of one kind, lora_A or lora_B."""
    return [p for name, p in policy.unet.named_parameters() if kind in name]


# ---- objectives ----

LOG_2 = math.log(2)
PAPER = {"beta": 5.0, "timestep_mode": "trajectory_sum"}
CONFIGS = {pso: PAPER, pso_offline: PAPER, pso_online: PAPER | {"pairs_per_round": 128}}
PROCESSES = {pso: ("forward", "reverse"), pso_offline: ("forward",) * 2, pso_online: ("reverse",) * 2}
METHODS = [pytest.param(m, id=m.__name__) for m in CONFIGS]
MODES = ["trajectory_sum", "per_step_mean"]
RELEASED = {"beta": 50.0, "timestep_mode": "per_step_mean", "ratio_clip": 0.1}
few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
ratios = st.lists(st.tuples(*[st.floats(-0.5, 0.5)] * 2), min_size=1, max_size=6)


def loss(module, target: Tensor, reference: Tensor, tied: Tensor | None = None, **changes) -> Tensor:
    """The method's loss on ratios [B, S]."""
    cfg = module.Config(**CONFIGS[module] | changes)
    batch = Batch(torch.arange(len(target)), None, tied=tied)
    return module.loss(Evidence(ratio=target), Evidence(ratio=reference), batch, cfg)[0]


def minus_log_sigmoid(u) -> np.ndarray:
    return np.logaddexp(0, -np.asarray(u, dtype=np.float64))


def both(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Target and reference ratios [B, 1]."""
    return tuple(torch.tensor(v, dtype=torch.float64)[:, None] for v in zip(*pairs, strict=True))


def new_batch(module, chain, pairs: int = 3, seed: int = 0) -> Batch:
    """Pairs of forward or reverse sides around random clean latents; one side for the naive loss."""
    sides, n = [], STEPS.expand(pairs, 3) if module in CONFIGS else torch.tensor([[4], [1], [3]])
    for k, process in enumerate(PROCESSES.get(module, ("forward",))):
        x0, eps, again = (randn(seed + 10 * k + i, *n.shape, *SHAPE) for i in range(3))
        answer = eps if process == "forward" else chain.noise_to(n - 1, x0, again)
        sides.append(Side(process, n, chain.noise_to(n, x0, eps), answer))
    return Batch(torch.arange(pairs) % 4, *sides)


class Brightness:
    """A reward that tells images apart."""

    def score(self, images, prompts):
        return torch.tensor([np.asarray(image).mean() for image in images])


# ---- what a source is given ----

PAIRS, LATENT = 10, (4, 4, 4)
TEXTS = [f"prompt {i}" for i in range(PAIRS)]
# pooled tells the prompts apart
CONDITION = Conditioning(torch.zeros(PAIRS, 1, 1), torch.arange(PAIRS)[:, None] / PAIRS)


class FakePairs:
    """A PairCache of ten pairs, each with a prompt of its own, so that batch.prompts tells the pairs."""

    prompt_index, left_out = torch.arange(PAIRS), ()

    def __init__(self, std: float = 0.0, shape: tuple[int, int, int] = LATENT):
        self.means = {side: randn(seed, PAIRS, *shape) for seed, side in enumerate(("target", "reference"))}
        self.std = std

    def __len__(self) -> int:
        return PAIRS

    def latents(self, side: str, index: list[int]) -> tuple[Tensor, Tensor]:
        mean = self.means[side][index]
        return mean, torch.full_like(mean, self.std)


class FakeEmbeddings:
    """Unit vectors of ten pairs' captions and pictures."""

    tensors = {k: randn(30 + i, PAIRS, 5) for i, k in enumerate(("text", "target", "reference"))}

    def rows(self, index: list[int], device) -> dict[str, Tensor]:
        return {k: torch.nn.functional.normalize(v[index], dim=-1) for k, v in self.tensors.items()}


class FakePolicy:
    """A network of one line, that sees its prompt."""

    device, latent_shape, guidance_scale = torch.device("cpu"), LATENT, 0.0
    push = 0.0  # what training would change

    def encode_prompts(self, prompts):
        return Conditioning(torch.zeros(len(prompts), 1, 1), -torch.ones(len(prompts), 1))

    def sampling(self):
        return contextlib.nullcontext()

    def guided_eps(self, chain, n, x, condition):
        return torch.tanh(chain.scale_input(n, x)) + condition.pooled[:, :, None, None] + self.push

    def decode(self, latents):
        return (255 * torch.sigmoid(latents[:, :3])).to(torch.uint8).permute(0, 2, 3, 1)

    def preview(self, latents):
        return self.decode(latents)


class Judge(Brightness):
    """Remembers which texts it was asked about, how many images at a time, and at which times."""

    step_aware = True

    def __init__(self, scale: float = 1.0):
        self.texts, self.sizes, self.times, self.scale = [], [], [], scale

    def score(self, images, prompts, t=0):
        assert len(images) == len(prompts)
        self.texts += prompts
        self.sizes.append(len(images))
        self.times.append(t)
        return self.scale * super().score(images, prompts)


# ---- golden numbers of the authors' functions, spec/pso.md, Section 6.2 ----


def fill(a: float, b: float, amplitude: float = 1.0) -> Tensor:
    """float64 [2, 1, 4, 3, 5]: two samples of one transition."""
    return torch.from_numpy(amplitude * np.sin(a * np.arange(1, 121) + b)).view(2, 1, 4, 3, 5)


N = torch.tensor([[4], [3]])  # 999 -> 749 and 749 -> 499
GOLDEN = {
    "DMD2": {
        "chain": Renoise(TIMES),
        "scale": [1.0, 1.0],
        "logp": [[-1.1513048, -1.0106965], [-1.1474580, -1.0120022]],
        "logp_pre": [[-1.1399797, -1.0065086], [-1.1388736, -1.0081316]],
        "logp_at_0": [-7.1047187, -4.1321530],
        "mean": [-1.1669568, -0.8777792, 0.7387208, -0.4119630, -2.4260590, -3.9355855],
        "d": [[-0.0113251, -0.0041879], [-0.0085844, -0.0038706]],
        5.0: (0.6961883, [0.5116018, 0.5094776], [0.0603864, -0.0487449]),
        50.0: (0.7246275, [5.3182406, 5.2946529], [0.6407848, -0.5172513]),
    },
    "Turbo": {
        "chain": Ancestral(TIMES),
        "scale": [14.614647, 4.0817308],
        "logp": [[-2.5456018, -1.5658352], [-2.5418711, -1.5671636]],
        "logp_pre": [[-2.5350387, -1.5622853], [-2.5339327, -1.5639083]],
        "logp_at_0": [-8.4987526, -4.6400843],
        "mean": [-4.0195212, -2.5756550, 3.8993902, -0.9959440, -4.3493090, -6.8318233],
        "d": [[-0.0105631, -0.0035499], [-0.0079384, -0.0032554]],
        5.0: (0.6960708, [0.4836936, 0.4816699], [0.0584473, -0.0472988]),
        50.0: (0.7233634, [5.0262160, 5.0038924], [None, None]),
    },
}


def members(name: str, dtype: torch.dtype = torch.float32) -> list[tuple[Side, Tensor, Tensor]]:
    """(side, eps_theta, eps_pre) of both members; each next state is drawn from the pre model's kernel."""
    chain, found = GOLDEN[name]["chain"] if dtype is torch.float32 else exact(Renoise), []
    for x, e, r, z in (
        (fill(0.37, 0.1), fill(0.71, 0.2), fill(0.91, 0.3, 0.05), fill(1.31, 0.5)),
        (fill(0.53, 0.7), fill(0.29, 1.1), fill(0.83, 0.9, 0.05), fill(1.77, 0.4)),
    ):
        x, e, r, z = (v.to(dtype) for v in (x, e, r, z))
        x, r = x * torch.tensor(GOLDEN[name]["scale"], dtype=dtype).view(2, 1, 1, 1, 1), e + r
        found.append((Side("reverse", N, x, chain.mean(N, x, r) + chain.std(N, x) * z), e.requires_grad_(), r))
    return found
