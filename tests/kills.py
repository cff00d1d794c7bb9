"""Kills at random instants: jobs of a workflow, and Snakemake itself, until the workflow is done all the same.

    python tests/kills.py --kills 200 --seed 0 --out results/reliability/kill_test.json

The workflow at smoke scale with three tuned rows is run once undisturbed, which also makes its hub, and then again and
again with its jobs killed: each at an instant drawn from its duration in the undisturbed run, by SIGKILL or SIGTERM.
After each workflow every file has to be the same as in the undisturbed run (tests/same.py).

What is drawn follows from the seed, the workflow's number, the job and its attempt. What a kill meets does not: that
depends on how the machine schedules, and a job that goes on may be done before its instant (no kill, not counted).
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from same import differing, unfinished
from warm import warm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pso.config import load  # noqa: E402
from pso.provenance import code_state, versions, write_json  # noqa: E402

METHODS = ("pso_offline", "pso_online", "spo_transplant")
EVERY = 4  # updates between checkpoints
STAGES = {
    "pso.tune": "tune",
    "eval.generate": "generate",
    "eval.score": "score",
    "eval.tables": "table",
    "eval.diff": "diff",
    "eval.claims": "claims",
}
QUOTA = {"tune": 4, "generate": 5, "score": 5, "table": 3, "diff": 3, "claims": 3}  # attempts of a job that are killed
SHRINKS = 0.8
TARGETS = ("table1", "claims")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
LONGEST_S = 900  # of anything that is waited for
SLOW = ("hps_v21", "oracle_utility", "oracle_accuracy", "hf_ratio", "texture", "image_reward")  # left out


def settings(
    methods: Sequence[str] = METHODS,
    updates: int = 24,
    every: int = EVERY,
    seeds: int = 2,
    without: Sequence[str] = SLOW,
) -> dict:
    """Table 1 with the rows of SDXL-DMD2 that are its model and these methods, without some metrics; with two image
    seeds a row has two shards of each eval set."""
    left_out = {"missing": "not part of this test"}
    table = load({"scale": "smoke"}).table_entries["table1"]
    kept = ("untuned", *methods)
    rows = {
        name: [
            row.model_dump() | ({} if row.model == "sdxl_dmd2" and row.method in kept else left_out)
            for row in getattr(table, name)
        ]
        for name in ("rows", "extra_rows")
    }
    tune = {"num_updates": updates, "checkpoint_every": every, "probe_every": updates // 2, "batch_size": 2}
    few = {"pso_online": {"pairs_per_round": 6}, "spo_transplant": {"prompts_per_round": 2}}
    return {
        "scale": "smoke",
        "scales": {"smoke": {"eval_batch": 1, "default_tables": ["table1"]}},
        "methods": {name: {"tune": tune, "objective": few.get(name, {})} for name in methods},
        "datasets": {name: {"num_seeds": seeds} for name in table.eval_sets},
        "tables": {"table1": rows | {"missing_metrics": dict.fromkeys(without, left_out["missing"])}},
    }


# ---- what is drawn ----


@dataclass
class Plan:
    """When which attempt of which job is killed: a function of seed, workflow, job and attempt."""

    seed: int
    workflow: int
    durations: dict[str, float]  # seconds of each job, undisturbed; "snakemake": of the whole
    quota: dict[str, int] = field(default_factory=lambda: QUOTA)

    def kill(self, job: str, attempt: int) -> tuple[float, signal.Signals] | None:
        """Seconds after its start, and the signal."""
        if attempt > self.quota[job.split()[0]]:
            return None
        drawn = random.Random(f"{self.seed}/{self.workflow}/{job}/{attempt}")
        left = SHRINKS ** (attempt - 1)  # a job that goes on has less to do
        return drawn.uniform(0, left * self.durations[job]), drawn.choice(SIGNALS)

    def kill_snakemake(self) -> tuple[float, signal.Signals, bool]:
        """The same of Snakemake itself, and whether its jobs are killed with it, as when a node dies."""
        drawn = random.Random(f"{self.seed}/{self.workflow}/snakemake")
        return drawn.uniform(0, self.durations["snakemake"]), drawn.choice(SIGNALS), drawn.random() < 0.5


# ---- what is seen ----


@dataclass
class Training:
    """One run as it is killed and goes on: how many updates were made twice."""

    folder: Path
    reached: int = 0  # the last update logged when its process ended
    said: int = 0  # bytes of tune.log read so far
    repeated: list[int] = field(default_factory=list)

    def ended(self) -> None:
        """After the end of each of its processes."""
        log, journal = self.folder / "tune.log", self.folder / "train.jsonl"
        told = log.read_bytes()[self.said :] if log.exists() else b""
        self.said += len(told)
        last = last_update(journal)
        if went_on := re.search(rb"continuing after update (\d+)", told):
            self.repeated.append(max(0, self.reached - int(went_on[1])))
        elif last < self.reached:  # the log was begun anew
            self.repeated.append(self.reached)
        else:
            return self._reach(last)
        self.reached = last
        return None

    def _reach(self, last: int) -> None:
        self.reached = max(self.reached, last)


def last_update(journal: Path) -> int:
    """Of the last line that is whole."""
    lines = journal.read_text(errors="replace").split("\n")[:-1] if journal.exists() else []
    return max((json.loads(line)["update"] for line in lines), default=0)


@dataclass
class Kill:
    stage: str
    signal: str


class Watch:
    """Hears which process runs which job (tests/shim.py), measures it, and kills it where a plan says so."""

    def __init__(self, base: Path, plan: Plan | None, most: int):
        self.base, self.plan, self.most = base, plan, most
        self.kills: list[Kill] = []
        self.durations: dict[str, float] = {}
        self.attempts: Counter[str] = Counter()
        self.trainings: dict[str, Training] = {}
        self.running: dict[int, psutil.Process] = {}
        self.lock, self.threads = threading.Lock(), []

    @contextlib.contextmanager
    def listening(self, folder: Path, python: str | None) -> Iterator[dict[str, str]]:
        """The environment in which `python` tells of itself; python: the socket of a warm process, or None."""
        address, programs = folder / "starts", folder / "bin"
        programs.mkdir()
        shim = programs / "python"
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {Path(__file__).with_name("shim.py")} "$@"\n')
        shim.chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        told = {"SHIM_STARTS": str(address), "SHIM_PYTHON": sys.executable, "SHIM_WARM": python or ""}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as starts:
            starts.bind(str(address))
            hearing = threading.Thread(target=self._hear, args=(starts,), daemon=True)
            hearing.start()
            yield {**os.environ, **told, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", str(address))
            hearing.join(LONGEST_S)
        for thread in self.threads:
            thread.join(LONGEST_S)

    def _hear(self, starts: socket.socket) -> None:
        while content := starts.recv(65536):
            told = json.loads(content)
            if told["argv"][:1] != ["-m"] or told["argv"][1] not in STAGES:
                continue
            thread = threading.Thread(target=self._follow, args=(told["pid"], told["argv"][1:], time.monotonic()))
            thread.start()
            self.threads.append(thread)

    def _follow(self, pid: int, argv: list[str], began: float) -> None:
        """One process of a job from its start to its end."""
        stage = STAGES[argv[0]]
        given = dict(zip(argv[1::2], argv[2::2], strict=False))
        job = f"{stage} {given['--method']}" if stage == "tune" else stage
        with self.lock:
            self.attempts[job] += 1
            planned = self.plan.kill(job, self.attempts[job]) if self.plan else None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = self.running[pid] = psutil.Process(pid)
            if planned is not None:
                self._kill_at(process, stage, began + planned[0], planned[1])
            process.wait(LONGEST_S)
        self.running.pop(pid, None)
        with self.lock:
            self.durations[job] = time.monotonic() - began
            if stage == "tune":
                run = self.base / given["--task"] / given["--model"] / given["--method"] / f"seed{given['--seed']}"
                self.trainings.setdefault(job, Training(run)).ended()

    def _kill_at(self, process: psutil.Process, stage: str, instant: float, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(max(0, instant - time.monotonic()))
            return
        with self.lock:
            if len(self.kills) < self.most and process.status() != psutil.STATUS_ZOMBIE:
                process.send_signal(number)
                self.kills.append(Kill(stage, number.name))

    def end_jobs(self) -> None:
        """As when their machine dies."""
        for process in list(self.running.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_for_jobs(self) -> None:
        deadline = time.monotonic() + LONGEST_S
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)


# ---- one workflow ----


def snakemake(work: Path, environment: dict, cores: int, *more: str) -> subprocess.Popen:
    command = ["snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--directory", str(work)]
    command += [
        "--cores",
        str(cores),
        "--retries",
        "12",
        "--rerun-incomplete",
        "--configfile",
        str(work / "settings.json"),
    ]
    with open(work / "snakemake.log", "ab") as log:
        return subprocess.Popen([*command, *more, "--", *TARGETS], env=environment, cwd=work, stdout=log, stderr=log,
                                stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def run_workflow(work: Path, watch: Watch, environment: dict, cores: int) -> None:
    """Until it is done; killed once itself where there is a plan."""
    process = snakemake(work, environment, cores)
    if watch.plan is not None and len(watch.kills) < watch.most:
        after, number, node = watch.plan.kill_snakemake()
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            with watch.lock:
                watch.kills.append(Kill("snakemake", number.name))
            process.send_signal(number)
            if node:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                watch.end_jobs()
            process.wait(LONGEST_S)
            watch.wait_for_jobs()
            snakemake(work, environment, cores, "--unlock").wait(LONGEST_S)
            process = snakemake(work, environment, cores)
    if process.wait(LONGEST_S) != 0:
        raise RuntimeError("the workflow failed:\n" + (work / "snakemake.log").read_text()[-6000:])
    watch.wait_for_jobs()


def prepare(work: Path, hub: Path | None, asked: dict) -> Path:
    """A results/smoke of its own with the hub and caches of another, or none yet."""
    base = work / "results" / "smoke"
    base.mkdir(parents=True)
    for name in ("hub", "cache") if hub else ():
        (base / name).symlink_to(hub / name, target_is_directory=True)
    (work / "settings.json").write_text(json.dumps(asked))
    return base


def whole_run(
    work: Path, hub: Path | None, asked: dict, cores: int, python: str | None, plan: Plan | None = None, most: int = 0
) -> Watch:
    """The workflow from nothing but a hub, with settings as asked, killed as planned."""
    watch = Watch(prepare(work, hub, asked), plan, most)
    with tempfile.TemporaryDirectory(prefix="pso") as folder, watch.listening(Path(folder), python) as environment:
        began = time.monotonic()
        run_workflow(work, watch, environment, cores)
        watch.durations["snakemake"] = time.monotonic() - began
    return watch


# ---- the long run ----


@dataclass
class Tally:
    """What all workflows so far have shown."""

    kills: list[Kill] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    workflows: int = 0

    def add(self, watch: Watch, undisturbed: Path) -> None:
        self.workflows += 1
        self.kills += watch.kills
        self.repeated += [updates for run in watch.trainings.values() for updates in run.repeated]
        self.differing += differing(watch.base, undisturbed)
        self.left += unfinished(watch.base)

    def told(self) -> dict:
        stages = {
            stage: Counter(kill.signal for kill in self.kills if kill.stage == stage) for stage in (*QUOTA, "snakemake")
        }
        return {
            "kills": len(self.kills),
            "differing": len(self.differing),
            "differing_files": self.differing,
            "left_behind": self.left,
            "stages": {
                stage: {number.name: counts[number.name] for number in SIGNALS} for stage, counts in stages.items()
            },
            "workflows": self.workflows,
            "checkpoint_every": EVERY,
            "resumed": len(self.repeated),
            "updates_repeated_at_most": max(self.repeated, default=0),
        }


def campaign(folder: Path, kills: int, seed: int, cores: int, python: str | None) -> dict:
    """Workflow after workflow until there were so many kills."""
    asked = settings()
    first = whole_run(folder / "hub", None, asked, cores, python)  # makes the hub
    control = whole_run(folder / "undisturbed", first.base, asked, cores, python)
    tally = Tally()
    alike = differing(first.base, control.base)
    durations = {job: min(seconds, first.durations[job]) for job, seconds in control.durations.items()}
    while len(tally.kills) < kills:
        plan, work = Plan(seed, tally.workflows, durations), folder / f"workflow{tally.workflows}"
        watch = whole_run(work, first.base, asked, cores, python, plan, kills - len(tally.kills))
        tally.add(watch, control.base)
        told = tally.told()
        print(f"workflow {tally.workflows}: {told['kills']} kills, {told['differing']} files differ, "
              f"{len(tally.left)} left behind, updates repeated: {tally.repeated}", flush=True)  # fmt: skip
    return tally.told() | {
        "undisturbed_differing": alike,
        "seconds_undisturbed": {job: round(seconds, 2) for job, seconds in sorted(durations.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the workflows, kept; default: a temporary one")
    args = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pso")))
        told = campaign(folder, args.kills, args.seed, args.cores, stack.enter_context(warm()))
    told |= {"seed": args.seed, "cores": args.cores, "seconds": round(time.monotonic() - began)}
    write_json(args.out, told | {"code": code_state(), "versions": versions()})
    sys.exit(1 if told["differing"] or told["left_behind"] or told["updates_repeated_at_most"] > EVERY else 0)


if __name__ == "__main__":
    main()
