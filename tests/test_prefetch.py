"""Batches made ahead: the same ones to the bit, of sources that allow it, and errors where a batch is asked for."""

import pytest
import torch
import toy
from test_sources import MODULES, equal, new
from toy import quiet  # noqa: F401

from pso import pso_offline
from pso.loop import retried
from pso.objective import Objective
from pso.prefetch import Prefetched, can_be, prefetched
from pso.sources import ContrastPairs, Given, OnlinePairs, PreferencePairs, Targets, TargetsAgainstModel
from pso.stepwise import StepwisePairs

GPU, CPU = torch.device("cuda"), torch.device("cpu")  # only their type is looked at
PURE = [PreferencePairs, Targets]


def made(source, updates: int = 5):
    with prefetched(source, GPU, updates) as batches:
        return [batches.batch(update) for update in range(updates)]


@pytest.mark.parametrize("kind", PURE)
def test_batches_are_those_of_the_source_to_the_bit(kind):
    plain, later = new(kind, std=1.0), new(kind, std=1.0)
    torch.manual_seed(1)
    found = made(new(kind, std=1.0))
    assert all(equal(plain.batch(update), one) for update, one in enumerate(found))
    assert not equal(found[3], later.batch(2))


def test_the_next_batch_is_begun_and_none_after_the_last():
    source, asked = new(PreferencePairs), []
    batch = source.batch
    source.batch = lambda update: (asked.append(update), batch(update))[1]
    with prefetched(source, GPU, 3) as batches:
        batches.batch(0)
        batches.ahead.pool.submit(lambda: None).result()
        assert asked == [0, 1]
        batches.batch(1), batches.batch(2)
    assert asked == [0, 1, 2]


def test_only_sources_that_say_so_themselves_are_prefetched_and_only_on_a_gpu():
    for kind in (PreferencePairs, Targets, ContrastPairs):
        assert can_be(object.__new__(kind))
    for kind in (TargetsAgainstModel, OnlinePairs, StepwisePairs):  # they sample theta
        assert not can_be(object.__new__(kind))

    class Derived(PreferencePairs):
        """May sample theta, for all that is known."""

    class Stateful(PreferencePairs):
        pure = True

        def state(self):
            return {}

    assert not can_be(object.__new__(Derived)) and not can_be(object.__new__(Stateful))
    for source, device in ((new(TargetsAgainstModel), GPU), (new(PreferencePairs), CPU)):
        with prefetched(source, device, 3) as batches:
            assert batches is source


def test_what_else_a_source_has_is_there_and_what_it_has_not_is_not():
    source = new(PreferencePairs)
    found = Prefetched(source, 3)
    assert found.chain is source.chain and not hasattr(found, "reward_queries") and not hasattr(found, "state")


def test_memory_that_runs_out_beside_an_update_is_asked_for_again():
    source, lacking = new(PreferencePairs, std=1.0), [True]
    batch = source.batch

    def short(update):
        if update == 1 and lacking and lacking.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return batch(update)

    source.batch, said = short, []
    with prefetched(source, GPU, 3) as batches:
        first = batches.batch(0)
        second = retried(lambda: batches.batch(1), lambda: said.append("fewer") or "fewer")
        assert said == ["fewer"] and equal(second, batch(1)) and equal(first, batch(0))


def trained(prefetch: bool) -> dict[str, torch.Tensor]:
    """The LoRA after a few updates of the toy policy, which draws from the shared stream in between."""
    policy, chain = toy.new_policy(moved=0.1), toy.exact(toy.Renoise)
    cfg = pso_offline.Config(**toy.CONFIGS[pso_offline])
    pairs, condition = toy.FakePairs(std=0.3, shape=toy.SHAPE), policy.encode_prompts(toy.TEXTS)
    source = PreferencePairs(Given(policy, chain, cfg, 0, 3, pairs, toy.TEXTS, condition))
    objective, optimizer = Objective(pso_offline, cfg, policy, chain, 256), torch.optim.AdamW(policy.lora_parameters())
    with prefetched(source, GPU if prefetch else CPU, 4) as batches:
        for update in range(4):
            objective.backward(batches.batch(update), condition)
            torch.randn(update + 1)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in policy.lora_state().items()}


def test_a_run_has_the_same_lora_with_and_without():
    torch.manual_seed(0)
    plain = trained(False)
    found = trained(True)
    assert plain.keys() == found.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    start = toy.new_policy(moved=0.1).lora_state()
    assert any(not torch.equal(found[name], start[name]) for name in plain)  # something was learnt


def test_every_source_of_the_tests_is_covered():
    assert {kind for kind in MODULES if vars(kind).get("pure")} == {PreferencePairs, Targets}


def test_samples_of_theta_made_ahead_would_be_those_of_before_the_update():
    """Why TargetsAgainstModel is not `pure`."""
    plain, source = new(TargetsAgainstModel, std=1.0), new(TargetsAgainstModel, std=1.0)
    ahead = Prefetched(source, 2)
    with ahead.ahead:
        ahead.batch(0)
        ahead.ahead.pool.submit(lambda: None).result()
        plain.given.policy.push = source.given.policy.push = 1.0  # the update
        assert not equal(ahead.batch(1), plain.batch(1))
