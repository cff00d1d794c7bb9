"""The other two families and compositions: LCM's guidance embedding, consistency, Turbo's critic, deltas and LoRAs."""

import copy

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
import toy
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from toy import randn

from pso.config import load
from pso.entries import ModelEntry
from pso.hub import Hub
from pso.mdp import Ancestral, Renoise, sdxl_alphas_cumprod
from pso.miniature import lcm, loras, turbo
from pso.miniature.dmd2 import Student, Teacher, predicted
from pso.miniature.gate import refuse
from pso.miniature.teacher import call
from pso.models import load_policy
from pso.policy import Policy
from pso.provenance import UserError
from pso.rollout import INITIAL, keyed_noise, rollout

ALPHAS = sdxl_alphas_cumprod()


# ---- the guidance embedding ----


def told_unet(seed: int = 3) -> UNet2DConditionModel:
    own = {k: v for k, v in toy.pipeline().unet.config.items() if not k.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config({**own, "time_cond_proj_dim": 32})


def told_policy(guidance: float | None = 8.0, unet=None) -> Policy:
    parts = {**toy.pipeline().components, "unet": unet or told_unet()}
    return Policy(StableDiffusionXLPipeline(**parts, add_watermarker=False), 16, 0.0, guidance, "sdxl_lcm")


def test_an_entry_without_guidance_embedding_is_refused():
    with pytest.raises(UserError, match=r"^models\.sdxl_lcm\.guidance_embedding is missing, .* is 32\); write 8\.0"):
        told_policy(None)


def test_a_guidance_embedding_for_a_plain_unet_is_refused():
    with pytest.raises(UserError, match=r"^models\.sdxl_lcm\.guidance_embedding is 8\.0, .* leave it out\.$"):
        told_policy(8.0, toy.new_unet())


def test_an_embedding_and_guidance_at_once_are_refused():
    with pytest.raises(UserError, match=r"^models\.sdxl_lcm\.guidance_scale is 5\.0; expected at most 1"):
        load({"models": {"sdxl_lcm": {"guidance_scale": 5.0}}})


def test_a_unet_is_a_file_or_a_folder():
    with pytest.raises(UserError, match=r"^models\.sdxl_lcm\.unet has file and subfolder; expected one of them\.$"):
        load({"models": {"sdxl_lcm": {"unet": {"file": "a.bin", "subfolder": "unet"}}}})


def test_the_latents_are_diffusers_own(monkeypatch):
    policy, prompt, key = told_policy(), toy.PROMPTS[0], ("eval", 0)
    chain, shape = Renoise(toy.LCM_TIMES), policy.latent_shape
    pipe = StableDiffusionXLPipeline(**{**policy.pipeline.components, "scheduler": LCMScheduler(**toy.SDXL)})
    pipe.set_progress_bar_config(disable=True)
    noise = iter([4, 3, 2])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, **k: keyed_noise([key], next(noise), shape))
    theirs = pipe(
        prompt, num_inference_steps=4, guidance_scale=8.0, latents=keyed_noise([key], INITIAL, shape),
        height=16, width=16, output_type="latent",
    ).images  # fmt: skip

    def ours() -> torch.Tensor:
        return rollout(policy, chain, policy.encode_prompts([prompt]), [key]).x0

    size = theirs.abs().max()
    assert (ours() - theirs).abs().max() < 1e-5 * size
    right = policy.timestep_cond
    for wrong in (None, torch.zeros(1, 32), policy.pipeline.get_guidance_scale_embedding(torch.tensor([8.0]), 32)):
        policy.timestep_cond = wrong  # not told, told nothing, told of 8 in place of 8 - 1
        assert (ours() - theirs).abs().max() > 1e-3 * size
    policy.timestep_cond = right
    assert (ours() - theirs).abs().max() < 1e-5 * size


def test_theta_and_pre_are_told_in_every_call():
    policy, seen = told_policy(), []
    policy.add_lora(4, toy.TARGETS, seed=1)
    policy.unet.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep_cond"]), with_kwargs=True)
    n, x = torch.tensor([4, 3]), randn(0, 2, *toy.SHAPE)
    condition = policy.encode_prompts(toy.PROMPTS[:2])
    for pre in (False, True):
        policy.eps(Renoise(toy.LCM_TIMES), n, x, condition, pre=pre)
    expected = policy.pipeline.get_guidance_scale_embedding(torch.tensor([7.0, 7.0]), 32)
    assert len(seen) == 2 and all(torch.equal(row, expected) for row in seen)


# ---- consistency distillation ----


def condition(count: int):
    return toy.new_policy(None).encode_prompts(toy.PROMPTS[:count])


def test_the_boundary_is_lcm_schedulers():
    scheduler, times = LCMScheduler(**toy.SDXL), torch.tensor([0, 19, 259, 999])
    scheduler.set_timesteps(4)
    for t, c_skip, c_out in zip(times, *lcm.boundary(times), strict=True):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert (c_skip.item(), c_out.item()) == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_at_time_0_the_answer_is_the_state():
    x, unet = randn(0, 2, *toy.SHAPE), told_unet()
    told = randn(1, 2, 32)
    assert torch.allclose(lcm.consistency(unet, x, torch.tensor([0, 0]), condition(2), told, ALPHAS), x, atol=1e-6)
    assert not torch.allclose(lcm.consistency(unet, x, torch.tensor([19, 19]), condition(2), told, ALPHAS), x, atol=0.1)


@pytest.mark.parametrize(("now", "guided"), [(999, True), (499, True), (259, False)])
def test_a_solver_step_is_ddims(now, guided):
    """With the guided prediction above dmd2.GUIDED_ABOVE and the plain one below."""
    unet, x, text = toy.pipeline().unet, randn(0, 1, *toy.SHAPE), condition(1)
    scheduler = DDIMScheduler(**toy.SDXL, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    t = torch.tensor([now])
    with torch.no_grad():
        plain = call(unet, x, t, type(text)(0 * text.hidden, 0 * text.pooled))
        eps = plain + (3.0 if guided else 1.0) * (call(unet, x, t, text) - plain)
    expected = scheduler.step(eps, now, x).prev_sample
    found = lcm.solve(Teacher(unet, 1.0), x, t, t - 20, text, torch.tensor([3.0]))
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())
    other = lcm.solve(Teacher(unet, 1.0), x, t, t - 20, text, torch.tensor([4.0]))
    assert torch.allclose(found, other) != guided


def test_a_new_student_is_the_teacher_whatever_it_is_told():
    teacher, x, text = toy.pipeline().unet, randn(0, 2, *toy.SHAPE), condition(2)
    student, times = lcm.new_student(teacher), torch.tensor([999, 259])
    policy = toy.new_policy(None)
    with torch.no_grad():
        expected = call(teacher, x, times, text)
        for guidance in (2.0, 9.0):
            told = lcm.told(policy, torch.full((2,), guidance))
            assert torch.allclose(call(student, x, times, text, told), expected, atol=1e-6)


# ---- Turbo ----


def duel() -> turbo.Duel:
    policy = toy.new_policy(None)
    unet = copy.deepcopy(policy.unet).requires_grad_(True)
    every, rng = policy.encode_prompts(toy.PROMPTS), torch.Generator().manual_seed(0)
    student = Student(unet, every, rng, policy.latent_shape)
    return turbo.Duel(student, Teacher(policy.unet, 3.0), randn(5, 8, *toy.SHAPE), torch.arange(8) % 4)


def test_each_side_of_the_duel_learns_only_for_itself():
    two = duel()
    two.critic_loss(4).backward()
    assert all(p.grad is not None for p in two.critic.heads.parameters())
    assert all(p.grad is None for p in two.student.unet.parameters())
    assert {id(p) for p in two.critic.parameters()} == {id(p) for p in two.critic.heads.parameters()}
    two.student_loss(4).backward()
    assert sum(p.grad is not None for p in two.student.unet.parameters()) > 100
    assert all(p.grad is None for p in two.teacher.unet.parameters())


def test_the_critic_pulls_the_student_towards_real():
    """The gradient in the student's answer raises the critic's logits."""
    two, text = duel(), condition(2)
    x0, times, noise = randn(1, 2, *toy.SHAPE).requires_grad_(), torch.tensor([100, 300]), randn(2, 2, *toy.SHAPE)

    def logit(x):
        return two.critic(x, times, noise, text, ALPHAS).mean()

    before = logit(x0)
    (-before).backward()
    step = x0.detach() - 1e-2 * x0.grad / x0.grad.norm()
    assert logit(step) > before


def test_turbos_picture_is_the_teachers():
    """scale_input gives the variance-preserving state, and both pictures predict the same clean latent."""
    chain, n = Ancestral(toy.TIMES), torch.tensor([4, 2])
    x0, noise, eps = (randn(i, 2, *toy.SHAPE) for i in range(3))
    exploding, times = chain.noise_to(n, x0, noise), chain.time(n)
    shown = chain.scale_input(n, exploding)
    alpha_bar = ALPHAS[times].view(-1, 1, 1, 1)
    assert torch.allclose(shown, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, atol=1e-5)
    assert torch.allclose(chain.x0_hat(n, exploding, eps), predicted(shown, times, eps, ALPHAS), atol=1e-4)


# ---- compositions ----

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
ENTRY = {"title": "x", "base": BASE, "sampler": "renoise", "grids": {4: toy.TIMES}, "guidance_scale": 0.0}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    """The toy as SDXL, another UNet as a state dict and as a folder, and one LoRA of each kind of keys."""
    root = tmp_path_factory.mktemp("hub")
    toy.pipeline().save_pretrained(root / BASE)
    other = moved_unet()
    (root / "a/student").mkdir(parents=True)
    torch.save(other.state_dict(), root / "a/student/unet.bin")
    other.save_pretrained(root / "a/student/unet")
    told_unet().save_pretrained(root / "a/told")
    for seed, name in ((1, "kohya"), (2, "peft")):
        policy = adapted(seed)
        if name == "peft":
            policy.save_lora(root / "a/peft")
        else:
            save_kohya(policy, root / "a/kohya/lora.safetensors")
    return Hub(root)


def moved_unet() -> UNet2DConditionModel:
    unet = toy.pipeline().unet
    with torch.no_grad():
        for i, parameter in enumerate(unet.parameters()):
            parameter.add_(0.02 * randn(i, *parameter.shape))
    return unet


def adapted(seed: int) -> Policy:
    """A LoRA on attention, feed-forward and convolutions, in numbers that float16 holds."""
    policy = toy.new_policy(None)
    policy.add_lora(4, loras.TARGETS, seed=seed)
    toy.move(policy, 0.05, seed)
    for parameter in policy.lora_parameters():
        parameter.data = parameter.data.half().float()
    return policy


def save_kohya(policy: Policy, path) -> None:
    rank, alpha = loras.RANK, loras.ALPHA
    loras.RANK, loras.ALPHA = 4, 0.5  # 1/8, as in DMD2's file
    try:
        loras.save_kohya(policy.lora_state(), path)
    finally:
        loras.RANK, loras.ALPHA = rank, alpha


KOHYA = {"repo": "a/kohya", "file": "lora.safetensors"}
PEFT = {"repo": "a/peft", "file": "pytorch_lora_weights.safetensors"}
DELTA = {"repo": "a/student", "file": "unet.bin", "minus": BASE}


def composed(hub: Hub, **parts) -> Policy:
    entry = ModelEntry(**ENTRY, resolution=16, **{k: v for k, v in parts.items()})
    return load_policy(entry, hub, device="cpu", name="mine")


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([v.flatten() for _, v in sorted(policy.unet.state_dict().items())])


def distance(a: Policy, b: Policy) -> float:
    return (weights(a) - weights(b)).abs().max().item()


def answer(policy: Policy) -> torch.Tensor:
    n, x = torch.tensor([4, 2]), randn(9, 2, *toy.SHAPE)
    with torch.no_grad():
        return policy.eps(Renoise(toy.TIMES), n, x, policy.encode_prompts(toy.PROMPTS[:2]))


@pytest.mark.parametrize(("lora", "seed"), [(KOHYA, 1), (PEFT, 2)], ids=["kohya", "peft"])
def test_a_fused_lora_is_the_unfused_one(hub, lora, seed):
    expected, plain = answer(adapted(seed)), answer(toy.new_policy(None))
    change = (expected - plain).abs().max()
    assert change > 0.05
    policy = composed(hub, loras=[lora])
    assert not policy.has_adapter  # pre holds it
    assert (answer(policy) - expected).abs().max() < 1e-4 * change
    for scale in (0.125, 8.0):  # its alpha applied twice, or not at all
        assert (answer(composed(hub, loras=[{**lora, "scale": scale}])) - expected).abs().max() > 0.1 * change


def test_a_tuned_adapter_on_a_composition_goes_off_alone(hub):
    policy = composed(hub, loras=[KOHYA])
    pre = answer(policy)
    policy.add_lora(4, toy.TARGETS, seed=7)
    toy.move(policy, 0.3)
    assert (answer(policy) - pre).abs().max() > 0.05
    policy.unload_lora()
    assert torch.allclose(answer(policy), pre, atol=1e-5)


def test_the_order_of_a_composition_is_of_no_weight(hub):
    one = composed(hub, loras=[{**KOHYA, "scale": 0.75}, PEFT], deltas=[DELTA, {**DELTA, "scale": -0.5}])
    other = composed(hub, loras=[PEFT, {**KOHYA, "scale": 0.75}], deltas=[{**DELTA, "scale": -0.5}, DELTA])
    assert distance(one, other) < 1e-5 < 0.01 < distance(one, composed(hub, loras=[KOHYA, PEFT], deltas=[DELTA]))


def test_two_fused_loras_are_both_unfused(hub):
    pipe = StableDiffusionXLPipeline.from_pretrained(hub.repo(BASE), add_watermarker=False)
    for name, lora in (("a", KOHYA), ("b", PEFT)):
        pipe.load_lora_weights(hub.repo(lora["repo"]), weight_name=lora["file"], adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.75, 1.0])
    unfused = answer(Policy(pipe, 16))
    fused = answer(composed(hub, loras=[{**KOHYA, "scale": 0.75}, PEFT]))
    assert torch.allclose(fused, unfused, atol=1e-4)


@pytest.mark.parametrize("source", [{"file": "unet.bin"}, {"subfolder": "unet"}], ids=["file", "folder"])
def test_base_and_whole_difference_are_the_other_unet(hub, source):
    other = composed(hub, unet={"repo": "a/student", **source})
    base, moved = composed(hub), {**DELTA, "file": None, **source}
    assert distance(other, base) > 0.05
    assert distance(composed(hub, deltas=[moved]), other) < 1e-6
    half = composed(hub, deltas=[{**moved, "scale": 0.5}])
    assert torch.allclose(weights(half), (weights(base) + weights(other)) / 2, atol=1e-6)


def test_a_delta_leaves_the_guidance_embedding_alone(hub):
    plain = composed(hub, unet={"repo": "a/told"}, guidance_embedding=8.0)
    moved = composed(hub, unet={"repo": "a/told"}, guidance_embedding=8.0, deltas=[DELTA])
    name = "time_embedding.cond_proj.weight"
    assert torch.equal(plain.unet.state_dict()[name], moved.unet.state_dict()[name]) and distance(plain, moved) > 0.05


def test_a_unet_folder_that_is_told_needs_its_guidance(hub):
    with pytest.raises(UserError, match=r"^models\.mine\.guidance_embedding is missing"):
        composed(hub, unet={"repo": "a/told"})


def test_a_difference_of_two_kinds_is_refused(hub):
    with pytest.raises(
        UserError, match=r"^models\.mine\.deltas\[0\] is a difference of UNets of two kinds: .*cond_proj"
    ):
        composed(hub, deltas=[{"repo": "a/told", "minus": BASE}])


# ---- LoRAs out of differences, and the gate ----


@pytest.mark.parametrize("shape", [(12, 20), (12, 8, 3, 3)], ids=["linear", "convolution"])
def test_the_truncated_difference_is_the_best_of_its_rank(shape):
    difference = randn(0, *shape)
    for rank in (12, 5, 16):
        down, up = loras.truncated(difference, rank)
        assert len(down) == up.shape[1] == rank
        found = torch.einsum("or,r...->o...", up.flatten(1), down)
        tail = torch.linalg.svdvals(difference.flatten(1))[rank:]
        assert ((found - difference) ** 2).sum().item() == pytest.approx((tail**2).sum().item(), abs=1e-4)


def test_a_lora_starts_as_the_difference(hub):
    policy, student = toy.new_policy(None), composed(hub, loras=[PEFT])  # a difference of rank 4
    policy.add_lora(loras.RANK, loras.TARGETS, seed=0)
    before = answer(policy)
    loras.start_from_difference(policy, student)
    change = (answer(student) - before).abs().max()
    assert change > 0.05 and (answer(policy) - answer(student)).abs().max() < 1e-3 * change


def test_the_gate_names_the_student_and_both_accuracies():
    refuse("a", 0.9, 1.0, 0.9)
    refuse("a", 0.5, 0.5, 0.9)
    said = r"^the stand-in student a draws .* 0\.850 of its pictures, less than 0\.9 of the teacher's 1\.000; train"
    with pytest.raises(UserError, match=said):
        refuse("a", 0.85, 1.0, 0.9)
