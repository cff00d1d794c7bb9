"""One run in several processes gives the run of one process, whatever the loss does with its batch."""

import json

import pytest
import rank_worker
import torch
from conftest import ROOT, run, smoke_settings
from hubs import share
from hypothesis import given
from hypothesis import strategies as st
from rank_worker import PAIRS, case, gradient
from safetensors.torch import load_file
from test_tune import KILLED, folder, last_line, task_of, tune

from pso.locks import locked
from pso.paths import LORA_FILE
from pso.ranks import Ranks

THREE = 3


def launcher(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))


class Place(Ranks):
    def __init__(self, index: int, count: int):
        self.accelerator, self.index, self.count = None, index, count


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_tile_the_rows_as_equally_as_can_be(rows, count):
    shares = [Place(k, count).share(rows) for k in range(count)]
    assert [i for s in shares for i in range(rows)[s]] == list(range(rows))
    lengths = [s.stop - s.start for s in shares]
    assert lengths == Place(0, count).lengths(rows) and max(lengths) - min(lengths) <= 1


# ---- the toy policy in three processes ----


def worked(out, *launched: str) -> tuple[list[dict], list[dict], list[dict]]:
    """Gradients, losses and what was told, of each process of the worker."""
    done = run("python", *launched, rank_worker.__file__, str(out), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]
    count = len(list(out.glob("told*.json")))
    read = lambda name, k: json.loads((out / f"{name}{k}.json").read_text())  # noqa: E731
    gradients = [torch.load(out / f"gradients{k}.pt", weights_only=True) for k in range(count)]
    return gradients, [read("losses", k) for k in range(count)], [read("told", k) for k in range(count)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three processes found; four pairs are shared out as 2, 1 and 1."""
    return worked(tmp_path_factory.mktemp("three"), *launcher(THREE))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same of one process."""
    gradients, losses, _ = worked(tmp_path_factory.mktemp("alone"))
    return gradients[0], losses[0]


@pytest.mark.parametrize("micro_batch", [100, 2])
@pytest.mark.parametrize("name", ["pso_offline", "pso_online", "rpo"])
def test_gradient_loss_and_log_are_those_of_one_process(three, alone, name, micro_batch):
    gradients, losses, _ = three
    one, (value, logged) = alone[0][f"{name} 100"], alone[1][f"{name} 100"]
    for k in range(THREE):
        found = gradients[k][f"{name} {micro_batch}"]
        assert one.norm() > 0 and (found - one).norm() < 1e-5 * one.norm()
        assert torch.equal(found, gradients[0][f"{name} {micro_batch}"])  # or the copies would drift apart
        told, their_log = losses[k][f"{name} {micro_batch}"]
        assert told == pytest.approx(value, rel=1e-6)
        assert their_log["implicit_accuracy"] == logged["implicit_accuracy"]
        assert their_log["margin"] == pytest.approx(logged["margin"], rel=1e-3, abs=1e-6)


def test_a_loss_that_saw_its_own_share_alone_would_differ(three):
    """What averaging the processes' own losses gives where pairs are compared with each other."""
    whole = rank_worker.batch("rpo", case("rpo", 100, Ranks()).chain)
    grads = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        step = case("rpo", 100, Ranks())
        step.cfg = step.cfg.model_copy(update={"group_size": part.stop - part.start})
        sides = [side.rows(part) for side in whole.sides]
        own = type(whole)(whole.prompts[part], *sides, embeddings={k: v[part] for k, v in whole.embeddings.items()})
        step.backward(own, step.policy.encode_prompts(rank_worker.toy.PROMPTS))
        grads.append(torch.cat([p.grad.flatten() for p in step.policy.lora_parameters()]) * len(own.prompts) / PAIRS)
    one, *_ = gradient(case("rpo", 100, Ranks()), "rpo")
    assert (sum(grads) - one).norm() > 1e-2 * one.norm()


def test_memory_that_runs_out_in_one_process_shrinks_all_and_changes_nothing(three, alone):
    gradients, losses, told = three
    one, (value, _) = alone[0]["pso_offline 100"], alone[1]["pso_offline 100"]
    assert [t["micro_batch"] for t in told] == [6, 3, 3]  # half of the 12, 6 and 6 rows that they have
    for k in range(THREE):
        assert (gradients[k]["out of memory"] - one).norm() < 1e-5 * one.norm()
        assert losses[k]["out of memory"][0] == pytest.approx(value, rel=1e-6)


def test_tensors_lists_counts_and_flags_are_those_of_all(three):
    *_, told = three
    for one in told:
        assert one["whole"] == list(range(8)) and one["flags"] == [True, False] * 4
        assert one["lists"] == ["0a", "0b", "1a", "2a", "2b"]
        assert one["total"] == 33 and one["any"] == [True, False]


# ---- runs ----


def lora(results, method):
    return load_file(folder(results, method) / "lora" / LORA_FILE)


def apart(a: dict, b: dict) -> float:
    """Of what was learnt (B starts at zero), as a share of it."""
    learnt = [k for k in a if "lora_B" in k]
    moved = sum(b[k].double().square().sum() for k in learnt).sqrt()
    return (sum((a[k] - b[k]).double().square().sum() for k in learnt).sqrt() / moved).item()


@pytest.mark.parametrize("method", ["pso_offline", "pso_online", "pso", "spo_transplant"])
def test_a_run_of_two_processes_is_that_of_one(method, smoke, with_hub, tmp_path_factory):
    done = tune(with_hub, method, program=(*launcher(2), "-m", "pso.tune"))
    assert done.returncode == 0, done.stderr[-3000:]
    if method == "pso":  # the smoke tables have it on another model
        alone = share(smoke, tmp_path_factory.mktemp("alone"))
        assert tune(alone, method).returncode == 0
    else:
        alone = smoke / "results"
    ours, theirs = lora(with_hub, method), lora(alone, method)
    assert ours.keys() == theirs.keys() and apart(ours, theirs) < 1e-3
    records = [json.loads((folder(r, method) / "run.json").read_text()) for r in (with_hub, alone)]
    assert [r["processes"] for r in records] == [2, 1]
    assert records[0]["cost"].get("reward_queries") == records[1]["cost"].get("reward_queries")
    assert records[0]["cost"]["unet_forwards"] == records[1]["cost"]["unet_forwards"]
    assert records[0].get("source") == records[1].get("source")
    logs = [(folder(r, method) / "train.jsonl").read_text().splitlines() for r in (with_hub, alone)]
    assert [json.loads(a).keys() for a in logs[0]] == [json.loads(a).keys() for a in logs[1]]
    for a, b in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert (
            a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4) if "loss" in a else a["kl"].keys() == b["kl"].keys()
        )


def test_a_run_of_one_process_goes_on_in_two(smoke, with_hub):
    assert tune(with_hub, "pso_online", program=("-c", KILLED)).returncode == -9
    done = tune(with_hub, "pso_online", program=(*launcher(2), "-m", "pso.tune"))
    assert done.returncode == 0 and "continuing after update 3" in done.stderr
    assert apart(lora(with_hub, "pso_online"), lora(smoke / "results", "pso_online")) < 1e-3
    record = json.loads((folder(with_hub, "pso_online") / "run.json").read_text())
    whole = json.loads((folder(smoke / "results", "pso_online") / "run.json").read_text())
    assert record["cost"]["unet_forwards"] == whole["cost"]["unet_forwards"]


def test_more_processes_than_samples_are_refused(with_hub):
    few = smoke_settings(methods={"diffusion": {"tune": {"batch_size": 1}}})
    done = tune(with_hub, "diffusion", program=(*launcher(2), "-m", "pso.tune"), settings=few)
    assert done.returncode != 0
    said = "methods.diffusion.tune.batch_size is 1, and the run was started in 2 processes; expected at most one"
    assert said in done.stderr and not (with_hub / "smoke" / task_of("diffusion")).exists()


def test_a_run_that_is_in_use_is_refused_for_all_processes(with_hub):
    with locked(folder(with_hub, "diffusion") / ".tune.lock"):
        said = last_line(tune(with_hub, "diffusion"))
        assert f"{folder(with_hub, 'diffusion')} is in use by another process" in said
        done = tune(with_hub, "diffusion", program=(*launcher(2), "-m", "pso.tune"))
    assert done.returncode != 0 and "is in use by another process" in done.stderr
    assert not (folder(with_hub, "diffusion") / "train.jsonl").exists()
