"""Updates that benchmarks time: ours as the loop does it, and a peer's that computes the same function.

Both begin where their code begins: ours with kept latents and text conditions, a script that encodes in every step with
pictures and captions. Inputs are drawn anew and take turns.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from pso import compiled
from pso.bench_model import RESOLUTION, policy_of, published_speed, random_pipeline, wake
from pso.config import import_module, load
from pso.entries import MethodEntry, Speed, TuneConfig
from pso.evidence import Batch, Side
from pso.loop import Loop
from pso.mdp import Ancestral, Chain, Renoise, sdxl_alphas_cumprod
from pso.models import spaced_times
from pso.objective import Objective
from pso.peers.diffusers_dpo import DiffusersDpo
from pso.peers.mapo import Mapo
from pso.peers.released_pso import OfflineReleasedPso, ReleasedPso
from pso.peers.script import Form, Pictures, Script
from pso.peers.spo import Spo
from pso.policy import Conditioning, Policy
from pso.ranks import Ranks
from pso.sources import Given, PreferencePairs, at_every_time

SETS = 4  # of inputs, which take turns
TOLERANCE = 1e-10  # of gradients in float64
RANKS = {RESOLUTION: 4}  # of the LoRA; else the paper's
RANK = 16


@dataclass(frozen=True)
class Compared:
    """An entry of methods.yaml, the peer that computes the same function, and the peer's form as released."""

    entry: str
    peer: type[Script]
    released: Form
    from_pictures: bool  # or from sampled transitions
    one_step: bool = False  # of S transitions it makes pairs of one each

    def form(self, resolution: int, pairs: int) -> Form:
        """As released; the Turbo script, which is for 512 px, has 4 pairs instead of 2. At most all of an update."""
        turbo = self.peer in (ReleasedPso, OfflineReleasedPso) and resolution == 512
        asked = 4 if turbo else self.released.pairs
        return Form(math.gcd(asked, pairs), self.released.gradient_checkpointing)


COMPARISONS = {
    "online": Compared("pso_online_released", ReleasedPso, Form(2, True), False),
    "offline": Compared("pso_offline", OfflineReleasedPso, Form(2, True), True),
    "diffusers-dpo": Compared("dpo_transplant", DiffusersDpo, Form(8, True), True, one_step=True),
    "spo": Compared("spo_transplant", Spo, Form(2, False), False, one_step=True),
    "mapo": Compared("mapo_transplant", Mapo, Form(8, True), True, one_step=True),
}


@dataclass(frozen=True)
class Size:
    """Of an update: pairs, trained steps of each, px. micro_batch: rows of a call of ours; None: all that fit."""

    resolution: int = RESOLUTION
    pairs: int = 4
    steps: int = 3
    micro_batch: int | None = None

    @property
    def rank(self) -> int:
        return RANKS.get(self.resolution, RANK)


def chain_of(resolution: int, steps: int, alphas: Tensor | None = None) -> Chain:
    """The sampler whose stochastic transitions are `steps`: Turbo's at 512 px, else DMD2's."""
    times = spaced_times("trailing", steps + 1)
    if resolution == 512:
        return Ancestral(times, alphas)
    return Renoise(times, alphas, boundary_condition=alphas is None)


def settings_of(name: str) -> tuple[MethodEntry, object, object]:
    """The method's entry, its module and its Config."""
    entry = load().methods[COMPARISONS[name].entry]
    module = import_module(entry.module, f"methods.{COMPARISONS[name].entry}.module")
    return entry, module, module.Config(**entry.objective)


# ---- inputs ----


def captions(count: int, number: int = 0) -> list[str]:
    return [f"a photo of {number + i} cats on an old wooden table at night" for i in range(count)]


def transitions(chain: Chain, n: Tensor, shape: tuple, like: Tensor, generator: torch.Generator) -> Batch:
    """Pairs of sampled transitions [P, S] that leave x_n by the kernel of some answer of the network."""
    sides = []
    for _ in range(2):
        x0, noise, again = (
            torch.randn((*n.shape, *shape), generator=generator, dtype=like.dtype, device=like.device) for _ in range(3)
        )
        x = chain.noise_to(n, x0, noise)
        sides.append(Side("reverse", n, x, chain.mean(n, x, noise) + chain.std(n, x) * again))
    return Batch(torch.arange(len(n)), *sides, tied=torch.zeros(len(n), dtype=torch.bool, device=like.device))


def noised(chain: Chain, n: Tensor, shape: tuple, like: Tensor, generator: torch.Generator) -> Batch:
    """Pairs of clean latents, noised to n [P, S] by the same noise."""
    x0, other, noise = (
        torch.randn((*n.shape, *shape), generator=generator, dtype=like.dtype, device=like.device) for _ in range(3)
    )
    sides = [Side("forward", n, chain.noise_to(n, clean, noise), noise) for clean in (x0, other)]
    return Batch(torch.arange(len(n)), *sides)


@dataclass
class KeptLatents:
    """A PairCache whose pairs were drawn."""

    count: int
    shape: tuple
    left_out: tuple = ()
    means: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        drawn = torch.Generator().manual_seed(3)
        self.means = {side: torch.randn((self.count, *self.shape), generator=drawn) for side in ("target", "reference")}
        self.prompt_index = torch.arange(self.count)

    def __len__(self) -> int:
        return self.count

    def latents(self, side: str, index: list[int]) -> tuple[Tensor, Tensor]:
        mean = self.means[side][index]
        return mean, torch.full_like(mean, 0.1)


class Drawn:
    """A source that hands out some batches in turn."""

    def __init__(self, chain: Chain, batches: list[Batch]):
        self.chain, self.batches = chain, batches

    def batch(self, update: int) -> Batch:
        return self.batches[update % len(self.batches)]


# ---- ours and a peer on the same weights ----


@dataclass
class Pair:
    """Two models with the same frozen weights, each with its own LoRA, and what turns they take."""

    name: str
    size: Size
    device: torch.device
    dtype: torch.dtype
    speed: Speed | None = None  # of ours; None: as the scales run the networks

    def __post_init__(self):
        pipeline = random_pipeline(self.size.resolution, self.device, self.dtype)
        parts = {**pipeline.components, "unet": copy.deepcopy(pipeline.unet), "vae": copy.deepcopy(pipeline.vae)}
        other = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        self.entry, self.module, self.settings = settings_of(self.name)
        self.compared, self.pipeline = COMPARISONS[self.name], pipeline
        speed = self.speed or published_speed(self.device)
        self.policy = policy_of(pipeline, self.size.resolution, self.size.rank, speed)
        self.chain = chain_of(self.size.resolution, self.size.steps)
        self.loop, self.number = self.ours(), 0
        if speed.compile:  # else what is timed may be another function
            compiled.check(self.policy, self.chain, self.loop.given.condition)
        self.peer = self.theirs(other)
        self.turns = 0

    @property
    def rows(self) -> int:
        """Pictures at one time in an update, by which speed is told."""
        one = self.compared.one_step and self.compared.from_pictures
        return 2 * self.size.pairs * (1 if one else self.size.steps)

    def ours(self) -> Loop:
        """The loop of a run, without a journal on the disk."""
        size, policy = self.size, self.policy
        count = SETS * size.pairs
        prompts = captions(count)
        given = Given(policy, self.chain, self.settings, 0, size.pairs, prompts=prompts)
        given.condition = policy.encode_prompts(prompts)
        given.ranks = Ranks(Accelerator(cpu=self.device.type == "cpu"))
        if self.compared.from_pictures:
            given.pairs = KeptLatents(count, policy.latent_shape)
            source = PreferencePairs(given)
        else:
            source = Drawn(self.chain, self.sampled())
        bound = size.micro_batch or max(256, 2 * size.pairs * size.steps)
        objective = Objective(self.module, self.settings, policy, source.chain, bound, given.ranks)
        tuning = TuneConfig(num_updates=1, batch_size=size.pairs, learning_rate=1e-5)
        rates = {"lr": 1e-5, "weight_decay": 1e-6}
        optimizer = torch.optim.AdamW(policy.lora_parameters(), **rates, fused=self.device.type == "cuda")
        silent = SimpleNamespace(update=lambda *_: None, at=lambda *_: None)
        return Loop(self.name, tuning, given, source, None, objective, optimizer, None, silent, silent, silent)

    def sampled(self) -> list[Batch]:
        """Sets of transitions; where a pair is one transition, those of a trajectory are pairs of their own."""
        trained, pairs = self.chain.trained_steps, self.size.pairs
        n = torch.tensor(trained).expand(pairs, -1)
        if self.compared.one_step:
            n = n.reshape(-1, 1)
        generator = torch.Generator(self.device).manual_seed(4)
        like = torch.empty(0, device=self.device)
        return [transitions(self.chain, n, self.policy.latent_shape, like, generator) for _ in range(SETS)]

    def theirs(self, pipeline: StableDiffusionXLPipeline) -> Script:
        source = self.loop.source
        peer = self.compared.peer(pipeline, self.size.resolution, source.chain, self.settings, self.size.rank)
        wake(peer.unet.named_parameters())
        if not self.compared.from_pictures:
            self.inputs = source.batches
            return peer
        generator = torch.Generator(self.device).manual_seed(5)
        side, pairs = self.size.resolution, self.size.pairs
        self.inputs = []
        for k in range(SETS):
            shown = [
                torch.rand((pairs, 3, side, side), generator=generator, device=self.device) * 2 - 1 for _ in range(2)
            ]
            n = source.steps(k, list(range(pairs)))
            self.inputs.append(Pictures(*shown, captions(pairs, k * pairs), n))
        return peer

    def drop(self, whose: str) -> None:
        """Let go of a model of which only the other's memory is to be told; what an update of that needs is kept."""
        if whose == "theirs":
            self.peer = self.inputs = None
            return
        given = SimpleNamespace(condition=self.loop.given.condition)
        self.policy = self.pipeline = None
        self.loop = SimpleNamespace(given=given)

    # -- turns --

    def our_update(self) -> None:
        self.loop.update(self.number)  # refuses a gradient that is no number
        self.number += 1

    def their_update(self, form: Form) -> None:
        if self.peer.form != form:
            self.peer.use(form)
        self.turns += 1
        loss = self.peer.update(self.inputs[self.turns % SETS], self.loop.given.condition)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of the {self.name} peer is {loss}; expected a number")

    def released(self) -> Form:
        return self.compared.form(self.size.resolution, self.peer_pairs)

    @property
    def peer_pairs(self) -> int:
        """Pairs of an update as the peer counts them."""
        return len(self.inputs[0].n if self.compared.from_pictures else self.inputs[0].prompts)

    def tuned(self, seconds_of: Callable[[Callable], float]) -> Form:
        """The fastest micro-batch, without checkpointing; what does not fit into memory is passed over."""
        found = {}
        for pairs in (p for p in range(1, self.peer_pairs + 1) if self.peer_pairs % p == 0):
            form = Form(pairs, gradient_checkpointing=False)
            try:
                self.their_update(form)
                found[form] = seconds_of(lambda form=form: self.their_update(form))
            except torch.OutOfMemoryError:
                self.peer.optimizer.zero_grad()
                torch.cuda.empty_cache()
        if not found:
            raise ValueError(f"not even one pair of the {self.name} peer fits into memory without checkpointing")
        return min(found, key=found.get)


# ---- the same function first ----


def difference(name: str, ancestral: bool = False, of: type[Script] | None = None) -> float:
    """How far a peer's gradient is from ours, relative, in float64 on the small model."""
    compared, cpu = COMPARISONS[name], torch.device("cpu")
    pipeline = random_pipeline(RESOLUTION, cpu, torch.float64)
    parts = {**pipeline.components, "unet": copy.deepcopy(pipeline.unet)}
    policy = policy_of(pipeline, RESOLUTION, 4)
    chain = chain_of(512 if ancestral else RESOLUTION, 2, sdxl_alphas_cumprod().double())
    _, module, settings = settings_of(name)
    if getattr(settings, "times", None) == "uniform":
        chain = at_every_time(chain)
    script = (of or compared.peer)(
        StableDiffusionXLPipeline(**parts, add_watermarker=False), RESOLUTION, chain, settings, 4
    )
    with torch.no_grad():
        for own, other in zip(policy.lora_parameters(), script.parameters, strict=True):
            other.copy_(own)
    batch, condition = _small(compared, chain, policy)
    Objective(module, settings, policy, chain, 100).backward(batch, condition)
    script.use(Form(1, gradient_checkpointing=True))
    script.backward(batch, condition)
    ours, theirs = (torch.cat([p.grad.flatten() for p in ps]) for ps in (policy.lora_parameters(), script.parameters))
    return ((theirs - ours).norm() / ours.norm()).item()


def _small(compared: Compared, chain: Chain, policy: Policy) -> tuple[Batch, Conditioning]:
    n = torch.tensor([[3, 2], [3, 2]])
    if compared.one_step:
        n = torch.tensor([[700], [40]]) if compared.from_pictures else torch.tensor([[3], [2]])
    make, generator = noised if compared.from_pictures else transitions, torch.Generator().manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    return make(chain, n, policy.latent_shape, like, generator), policy.encode_prompts(captions(2))
