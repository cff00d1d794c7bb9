"""Each counter against something small enough to be counted by hand, and what it must not count."""

import copy

import numpy as np
import pytest
import torch
import toy
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import new_policy, quiet, randn  # noqa: F401
from transformers import CLIPTextModel

from pso.counting import Counts, Kept, adapter_on, counted, syncs_on_cpu
from pso.mdp import Renoise


class Parts:
    """As much of a pipeline as the counters ask for."""

    def __init__(self, **components):
        self.components = components


@pytest.fixture
def linear():
    return nn.Linear(3, 5)


def counts_of(network, action) -> Counts:
    with counted(Parts(network=network)) as counts:
        action()
    return counts


@pytest.fixture(scope="module")
def policy():
    return new_policy(moved=0.1)


def look(policy, rows: int, pre: bool = False):
    condition = policy.encode_prompts(toy.PROMPTS).rows(torch.zeros(rows, dtype=torch.long))
    return policy.eps(Renoise(toy.TIMES), torch.full((rows,), 4), randn(0, rows, *toy.SHAPE), condition, pre=pre)


# ---- calls ----


def test_calls_of_theta_and_of_pre_are_told_apart(policy):
    with counted(policy.pipeline) as counts:
        look(policy, 3)
        look(policy, 2)
        look(policy, 4, pre=True)
    assert (counts.theta_calls, counts.theta_rows, counts.pre_calls, counts.pre_rows) == (2, 5, 1, 4)
    assert counts.unet_calls == 3 and counts.prompts_encoded == 3 * len(toy.PROMPTS)
    assert counts.pictures_decoded == counts.pictures_encoded == counts.model_loads == 0


def test_a_network_that_never_had_an_adapter_is_pre():
    bare = new_policy(rank=None)
    assert not adapter_on(bare.unet) and adapter_on(new_policy().unet)
    with counted(bare.pipeline) as counts:
        look(bare, 2)
    assert (counts.theta_calls, counts.pre_calls, counts.pre_rows) == (0, 1, 2)


def test_another_network_than_the_pipelines_is_counted_too(policy):
    second = copy.deepcopy(policy)
    with counted(policy.pipeline) as counts:
        look(second, 2)
    assert counts.theta_calls == 1


def test_nothing_is_counted_after_the_block(policy):
    with counted(policy.pipeline) as counts:
        pass
    look(policy, 1), policy.decode(torch.zeros(1, 4, 8, 8)), copy.deepcopy(policy.unet)
    assert counts == Counts()


def test_the_classes_are_as_they_were_even_after_an_error(policy):
    before = (copy.deepcopy, UNet2DConditionModel.from_pretrained.__func__, nn.Module.load_state_dict)
    with pytest.raises(RuntimeError, match="inside"), counted(policy.pipeline):
        raise RuntimeError("inside")
    assert before == (copy.deepcopy, UNet2DConditionModel.from_pretrained.__func__, nn.Module.load_state_dict)


def test_pictures_through_the_vae(policy):
    with counted(policy.pipeline) as counts:
        policy.decode(torch.zeros(3, 4, 8, 8))
        policy.encode_images(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    assert (counts.pictures_decoded, counts.pictures_encoded, counts.unet_calls) == (3, 2, 0)


def test_models_that_are_read_or_copied(policy, tmp_path):
    policy.pipeline.text_encoder.save_pretrained(tmp_path / "text")
    new_policy(rank=None).unet.save_pretrained(tmp_path / "unet")
    state = policy.unet.state_dict()
    loads = {
        1: lambda: CLIPTextModel.from_pretrained(tmp_path / "text"),
        2: lambda: copy.deepcopy(policy.unet),
        3: lambda: policy.unet.load_state_dict(state),
        0: lambda: (copy.deepcopy(state), copy.deepcopy(nn.Linear(1, 1)), policy.unet.state_dict()),
    }
    found = {}
    for number, load in loads.items():
        with counted(policy.pipeline) as counts:
            load()
        found[number] = counts.model_loads
    assert found == {1: 1, 2: 1, 3: 1, 0: 0}
    with counted(policy.pipeline) as counts:
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert counts.model_loads >= 1


# ---- work ----


def test_flops_and_operations_of_a_linear_layer(linear):
    x = torch.randn(7, 3)
    counts = counts_of(linear, lambda: linear(x))
    assert counts.flops == 2 * 7 * 3 * 5 and counts.operations == 2  # the weight's transpose, addmm
    both = counts_of(linear, lambda: linear(x).sum().backward())
    assert both.flops == 2 * (2 * 7 * 3 * 5) and both.operations > counts.operations  # and the weight's gradient


def test_attention_on_a_cpu_is_counted_with_its_backward_pass(linear):
    """2 products forward, 5 backward, as fused kernels have it."""
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 8 * 8 * 16
    attend = nn.functional.scaled_dot_product_attention
    assert counts_of(linear, lambda: attend(q, k, v)).flops == 2 * product
    assert counts_of(linear, lambda: attend(q, k, v).sum().backward()).flops == 7 * product


def test_what_a_checkpoint_forms_again_is_counted_again():
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    x = torch.randn(4, 3, requires_grad=True)
    product = 2 * 4 * 3 * 3
    plain = counts_of(network, lambda: network(x).sum().backward()).flops
    again = counts_of(network, lambda: checkpoint(network, x, use_reentrant=False).sum().backward()).flops
    assert plain == 6 * product and again in (7 * product, 8 * product)  # it stops at the last that is needed


# ---- bytes for the backward pass ----


def test_kept_bytes_by_hand(linear):
    """exp keeps its result, a product both factors, a linear layer its input; weights are not in it."""
    x = torch.zeros(1000, requires_grad=True)
    assert counts_of(linear, lambda: x.exp()).saved_bytes == 4000
    assert counts_of(linear, lambda: x + 1).saved_bytes == 0
    assert counts_of(linear, lambda: linear(torch.zeros(10, 3))).saved_bytes == 10 * 3 * 4
    with torch.no_grad():
        assert counts_of(linear, lambda: x.exp()).saved_bytes == 0


def test_a_storage_is_kept_once_and_the_most_at_one_time_counts(linear):
    x = torch.zeros(1000, requires_grad=True)

    def twice() -> None:
        y = x * 1
        (y * y).sum().backward()  # both factors are one storage

    assert counts_of(linear, twice).saved_bytes == 4000

    def in_turn() -> None:
        for _ in range(3):
            x.exp().sum().backward()  # given back before the next

    def at_once() -> None:
        sum(x.exp().sum() for _ in range(3)).backward()

    assert counts_of(linear, in_turn).saved_bytes == 4000
    assert counts_of(linear, at_once).saved_bytes == 12000


def test_nothing_is_kept_in_the_end(linear):
    kept = Kept([linear])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        x = torch.zeros(8, requires_grad=True)
        y = x.exp()
        assert kept.now == 32
        y.sum().backward()
    del y
    assert (kept.now, kept.most, kept.holders) == (0, 32, {})


# ---- host syncs ----


def syncs(network, action) -> int:
    with syncs_on_cpu([network]) as followed:
        action()
    return followed.count


READS = {
    "item": (lambda v: v.sum().item(), 1),
    "float": (lambda v: float(v[0]), 1),
    "int": (lambda v: int(v[0]), 1),
    "bool": (lambda v: bool(v[0] > 0), 1),
    "if": (lambda v: 1 if torch.isfinite(v).all() else 0, 1),
    "format": (lambda v: f"{v[0]:.3f}", 1),
    "tolist": (lambda v: v.tolist(), 1),
    "stacked": (lambda v: torch.stack([v.sum(), v.mean(), v.max()]).tolist(), 1),
    "one by one": (lambda v: [v.sum().item(), v.mean().item(), v.max().item()], 3),
    "cpu and then numpy": (lambda v: v.detach().cpu().numpy(), 1),
    "cpu and then list": (lambda v: [x.item() for x in v.detach().cpu()], 1),
    "numpy": (lambda v: v.detach().numpy(), 1),
    "array": (lambda v: np.asarray(v.detach()), 1),
    "nonzero": (lambda v: (v > 0).nonzero(), 1),
    "mask": (lambda v: v[v > 0], 1),
    "equal": (lambda v: torch.equal(v, v + 1), 1),
    "written into": (lambda v: torch.zeros(5).copy_(v.detach()).tolist(), 1),
    "out": (lambda v: torch.add(v.detach(), 1, out=(t := torch.zeros(5))).shape and t.tolist(), 1),
    "through a view": (lambda v: v.view(5, 1).expand(5, 2)[2, 1].item(), 1),
    # and none
    "computing": (lambda v: (v * 2 + v.mean()).clamp(0, 1).argmax(), 0),
    "where": (lambda v: torch.where(v > 0, v, 0), 0),
    "rows by number": (lambda v: v[torch.tensor([0, 2])], 0),
    "a place in it": (lambda v: v[int(torch.tensor(2))], 0),
    "its shape": (lambda v: [len(v), v.numel(), v.dtype, v.device], 0),
    "the host's own": (lambda v: (torch.arange(3).tolist(), torch.tensor(2.0).item(), bool(torch.ones(1) > 0)), 0),
    "a shape of it": (lambda v: torch.full((len(v),), 2).tolist(), 0),
}


@pytest.mark.parametrize("kind", READS)
def test_reads_of_what_the_weights_have_a_part_in(kind, linear):
    read, expected = READS[kind]
    assert syncs(linear, lambda: read(linear(torch.zeros(3)))) == expected
    assert syncs(linear, lambda: read(torch.randn(5))) == 0, "of no weight's doing"


def test_gradients_and_the_optimisers_state_are_followed_and_its_step_is_not(linear):
    optimizer = torch.optim.AdamW(linear.parameters())

    def update(more=lambda: None) -> None:
        linear(torch.ones(2, 3)).sum().backward()
        torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        optimizer.step()
        more()

    assert syncs(linear, update) == 0
    assert syncs(linear, lambda: update(lambda: linear.weight.grad.norm().item())) == 1
    assert syncs(linear, lambda: update(lambda: optimizer.state[linear.weight]["exp_avg"].sum().item())) == 1
    assert syncs(linear, lambda: update(lambda: linear.weight.sum().item())) == 1


def test_a_read_inside_a_checkpoint_and_in_a_hook_of_the_backward_pass_is_seen(linear):
    def shown(x):
        y = linear(x)
        y.sum().item()
        return y

    x = torch.ones(2, 3, requires_grad=True)
    assert syncs(linear, lambda: checkpoint(shown, x, use_reentrant=False).sum().backward()) >= 1

    def hooked() -> None:
        y = linear(x)
        y.register_hook(lambda grad: grad.mul(linear.weight.sum()).sum().item() * 0 + grad)
        y.sum().backward()

    assert syncs(linear, hooked) == 1


def test_an_address_that_is_used_again_is_another_tensor(linear):
    def churn() -> int:
        for _ in range(50):
            linear(torch.zeros(3)).sum()
            torch.randn(5).tolist()
            torch.randn(()).item()

    assert syncs(linear, churn) == 0
