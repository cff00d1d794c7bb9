"""The peers' steps compute the same gradient as ours, in float64, and wrong ones are told from them."""

from types import SimpleNamespace

import pytest
import torch
import toy
from diffusers import StableDiffusionXLPipeline
from toy import STOCHASTIC, exact, randn

from baselines import diffusion_dpo, mapo, spo
from pso import pso_offline, pso_online
from pso.config import load
from pso.evidence import Batch, Side
from pso.mdp import Ancestral, Renoise
from pso.objective import Objective
from pso.peers.diffusers_dpo import DiffusersDpo
from pso.peers.mapo import Mapo
from pso.peers.released_pso import OfflineReleasedPso, ReleasedPso
from pso.peers.released_round import ReleasedRound
from pso.peers.script import Form, Pictures, log_probability
from pso.peers.spo import Spo
from pso.policy import Conditioning, Policy
from pso.sources import at_every_time

TOLERANCE = 1e-10
DOUBLE = torch.float64
PAIRS = 4
ENTRIES = load().methods
SETTINGS = {
    "online": pso_online.Config(**ENTRIES["pso_online_released"].objective),
    "offline": pso_offline.Config(**ENTRIES["pso_offline"].objective),
    "diffusers-dpo": diffusion_dpo.Config(**ENTRIES["dpo_transplant"].objective),
    "spo": spo.Config(**ENTRIES["spo_transplant"].objective),
    "mapo": mapo.Config(**ENTRIES["mapo_transplant"].objective),
}
CASES = {
    "online": (pso_online, ReleasedPso),
    "offline": (pso_offline, OfflineReleasedPso),
    "diffusers-dpo": (diffusion_dpo, DiffusersDpo),
    "spo": (spo, Spo),
    "mapo": (mapo, Mapo),
}
SAMPLED = ("online", "spo")


def pipeline64() -> StableDiffusionXLPipeline:
    found = toy.pipeline()
    found.unet.double()
    return found


def chain_of(name: str, kind):
    return at_every_time(exact(kind)) if name in ("diffusers-dpo", "mapo") else exact(kind)


def batch_of(name: str, chain, seed: int = 0) -> Batch:
    """Transitions near the network's own mean, so that no ratio is clipped; or noised latents. One pair is tied."""
    steps = {"online": [[4, 3, 2]] * PAIRS, "offline": [[4, 3, 2]] * PAIRS, "spo": [[4], [3], [2], [2]]}
    n = torch.tensor(steps.get(name, [[900], [17], [500], [250]]))
    sides = []
    for k in range(2):
        x0, noise, again = (randn(seed + 10 * k + i, *n.shape, *toy.SHAPE, dtype=DOUBLE) for i in range(3))
        if name in SAMPLED:
            x = chain.noise_to(n, x0, noise)
            sides.append(Side("reverse", n, x, chain.mean(n, x, noise) + chain.std(n, x) * again))
        else:
            noise = randn(seed + 1, *n.shape, *toy.SHAPE, dtype=DOUBLE)  # a pair shares it
            sides.append(Side("forward", n, chain.noise_to(n, x0, noise), noise))
    return Batch(torch.arange(PAIRS), *sides, tied=torch.tensor([False, True, False, False]))


CONDITION = Conditioning(randn(50, PAIRS, 77, 16, dtype=DOUBLE), randn(51, PAIRS, 16, dtype=DOUBLE))


def moved(parameters, std: float = 0.02) -> None:
    """The same LoRA, theta near pre."""
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(std * randn(100 + i, *parameter.shape, dtype=DOUBLE))


def gradient(parameters) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def ours(name: str, chain, batch, micro_batch: int = 100) -> tuple[torch.Tensor, float]:
    policy = Policy(pipeline64(), resolution=16)
    policy.add_lora(4, toy.TARGETS, seed=1)
    moved(policy.lora_parameters())
    step = Objective(CASES[name][0], SETTINGS[name], policy, chain, micro_batch)
    loss, _ = step.backward(batch, CONDITION)
    return gradient(policy.lora_parameters()), float(loss)


def peer(name: str, chain, of=None, settings=None):
    found = (of or CASES[name][1])(pipeline64(), 16, chain, settings or SETTINGS[name], rank=4)
    moved(found.parameters)
    return found


def theirs(one, batch, form: Form) -> tuple[torch.Tensor, float]:
    one.use(form)
    loss = one.backward(batch, CONDITION)
    return gradient(one.parameters), loss


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


FORMS = [Form(2, gradient_checkpointing=True), Form(PAIRS, gradient_checkpointing=False)]


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_loss_are_ours(name, kind):
    chain = chain_of(name, kind)
    batch = batch_of(name, chain)
    expected, loss = ours(name, chain, batch)
    assert expected.dtype is DOUBLE and expected.norm() > 1e-6
    one = peer(name, chain)
    for form in FORMS:
        found, value = theirs(one, batch, form)
        assert apart(found, expected) < TOLERANCE, form
        assert value == pytest.approx(loss, rel=1e-10)
    again, _ = ours(name, chain, batch, micro_batch=3)
    assert apart(again, expected) < TOLERANCE


# ---- wrong on purpose ----


class SwappedSides(ReleasedPso):
    def micro_batch(self, batch, text, share):
        return super().micro_batch(Batch(batch.prompts, *reversed(batch.sides), tied=batch.tied), text, share)


class PreWithTheAdapterOn(ReleasedPso):
    def adapter_off(self):
        return torch.no_grad()


class TieIgnored(ReleasedPso):
    def step_loss(self, target, reference, text, tied):
        return super().step_loss(target, reference, text, torch.zeros_like(tied))


class SigmoidForEachStep(OfflineReleasedPso):
    """Where the sum stands inside it."""

    def micro_batch(self, batch, text, share):
        columns = [
            [Side(s.process, s.n[:, j : j + 1], s.x[:, j : j + 1], s.answer[:, j : j + 1]) for s in batch.sides]
            for j in range(3)
        ]
        return sum(super(SigmoidForEachStep, self).micro_batch(Batch(batch.prompts, *c), text, share) for c in columns)


class SumOverAMicroBatch(DiffusersDpo):
    def share(self, pairs):
        return 1.0


class LogSigmoidOfTheMean(DiffusersDpo):
    """huggingface/diffusers#6702."""

    def losses(self, n, x, noise, text):
        return super().losses(n, x, noise, text).view(2, -1).mean(1)


class MovedReference(Spo):
    def ratio(self, side, text):
        self.frozen = self.unet
        return super().ratio(side, text)


class OneSided(Mapo):
    def score(self, d):
        return super().score(d).detach()


WRONG = {
    SwappedSides: "online", PreWithTheAdapterOn: "online", TieIgnored: "online", SigmoidForEachStep: "offline",
    SumOverAMicroBatch: "diffusers-dpo", LogSigmoidOfTheMean: "diffusers-dpo", MovedReference: "spo", OneSided: "mapo",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.__name__)
def test_a_wrong_peer_is_refused(wrong):
    name = WRONG[wrong]
    chain = chain_of(name, Renoise)
    batch = batch_of(name, chain)
    expected, _ = ours(name, chain, batch)
    found, _ = theirs(peer(name, chain, of=wrong), batch, FORMS[0])
    assert apart(found, expected) > 1e-3


@pytest.mark.parametrize("clip", [0.001, None])
def test_the_clip_is_that_of_the_settings(clip):
    chain = exact(Renoise)
    settings = SETTINGS["online"].model_copy(update={"ratio_clip": clip})
    batch = batch_of("online", chain)
    usual, _ = theirs(peer("online", chain), batch, FORMS[0])
    found, _ = theirs(peer("online", chain, settings=settings), batch, FORMS[0])
    policy = Policy(pipeline64(), resolution=16)
    policy.add_lora(4, toy.TARGETS, seed=1)
    moved(policy.lora_parameters())
    Objective(pso_online, settings, policy, chain, 100).backward(batch, CONDITION)
    assert apart(found, gradient(policy.lora_parameters())) < TOLERANCE
    assert (apart(found, usual) > 1e-3) == (clip is not None)


# ---- what goes before the step ----


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_released_round_samples_by_the_same_kernel(kind):
    """From x_N down, with one noise for the whole batch."""
    chain = exact(kind)
    one = ReleasedRound(peer("online", chain), None, toy.SHAPE, None, 2)
    text = Conditioning(CONDITION.hidden[:2], CONDITION.pooled[:2])
    torch.manual_seed(3)
    states, clean = one.trajectory(text)
    torch.manual_seed(3)
    x = chain.init(torch.randn(2, *toy.SHAPE))
    for n in range(4, 0, -1):
        assert torch.allclose(states[4 - n], x, rtol=1e-5, atol=1e-5)
        eps = one.step.eps(torch.full((2,), n), states[4 - n], text)
        x = chain.step(torch.full((2,), n), states[4 - n], eps, torch.randn(1, *toy.SHAPE))
    assert torch.allclose(clean, x, rtol=1e-5, atol=1e-5) and len(states) == 4


def test_the_released_round_takes_the_better_of_two_and_trains_on_it():
    chain = exact(Renoise)
    script = peer("online", chain)
    script.use(Form(1, gradient_checkpointing=False))
    rewards = iter([1.0, 2.0, 5.0, 4.0, 3.0, 3.0, 0.0, 1.0])
    vae = script.pipeline.vae
    one = ReleasedRound(script, vae, (4, 8, 8), lambda images, prompts: torch.tensor([next(rewards)]), 2)
    seen, before = [], [p.detach().clone() for p in script.parameters]
    make = one.pairs_of
    one.pairs_of = lambda here: seen.append((here, make(here))) or seen[-1][1]
    one(["a", "b", "c", "d"])
    assert [batch.tied.tolist() for _, batch in seen] == [[False, False], [True, False]]
    (here, batch), _ = seen
    assert torch.equal(batch.target.x[0], here["second"][0, :-1]) and torch.equal(
        batch.target.x[1], here["first"][1, :-1]
    )
    assert torch.equal(batch.reference.answer[0], here["first"][0, 1:]) and batch.target.n.tolist() == [[4, 3, 2]] * 2
    assert not any(torch.equal(p, q) for p, q in zip(script.parameters, before, strict=True))


def test_a_micro_batch_that_does_not_divide_an_update_is_refused():
    one = peer("online", exact(Renoise))
    one.use(Form(3, gradient_checkpointing=False))
    with pytest.raises(ValueError, match="4 pairs of an update are no multiple of a micro-batch's 3"):
        one.parts(4)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_kernel_is_that_of_the_sampler(kind):
    chain = exact(kind)
    n = torch.tensor([4, 3, 2])
    x, eps, following = (randn(i, 3, *toy.SHAPE, dtype=DOUBLE) for i in range(3))
    mean, std = chain.mean(n, x, eps), chain.std(n, x)
    expected = torch.distributions.Normal(mean, std).log_prob(following).mean((1, 2, 3))
    schedule = SimpleNamespace(exploding=kind is Ancestral, at=lambda n, like: chain.alpha_bar[n][:, None, None, None])
    assert torch.allclose(log_probability(schedule, n, x, eps, following), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_pictures_are_encoded_and_noised_as_by_our_source(kind):
    chain = chain_of("offline", kind)
    one = peer("offline", chain)
    images = torch.randint(0, 256, (2, 2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target, reference = (side.permute(0, 3, 1, 2) / 127.5 - 1 for side in images)
    pictures = Pictures(target, reference, ["a", "b"], torch.tensor([[4, 3], [3, 2]]))
    torch.manual_seed(5)
    latents = one.latents(torch.cat([target, reference]))
    torch.manual_seed(5)
    draw = torch.randn(latents.shape)
    mean, std = Policy(pipeline64(), 16).encode_images(images.flatten(0, 1))
    assert torch.allclose(latents, mean + std * draw, atol=1e-5)
    noise = randn(7, 2, 2, *latents.shape[1:])
    batch = one.noised(pictures, latents, noise)
    for side, clean in zip(batch.sides, latents.chunk(2), strict=True):
        expected = chain.noise_to(pictures.n, clean[:, None].expand_as(noise), noise)
        assert torch.allclose(side.x, expected, rtol=1e-5) and torch.equal(side.answer, noise)


def test_captions_are_encoded_as_by_ours():
    one, policy = peer("mapo", chain_of("mapo", Renoise)), Policy(pipeline64(), 16)
    expected, found = policy.encode_prompts(["a cat", "a dog"]), one.conditions(["a cat", "a dog"])
    assert torch.allclose(found.hidden, expected.hidden) and torch.allclose(found.pooled, expected.pooled)


@pytest.mark.parametrize("name", ["offline", "mapo", "diffusers-dpo"])
def test_an_update_from_pictures_moves_the_lora_alone(name):
    one = peer(name, chain_of(name, Renoise))
    one.use(Form(1, gradient_checkpointing=True))
    before = [p.detach().clone() for p in one.parameters]
    frozen = one.unet.conv_in.weight.clone()
    n = torch.tensor([[4, 3, 2]] * 2) if name == "offline" else torch.tensor([[100], [900]])
    pictures = Pictures(*(2 * torch.rand(2, 2, 3, 16, 16) - 1), ["a", "b"], n)
    condition = Conditioning(CONDITION.hidden[:2], CONDITION.pooled[:2])
    loss = one.update(pictures, condition)
    assert loss == pytest.approx(loss) and torch.equal(one.unet.conv_in.weight, frozen)
    assert all(not torch.equal(p, q) for p, q in zip(one.parameters, before, strict=True))
    assert all(p.grad is None for p in one.parameters)
