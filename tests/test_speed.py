"""Every fast option against the plain path: the same network up to rounding, and a wrong one is told from it."""

import pytest
import torch
import toy
from test_memory import half

from pso import compiled as looks
from pso import pso_offline, speed, trees
from pso.entries import Speed
from pso.masters import Masters
from pso.mdp import Renoise
from pso.objective import Objective, numbers
from pso.policy import ADAPTER, Policy
from pso.provenance import UserError
from pso.rollout import rollout

CHAIN = Renoise(toy.TIMES)
KEYS = [("eval", 0, name) for name in "abc"]


def exact_policy(speed: Speed | None = None, moved: float = 0.2) -> Policy:
    """The toy in float64."""
    pipeline = toy.pipeline()
    pipeline.unet.double()
    policy = Policy(pipeline, resolution=16, speed=speed)
    policy.add_lora(4, toy.TARGETS, seed=1)
    toy.move(policy, moved)
    return policy


def eps(policy: Policy, pre: bool = False) -> torch.Tensor:
    condition = policy.encode_prompts(toy.PROMPTS[:3])
    return policy.eps(CHAIN, toy.STEPS, toy.randn(0, 3, *toy.SHAPE), condition, pre=pre)


def gradient(policy: Policy, micro_batch: int = 100) -> torch.Tensor:
    cfg = pso_offline.Config(**toy.PAPER)
    batch = toy.new_batch(pso_offline, CHAIN)
    step = Objective(pso_offline, cfg, policy, CHAIN, micro_batch)
    step.backward(batch, policy.encode_prompts(toy.PROMPTS))
    vector = torch.cat([p.grad.flatten() for p in policy.lora_parameters()])
    for p in policy.lora_parameters():
        p.grad = None
    return vector


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ---- the network without its LoRA ----


def test_pre_shares_every_weight_and_takes_no_memory():
    policy = toy.new_policy(moved=0.2)
    own = {p.data_ptr() for name, p in policy.unet.named_parameters() if ".theta." not in name}
    assert {p.data_ptr() for p in policy.pre_unet.parameters()} == own
    assert policy.pre_unet is policy.pre_unet


def test_pre_is_not_what_theta_was_compiled_to():
    """A copied block would bring along a compiled call that is bound to the original, with its LoRA."""
    policy = toy.new_policy(moved=0.2)
    before = eps(policy, pre=True)
    speed.compile_blocks(policy.unet, backend="eager")
    policy._pre = None
    assert torch.equal(eps(policy, pre=True), before)
    block = next(m for m in policy.unet.modules() if type(m).__name__ in speed.BLOCKS)
    assert block._compiled_call_impl is not None
    assert all(m._compiled_call_impl is None for m in policy.pre_unet.modules() if m._modules)


def test_pre_follows_a_lora_that_is_loaded_and_unloaded(tmp_path):
    policy = toy.new_policy(rank=None)
    before = eps(policy, pre=True)
    toy.new_policy(moved=0.2).save_lora(tmp_path)
    policy.load_lora(tmp_path)
    assert torch.equal(eps(policy, pre=True), before) and not torch.equal(eps(policy), before)
    policy.unload_lora()
    assert torch.equal(eps(policy), before)


# ---- what goes through the network at a time ----


@pytest.mark.parametrize("micro_batch", [1, 4, 7])
def test_chunks_have_the_gradient_of_the_whole(micro_batch):
    assert apart(gradient(exact_policy(), micro_batch), gradient(exact_policy())) <= 1e-10


def test_activations_that_are_formed_again_have_the_same_gradient():
    policy = exact_policy()
    policy.gradient_checkpointing(True)
    assert apart(gradient(policy), gradient(exact_policy())) <= 1e-10


def test_a_chunk_too_few_is_told_apart(monkeypatch):
    expected, back, left = gradient(exact_policy()), Objective._back, []

    def all_but_the_last(self, call, *rest):
        if call.places == [(1, 8)]:
            left.append(call)
        else:
            back(self, call, *rest)

    monkeypatch.setattr(Objective, "_back", all_but_the_last)
    assert apart(gradient(exact_policy(), 4), expected) > 1e-3 and len(left) == 1


def stepped(fused: bool, weight_decay: float = 0.1) -> torch.Tensor:
    """What the optimiser makes of a gradient."""
    policy = exact_policy()
    rates = {"lr": 1e-3, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(policy.lora_parameters(), **rates, fused=fused)
    for k, p in enumerate(policy.lora_parameters()):
        p.grad = toy.randn(k, *p.shape, dtype=torch.float64)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in policy.lora_parameters()])


def test_fused_adamw_takes_the_same_step():
    assert apart(stepped(True), stepped(False)) <= 1e-10
    assert apart(stepped(True, weight_decay=0.0), stepped(False)) > 1e-6


# ---- a LoRA added to the weights ----


@torch.no_grad()
def test_merged_weights_are_the_same_network():
    plain, fast = (exact_policy(Speed(merge_lora=on)) for on in (False, True))
    expected = eps(plain)
    with fast.sampling():
        assert apart(eps(fast), expected) < 1e-12
        toy.move(fast, 0.3)  # which nobody may do within
        assert apart(eps(fast), expected) < 1e-12
    assert apart(eps(fast), expected) > 1e-3


def test_merged_weights_leave_the_network_alone():
    policy = toy.new_policy(moved=0.2)
    policy.speed = Speed(merge_lora=True)
    before = {name: p.clone() for name, p in policy.unet.named_parameters()}
    theta, pre = eps(policy), eps(policy, pre=True)
    rollout(policy, CHAIN, policy.encode_prompts(toy.PROMPTS[:3]), KEYS)
    assert all(torch.equal(p, before[name]) for name, p in policy.unet.named_parameters())
    assert torch.equal(eps(policy), theta) and torch.equal(eps(policy, pre=True), pre)


def test_a_graph_is_never_made_of_merged_weights():
    policy = toy.new_policy(moved=0.2)
    policy.speed = Speed(merge_lora=True)
    with policy.sampling():
        eps(policy).sum().backward()
    assert all(p.grad is not None for p in policy.lora_parameters())


def test_rollouts_of_merged_weights_are_the_same_pictures():
    plain, fast = toy.new_policy(moved=0.2), toy.new_policy(moved=0.2)
    fast.speed = Speed(merge_lora=True)
    found = [rollout(p, CHAIN, p.encode_prompts(toy.PROMPTS[:3]), KEYS) for p in (plain, fast)]
    assert apart(found[1].x0, found[0].x0) < 1e-5
    assert (plain.decode(found[0].x0).int() - plain.decode(found[1].x0).int()).abs().max() <= 1
    untuned = rollout(toy.new_policy(), CHAIN, plain.encode_prompts(toy.PROMPTS[:3]), KEYS)
    assert apart(untuned.x0, found[0].x0) > 1e-3


def test_merging_into_bfloat16_is_refused():
    policy = half(moved=0.1)
    policy.speed = Speed(merge_lora=True)
    with pytest.raises(ValueError, match="without loss"), policy.sampling():
        pass


# ---- 16-bit copies of a LoRA with float32 masters ----


def with_masters(moved: float = 0.1) -> Policy:
    policy = half(speed=Speed(lora_compute="base"))
    assert {p.dtype for p in policy.unet.parameters()} == {torch.bfloat16}
    policy.set_lora_state(half(moved).lora_state())
    return policy


def test_masters_of_full_precision_change_nothing():
    plain, fast = exact_policy(), exact_policy()
    fast.masters = Masters(fast._lora(), torch.float64)
    for micro_batch in (100, 4):
        assert apart(gradient(fast, micro_batch), gradient(plain, micro_batch)) <= 1e-10
    assert all(p.grad is None for p in fast.masters.copies.values())


def test_a_gradient_of_the_last_chunk_alone_is_told_apart(monkeypatch):
    def take(self, name, copied):
        self.full[name].grad, copied.grad = copied.grad.clone(), None

    expected = gradient(exact_policy(), 4)
    monkeypatch.setattr(Masters, "_take", take)
    fast = exact_policy()
    fast.masters = Masters(fast._lora(), torch.float64)
    assert apart(gradient(fast, 4), expected) > 1e-2


def test_the_gradient_of_copies_is_as_near_the_exact_one_as_autocasts():
    exact = toy.new_policy()
    exact.set_lora_state(half(moved=0.1).lora_state())
    expected = gradient(exact)
    autocast, copies = apart(gradient(half(moved=0.1)), expected), apart(gradient(with_masters()), expected)
    assert copies < 1.5 * autocast < 0.3  # of bfloat16, on a network of a million parameters
    assert {p.grad is None or p.grad.dtype for p in with_masters().lora_parameters()} == {True}


def test_an_update_below_the_copies_resolution_survives():
    policy = with_masters(moved=1.0)
    before = {name: p.detach().clone() for name, p in policy.masters.full.items()}
    with torch.no_grad():
        for _ in range(100):
            for p in policy.lora_parameters():
                p.mul_(1 + 1e-5)
            policy.lora_changed()
    for name, p in policy.masters.full.items():
        assert torch.allclose(p, before[name] * (1 + 1e-5) ** 100, rtol=1e-5)
    state = policy.lora_state()
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert state.keys() == half().lora_state().keys()


def test_the_network_moves_only_once_it_is_told():
    policy = with_masters()
    before = eps(policy)
    with torch.no_grad():
        for p in policy.lora_parameters():
            p.add_(0.1)
    assert torch.equal(eps(policy), before)
    policy.lora_changed()
    assert not torch.equal(eps(policy), before)


def test_masters_come_back_from_a_checkpoint():
    one, other = with_masters(), with_masters(moved=0.0)
    other.set_lora_state(one.lora_state())
    assert torch.equal(eps(one), eps(other)) and not torch.equal(eps(one), eps(with_masters(moved=0.0)))
    for a, b in zip(one.lora_parameters(), other.lora_parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_lora_with_masters_is_pre():
    policy = with_masters(moved=0.0)
    assert torch.equal(eps(policy), eps(policy, pre=True))


def test_a_loaded_lora_is_that_of_the_training_sampler(tmp_path):
    policy, loaded = with_masters(), half(speed=Speed(lora_compute="base"))
    policy.save_lora(tmp_path)
    loaded.unload_lora()
    loaded.load_lora(tmp_path)
    assert torch.equal(eps(loaded), eps(policy)) and not torch.equal(eps(loaded), eps(policy, pre=True))


def test_an_input_is_not_cast_for_a_lora_whose_weights_autocast_rounds(monkeypatch):
    """The same numbers with fewer copies: PEFT would make the input float32, and autocast bfloat16 again."""
    policy, casts = half(moved=0.1), []
    before, to = eps(policy), torch.Tensor.to

    def counted(self, *args, **kwargs):
        found = to(self, *args, **kwargs)
        casts.append(self.dtype == torch.bfloat16 and found.dtype == torch.float32 and self.ndim == 3)
        return found

    monkeypatch.setattr(torch.Tensor, "to", counted)
    assert torch.equal(eps(policy), before) and not any(casts)
    for module in policy.unet.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    assert torch.equal(eps(policy), before) and sum(casts) > 0


# ---- compiled, channels last, attention ----


def compiled(policy: Policy) -> Policy:
    """As Speed(compile=True) does it, without the minutes that a code generator takes."""
    for network in (policy.unet, policy.pre_unet):
        speed.compile_blocks(network, backend="aot_eager")
    return policy


def test_compiled_blocks_have_the_same_gradient():
    plain, fast = exact_policy(), compiled(exact_policy())
    expected = gradient(plain)
    assert apart(gradient(fast), expected) <= 1e-10
    toy.move(fast, 0.1, seed=50)  # another LoRA in the same graphs
    toy.move(plain, 0.1, seed=50)
    assert apart(gradient(fast), gradient(plain)) <= 1e-10 and apart(gradient(fast), expected) > 1e-3


def test_channels_last_has_the_same_gradient():
    assert apart(gradient(exact_policy(Speed(channels_last=True))), gradient(exact_policy())) <= 1e-10
    weight = exact_policy(Speed(channels_last=True)).unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("name", ["math", "efficient", "flash", "cudnn"])
def test_attention_kernels_have_the_same_gradient(name):
    assert apart(gradient(exact_policy(Speed(attention=name))), gradient(exact_policy())) <= 1e-10


def test_an_attention_of_another_scale_is_told_apart(monkeypatch):
    attend, expected = torch.nn.functional.scaled_dot_product_attention, gradient(exact_policy())
    changed = lambda query, *rest, **more: attend(1.01 * query, *rest, **more)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", changed)
    assert apart(gradient(exact_policy()), expected) > 1e-6


@pytest.fixture(scope="module")
def good() -> Policy:
    return compiled(toy.new_policy(moved=0.2))


def looked_at(policy: Policy) -> None:
    looks.check(policy, CHAIN, policy.encode_prompts(toy.PROMPTS), rows=2)


def test_the_check_passes_a_compiled_policy_and_leaves_its_lora(good):
    before, counted = good.lora_state(), good.unet_forwards
    before = {k: v.clone() for k, v in before.items()}
    looked_at(good)
    assert all(torch.equal(v, before[k]) for k, v in good.lora_state().items()) and good.unet_forwards == counted


def test_the_check_finds_a_pre_that_is_theta(good, monkeypatch):
    monkeypatch.setattr(good, "_pre", good.unet)
    with pytest.raises(UserError, match="the same network"):
        looked_at(good)


def test_the_check_finds_a_compiled_network_without_its_adapter(good, monkeypatch):
    """As seen with torch.compile around a model whose adapters are switched: the graph keeps what it was made with."""
    eager, seen = good.eps, []

    def frozen(chain, n, x, condition, pre=False):
        graph = torch._dynamo.eval_frame._stance.stance == "default"
        seen.append(graph)
        return eager(chain, n, x, condition, pre=pre or graph)

    monkeypatch.setattr(good, "eps", frozen)
    with pytest.raises(UserError, match="the compiled theta is .* away"):
        looked_at(good)
    assert True in seen and False in seen


# ---- one transfer ----


def test_numbers_reads_all_tensors_at_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.shape), tolist(t))[1])
    found = {"loss": torch.tensor(0.5), "kl": {4: torch.tensor(2.0), 3: torch.tensor([3.0])[0]}, "ties": 0.25}
    assert numbers(found | {"wins": torch.tensor(7)}) == {
        "loss": 0.5,
        "kl": {4: 2.0, 3: 3.0},
        "ties": 0.25,
        "wins": 7.0,
    }
    assert reads == [(4,)]
    assert numbers({"a": 1}) == {"a": 1}


# ---- a LoRA that takes the place of another ----


def test_a_swapped_lora_is_the_loaded_one(tmp_path):
    for k in (0, 1):
        other = toy.new_policy()
        toy.move(other, 0.3, seed=60 + k)
        other.save_lora(tmp_path / str(k))
    fresh, swapped = toy.new_policy(rank=None), toy.new_policy(rank=None)
    fresh.load_lora(tmp_path / "1")
    swapped.load_lora(tmp_path / "0")
    first = eps(swapped)
    layers = {id(m) for m in swapped.unet.modules()}
    swapped.load_lora(tmp_path / "1")
    assert {id(m) for m in swapped.unet.modules()} == layers
    assert torch.equal(eps(swapped), eps(fresh)) and not torch.equal(eps(swapped), first)


def test_a_lora_of_another_rank_comes_through_the_door(tmp_path):
    toy.new_policy(moved=0.2).save_lora(tmp_path / "4")
    wide = toy.new_policy(rank=8, moved=0.2)
    wide.save_lora(tmp_path / "8")
    policy = toy.new_policy(rank=None)
    policy.load_lora(tmp_path / "4")
    policy.load_lora(tmp_path / "8")
    assert torch.equal(eps(policy), eps(wide))


def test_layers_that_are_not_adapted_are_shared_by_a_merged_network():
    policy = toy.new_policy(moved=0.2)
    merged = trees.with_lora_added(policy.unet, ADAPTER)
    own = {p.data_ptr() for p in policy.unet.parameters()}
    changed = [name for name, p in merged.named_parameters() if p.data_ptr() not in own]
    assert changed and all(name.removesuffix(".weight").endswith(tuple(toy.TARGETS)) for name in changed)
