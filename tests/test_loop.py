"""What can go wrong between two updates: signals, memory that runs out, numbers that are none."""

import json
import logging
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import smoke_settings
from hubs import last_line
from rank_worker import case, gradient, run_out_of_memory
from safetensors.torch import load_file
from test_tune import folder, tune
from toy import CONDITION, TEXTS, FakePolicy

from pso import pso_online
from pso.loop import Loop, retried
from pso.mdp import Renoise
from pso.paths import LORA_FILE
from pso.provenance import UserError
from pso.ranks import Ranks
from pso.sources import Given, OnlinePairs
from pso.stopping import Stopping

# ---- asked to stop ----

# signals, in a row as SLURM sends them, in the middle of update 4
ASKED = """
import os, signal
from pso.journal import Journal
update = Journal.update
def update_and_ask(self, done, values):
    update(self, done, values)
    if done == 4:
        for number in {signals}:
            os.kill(os.getpid(), number)
Journal.update = update_and_ask
import pso.tune
pso.tune.main()
"""
SIGNALS = {
    "time limit": [signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGTERM],
    "warning before it": [signal.SIGUSR1],
    "keyboard": [signal.SIGINT],
}


@pytest.mark.parametrize("why", SIGNALS)
def test_a_run_that_is_asked_to_stop_keeps_that_update_and_goes_on_bit_for_bit(why, with_hub, smoke):
    asked = ASKED.format(signals=[int(number) for number in SIGNALS[why]])
    done = tune(with_hub, "pso_online", program=("-c", asked))
    assert done.returncode == 75, done.stderr
    name = SIGNALS[why][0].name
    said = f"{name}: stopped after update 4 of 6, which is kept; the same command goes on from there"
    assert done.stderr.strip().splitlines()[-1] == said and "Traceback" not in done.stderr
    here = folder(with_hub, "pso_online")
    assert sorted(path.name for path in (here / "state").iterdir()) == ["update0000003", "update0000004"]
    assert not (here / "lora").exists() and not (here / ".tune.lock").exists()
    last = json.loads((here / "timeline.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["update"], last["why"]) == ("stopped", 4, name)
    done = tune(with_hub, "pso_online")
    assert done.returncode == 0 and "continuing after update 4" in done.stderr
    ours, theirs = (load_file(folder(r, "pso_online") / "lora" / LORA_FILE) for r in (with_hub, smoke / "results"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    logs = [(folder(r, "pso_online") / "train.jsonl").read_text() for r in (with_hub, smoke / "results")]
    assert logs[0] == logs[1]
    events = [json.loads(line)["event"] for line in (here / "timeline.jsonl").read_text().splitlines()]
    assert [e for e in events if e != "at"] == ["began", "stopped", "began", "ended"]


def test_signals_are_noted_while_updates_are_made_and_no_longer():
    stopping, before = Stopping(), signal.getsignal(signal.SIGUSR1)
    with stopping.heard():
        assert stopping.asked is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.asked == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.asked == "SIGTERM" and signal.getsignal(signal.SIGUSR1) is before


def test_a_state_goes_on_with_another_micro_batch_and_other_checkpoints(with_hub, smoke):
    asked = ASKED.format(signals=[int(signal.SIGTERM)])
    assert tune(with_hub, "pso_online", program=("-c", asked)).returncode == 75
    other = smoke_settings(methods={"pso_online": {"tune": {"micro_batch": 5, "checkpoint_every": 1}}})
    done = tune(with_hub, "pso_online", settings=other)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(folder(r, "pso_online") / "lora" / LORA_FILE) for r in (with_hub, smoke / "results"))
    learnt = [k for k in theirs if "lora_B" in k]
    moved = sum(theirs[k].double().square().sum() for k in learnt)
    assert sum((ours[k] - theirs[k]).double().square().sum() for k in learnt) < 1e-6 * moved  # bits, by other shapes


# ---- memory ----


@pytest.mark.parametrize("name", ["pso_offline", "rpo"])
def test_less_at_a_time_gives_the_same_gradient_and_says_so(name, caplog):
    expected, value, _ = gradient(case(name, 100, Ranks()), name)
    step = case(name, 100, Ranks())
    run_out_of_memory(step, 3)
    found, told, _ = gradient(step, name)
    assert step.plan.micro_batch == (3 if name == "pso_offline" else 2) and told == pytest.approx(value, rel=1e-6)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    rows = 24 if name == "pso_offline" else 8
    said = (
        f"memory ran out (no room for {rows} rows): from here on {rows // 2} instead of {rows} of an update's rows go"
    )
    assert f"{said} through the network at a time" in caplog.messages


def test_what_was_added_to_gradients_before_memory_ran_out_is_forgotten():
    expected, *_ = gradient(case("pso_offline", 4, Ranks()), "pso_offline")
    step, calls = case("pso_offline", 4, Ranks()), []
    back = step._back

    def runs_out_once(*arguments):
        calls.append(back(*arguments))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room.")

    step._back = runs_out_once
    found, *_ = gradient(step, "pso_offline")
    assert step.plan.micro_batch == 2 and (found - expected).norm() < 1e-5 * expected.norm()


def test_checkpointing_is_the_last_resort_and_then_a_sentence():
    step = case("pso_offline", 2, Ranks())
    run_out_of_memory(step, 0)
    with pytest.raises(
        UserError, match="memory ran out with 1 row at a time and gradient checkpointing at 16 px; take"
    ):
        gradient(step, "pso_offline")
    assert step.plan.gradient_checkpointing and step.policy.unet.is_gradient_checkpointing


class Small(FakePolicy):
    """Room for three pictures at a time."""

    def decode(self, latents):
        if len(latents) > 3:
            raise torch.OutOfMemoryError("no room for pictures. Tried to allocate much")
        return super().decode(latents)


def online(policy, micro_batch: int) -> tuple[Given, OnlinePairs]:
    cfg = pso_online.Config(beta=5.0, timestep_mode="trajectory_sum", pairs_per_round=8)
    given = Given(policy, Renoise(toy.TIMES), cfg, 0, 4, prompts=TEXTS, condition=CONDITION, reward=toy.Judge())
    given.micro_batch = micro_batch
    return given, OnlinePairs(given)


def loop_of(given: Given, source) -> Loop:
    objective = SimpleNamespace(ranks=Ranks())
    probe = SimpleNamespace(micro_batch=given.micro_batch)
    return Loop("m", None, given, source, probe, objective, None, None, None, None, None)


def test_fewer_pictures_at_a_time_are_the_same_pictures(caplog):
    expected = online(FakePolicy(), 8)[1].batch(0)
    given, source = online(Small(), 8)
    loop = loop_of(given, source)
    found = retried(lambda: source.batch(0), loop.sample_fewer)
    assert given.micro_batch == loop.probe.micro_batch == 2
    assert torch.allclose(found.target.x, expected.target.x, atol=1e-6) and found.prompts.equal(expected.prompts)
    assert source.reward_queries == 16
    assert caplog.messages[-1].endswith("from here on 2 instead of 4 pictures are sampled at a time")


def test_no_room_for_one_picture_is_a_sentence():
    given, source = online(FakePolicy(), 1)
    with pytest.raises(UserError, match="memory ran out while 1 picture was sampled, decoded and scored; take a GPU"):
        loop_of(given, source).sample_fewer()


def test_other_errors_are_not_retried():
    def fail():
        raise RuntimeError("out of memory of another kind")

    with pytest.raises(RuntimeError):
        retried(fail, lambda: pytest.fail("asked for less"))


# ---- numbers that are none ----

BROKEN = """
from pso.objective import Objective
backward, seen = Objective.backward, []
def broken(self, batch, condition):
    seen.append(backward(self, batch, condition))
    if len(seen) == 5:
        self.policy.lora_parameters()[0].grad[0, 0] = float("nan")
    return seen[-1]
Objective.backward = broken
import pso.tune
pso.tune.main()
"""


def test_an_update_that_is_no_number_keeps_the_state_before_it_and_names_its_prompts(with_hub, smoke):
    line = last_line(tune(with_hub, "pso_offline", program=("-c", BROKEN)))
    here = folder(with_hub, "pso_offline")
    log = (folder(smoke / "results", "pso_offline") / "train.jsonl").read_text().splitlines()
    loss = next(row["loss"] for row in map(json.loads, log) if row.get("update") == 5)
    assert f"{here}: loss {loss} and gradient norm nan at update 5, on prompts '" in line
    assert "' and 1 more; the state before it is kept. If it happens again, remove" in line
    assert sorted(path.name for path in (here / "state").iterdir()) == ["update0000003", "update0000004"]
    assert json.loads((here / "timeline.jsonl").read_text().splitlines()[-1])["event"] == "stopped"
    assert tune(with_hub, "pso_offline").returncode == 0  # goes on from there, to the same LoRA
    ours, theirs = (load_file(folder(r, "pso_offline") / "lora" / LORA_FILE) for r in (with_hub, smoke / "results"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_batch_is_named_by_its_first_prompts_and_the_empty_caption_by_nothing():
    given, source = online(FakePolicy(), 8)
    named = loop_of(given, source).named
    assert named(SimpleNamespace(prompts=torch.tensor([3, 10]))) == "prompts 'prompt 3', ''"
    assert named(SimpleNamespace(prompts=torch.arange(5))) == "prompts 'prompt 0', 'prompt 1', 'prompt 2' and 2 more"


def test_a_lora_that_is_no_number_is_not_kept(tmp_path, caplog):
    policy = toy.new_policy()
    policy.lora_parameters()[0].data[0, 0] = np.inf
    given, source = online(policy, 8)
    loop = loop_of(given, source)
    loop.checkpoints = SimpleNamespace(folder=tmp_path / "state", save=lambda *_: pytest.fail("kept"))
    loop.timeline = SimpleNamespace(stopped=lambda *_: None)
    with caplog.at_level(logging.INFO):
        said = str(loop.broken(7, SimpleNamespace(prompts=torch.tensor([0])), 0.5, float("nan")))
    assert "loss 0.5 and gradient norm nan at update 8, on prompts 'prompt 0'; earlier checkpoints are kept" in said
