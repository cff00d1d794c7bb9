"""Half precision, memory plans and gradient checkpointing: what they may change and what not."""

import math
from unittest.mock import patch

import pytest
import torch
import toy
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given
from hypothesis import strategies as st

from pso import pso_offline
from pso.entries import Speed
from pso.memory import Plan, choose, needs, plan, saved_bytes
from pso.objective import Objective
from pso.probe import Probe

CHAIN = toy.exact(toy.Renoise)
WHOLE = st.integers(1, 10**6)


@given(st.integers(1, 1000), st.integers(1, 300), st.integers(0, 10**9), WHOLE, WHOLE)
def test_a_plan_fits_whenever_one_row_does(rows, asked, room, first, second):
    kept, recomputed = max(first, second), min(first, second)
    found = plan(rows, asked, room, kept, recomputed)
    per_row = recomputed if found.gradient_checkpointing else kept
    assert 1 <= found.micro_batch <= asked
    assert found.micro_batch * per_row <= room or found == Plan(1, gradient_checkpointing=True)


def test_activations_are_kept_while_they_fit_then_formed_again_then_the_update_is_cut():
    assert plan(rows=6, asked=256, room=60, kept=10, recomputed=1) == Plan(6)
    assert plan(rows=7, asked=256, room=60, kept=10, recomputed=1) == Plan(60, gradient_checkpointing=True)
    assert plan(rows=61, asked=256, room=60, kept=10, recomputed=1) == Plan(6)
    assert plan(rows=61, asked=256, room=9, kept=10, recomputed=1) == Plan(9, gradient_checkpointing=True)
    assert plan(rows=61, asked=4, room=60, kept=10, recomputed=1) == Plan(4)  # never above what was asked for
    assert plan(rows=61, asked=60, room=599, kept=10, recomputed=1) == Plan(59)  # two passes whatever is recomputed


def test_on_a_cpu_the_configured_micro_batch_stands():
    policy = toy.new_policy()
    assert choose(policy, CHAIN, policy.encode_prompts(["a"]), rows=6, asked=256) == Plan(256)


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    batch, found = toy.new_batch(pso_offline, CHAIN), {}
    for checkpointing in (False, True):
        policy = toy.new_policy(moved=0.1)
        policy.gradient_checkpointing(checkpointing)
        condition = policy.encode_prompts(["a", "b", "c"])
        calls = policy.unet_forwards
        kept = saved_bytes(policy, CHAIN, condition)
        assert policy.unet_forwards == calls  # measuring is not counted as work of the run
        objective = Objective(pso_offline, config(), policy, CHAIN, micro_batch=256)
        objective.backward(batch, condition)
        found[checkpointing] = kept, [p.grad for p in policy.lora_parameters()]
    assert found[True][0] < 0.5 * found[False][0]
    for plain, again in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_a_plan_counts_the_piece_that_is_formed_again():
    """In the backward pass a whole block stands beside the few activations that were kept; measured here by running
    the blocks one after the other alone."""
    policy = toy.new_policy(moved=0.1)
    condition, inputs = policy.encode_prompts(["a"]), {}
    blocks = [m for m in policy.unet.modules() if isinstance(m, (BasicTransformerBlock, ResnetBlock2D))]
    hooks = [b.register_forward_pre_hook(lambda *a: inputs.update({a[0]: a[1:]}), with_kwargs=True) for b in blocks]
    plain = saved_bytes(policy, CHAIN, condition)
    for hook in hooks:
        hook.remove()
    policy.gradient_checkpointing(True)
    few = saved_bytes(policy, CHAIN, condition)
    policy.gradient_checkpointing(False)
    whole, again = needs(policy, CHAIN, condition)
    assert whole == plain
    weights, largest = {p.untyped_storage().data_ptr() for p in policy.unet.parameters()}, 0
    for block, (args, kwargs) in inputs.items():
        own = {}  # of which the block's input is kept already
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, own=own: own.update({t.data_ptr(): t}) or t, lambda t: t
        ):
            block(*(a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args), **kwargs)
        given = {a.data_ptr() for a in (*args, *kwargs.values()) if torch.is_tensor(a)}
        largest = max(largest, sum(t.nbytes for k, t in own.items() if k not in weights | given))
    assert few + 0.8 * largest <= again <= few + 1.5 * largest


def config():
    return pso_offline.Config(beta=50.0, timestep_mode="trajectory_sum")


# ---- frozen weights in bfloat16 ----


def half(moved: float = 0.0, speed: Speed | None = None):
    """The toy policy with frozen weights in bfloat16, then a LoRA, as pso.tune makes it."""
    policy = toy.new_policy(rank=None)
    policy.speed = speed or policy.speed
    for part in (policy.pipeline.unet, policy.pipeline.text_encoder, policy.pipeline.text_encoder_2):
        part.to(torch.bfloat16)
    policy.add_lora(4, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    if moved:
        toy.move(policy, moved)
        policy.set_lora_state({k: v.clone() for k, v in policy.lora_state().items()})
    return policy


def test_lora_gradients_and_loss_are_float32_over_frozen_bfloat16():
    policy, batch = half(moved=0.2), toy.new_batch(pso_offline, CHAIN)
    condition = policy.encode_prompts(["a", "b", "c"])
    frozen = {p.dtype for name, p in policy.unet.named_parameters() if ".theta." not in name}
    assert frozen == {torch.bfloat16} and condition.hidden.dtype == torch.bfloat16
    value, _ = Objective(pso_offline, config(), policy, CHAIN, micro_batch=256).backward(batch, condition)
    parameters = policy.lora_parameters()
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
    exact = toy.new_policy()
    exact.set_lora_state(policy.lora_state())
    reference, _ = Objective(pso_offline, config(), exact, CHAIN, micro_batch=256).backward(
        batch, exact.encode_prompts(["a", "b", "c"])
    )
    # bfloat16 rounds otherwise on every CPU: up to 0.01 was seen, where theta is 0.22 from the ln 2 of pre
    assert value.item() == pytest.approx(reference.item(), abs=0.03) and abs(reference.item() - math.log(2)) > 0.2
    ours, theirs = (torch.cat([p.grad.flatten() for p in one.lora_parameters()]) for one in (policy, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.995
    assert policy.numerics["dtype"] == "bfloat16"


def test_theta_is_pre_to_the_bit_before_the_first_update():
    policy = half()
    condition = policy.encode_prompts(["a", "b"])
    n, x = torch.tensor([4, 2]), toy.randn(1, 2, *policy.latent_shape)
    assert torch.equal(policy.eps(CHAIN, n, x, condition), policy.eps(CHAIN, n, x, condition, pre=True))
    assert policy.eps(CHAIN, n, x, condition).dtype == torch.float32
    value, _ = Objective(pso_offline, config(), policy, CHAIN, 256).backward(
        toy.new_batch(pso_offline, CHAIN), policy.encode_prompts(["a", "b", "c"])
    )
    assert value.item() == pytest.approx(0.6931471805599453, abs=1e-6)


def test_an_update_below_bfloat16s_resolution_survives():
    """A LoRA in bfloat16 would lose it: 1 + 1e-5 rounds to 1."""
    policy = half(moved=1.0)
    before = [p.detach().clone() for p in policy.lora_parameters()]
    for parameter in policy.lora_parameters():
        parameter.data.mul_(1 + 1e-5)
    moved = [(p != b).float().mean().item() for p, b in zip(policy.lora_parameters(), before, strict=True)]
    assert min(moved) > 0.9
    rounded = [(p.bfloat16() != b.bfloat16()).float().mean().item() for p, b in
               zip(policy.lora_parameters(), before, strict=True)]  # fmt: skip
    assert max(rounded) < 0.1


def test_a_condition_kept_in_another_precision_is_converted_at_the_network():
    policy = half()
    condition = policy.encode_prompts(["a"])
    stored = type(condition)(condition.hidden.half(), condition.pooled.half())  # as the cache keeps it
    n, x = torch.tensor([3]), toy.randn(3, 1, *policy.latent_shape)
    assert policy.eps(CHAIN, n, x, stored).isfinite().all()


def test_a_probe_in_small_parts_measures_the_same():
    policy, judge = toy.new_policy(moved=0.1), toy.Brightness()
    condition = policy.encode_prompts(["a", "b", "c"])
    most, network, decode = [], policy._network, policy.decode
    found = {}
    for size in (256, 2):
        most.clear()
        with (
            patch.object(policy, "_network", lambda shown, *rest: (most.append(len(shown)), network(shown, *rest))[1]),
            patch.object(policy, "decode", lambda latents: (most.append(len(latents)), decode(latents))[1]),
        ):
            found[size] = Probe(policy, CHAIN, ["a", "b", "c"], condition, judge, {}, size)()
        assert max(most) == (9 if size == 256 else 2)  # three transitions of three prompts, or what fits
    assert found[2]["reward"] == pytest.approx(found[256]["reward"], rel=1e-3)
    assert found[2]["kl"] == pytest.approx(found[256]["kl"], rel=1e-3)
