"""Started by test_trackers.py: runs of pso.tune on the toy policy, each in a process of its own (a fork of this one).

    python tests/tracker_worker.py JOBS_AS_JSON

A job: `results`, `log_with`, `environment`, `at`: update -> what happens after it, or "end" -> before the trackers'
(keys of HAPPENS). Its output goes to results/out, its exit status is added to results/status, the modules of interest
that it loaded go to results/modules.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import toy

from pso import trackers, tune
from pso.hub import Hub
from pso.mdp import Renoise
from pso.probe import Probe
from pso.sources import Given
from pso.trackers import FLUSH_S, Trackers

METHOD, UPDATES = "pso_offline", 6
HOST = "host-of-mine"
PROMPTS = ["a red circle", "a blue square of which much more could be told than there is room for under its picture"]
TUNE = {"num_updates": UPDATES, "batch_size": 2, "probe_every": 3, "checkpoint_every": 3, "learning_rate": 1.0e-3}


class Pairs(toy.FakePairs):
    inputs, counts = [], {"pairs": 10}

    def __init__(self):
        super().__init__(shape=toy.SHAPE)


class Reward(toy.Judge):
    spec = {"module": "toy"}


def new_probe(policy) -> Probe:
    condition = policy.encode_prompts(PROMPTS)
    return Probe(policy, Renoise(toy.TIMES), PROMPTS, condition, Reward(), {"sharpness": toy.Brightness()})


def prepare(run, hub, ranks):
    """As pso.tune's, without files."""
    module, cfg, source = tune.method_of(run)
    policy = toy.new_policy()
    given = Given(policy, Renoise(toy.TIMES), cfg, run.seed, run.entry.tune.batch_size, Pairs(), toy.TEXTS)
    given.condition = policy.encode_prompts(toy.TEXTS)
    return module, given, source(given), new_probe(policy)


def killed(_: Path) -> None:
    time.sleep(2 * FLUSH_S)
    os.kill(os.getpid(), signal.SIGKILL)


def asked_to_stop(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def disk_full(run: Path) -> None:
    """For TensorBoard: its file is one that takes nothing."""
    (events,) = (run / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")


def service_gone(_: Path) -> None:
    """W&B's own process is killed."""
    for child in psutil.Process().children():
        child.kill()
        child.wait()


def service_dies_meanwhile(run: Path) -> None:
    """W&B's own process no longer answers, and is killed while the run waits for it."""
    for child in psutil.Process().children():
        child.suspend()
    threading.Timer(2, service_gone, [run]).start()


ACTIONS = (killed, asked_to_stop, disk_full, service_gone, service_dies_meanwhile)
HAPPENS = {action.__name__: action for action in ACTIONS}


def settings(log_with: list[str]) -> dict:
    return {"scale": "smoke", "log_with": log_with, "methods": {METHOD: {"tune": TUNE}}}


def folder(results: Path) -> Path:
    return results / "smoke" / "preference" / "sdxl_dmd2" / METHOD / "seed0"


def work(results: Path, log_with: list[str], at: dict[str, list[str]]) -> None:
    """One job, in a process that ends with it."""
    out = os.open(results / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    tune.prepare, Hub.inputs, socket.gethostname = prepare, lambda self: [], lambda: HOST
    trackers.WAIT_S = 1
    update, end = Trackers.update, Trackers.end

    def update_and_more(self, done, *what):
        update(self, done, *what)
        for name in at.get(str(done), []):
            HAPPENS[name](folder(results))

    def more_and_end(self):
        for name in at.get("end", []):
            HAPPENS[name](folder(results))
        end(self)

    Trackers.update, Trackers.end = update_and_more, more_and_end
    given = json.dumps(settings(log_with))
    sys.argv[1:] = ["--model", "sdxl_dmd2", "--method", METHOD, "--results", str(results), "--set", given]
    tune.main()
    loaded = {name.partition(".")[0] for name in sys.modules}
    (results / "modules").write_text(json.dumps(sorted(loaded & {"tensorboard", "wandb"})))


def main(jobs: list[dict]) -> None:
    for job in jobs:
        results = Path(job["results"])
        results.mkdir(exist_ok=True)
        if (child := os.fork()) == 0:
            os.environ.update(job.get("environment", {}))
            work(results, job["log_with"], job.get("at", {}))
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with (results / "status").open("a") as file:
            file.write(f"{status}\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
