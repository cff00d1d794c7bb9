"""The workflow on a real SLURM (tests/slurm_lab.py) through its `slurm` profile, with jobs killed on the way.

tests/slurm_setup.sh installs what is needed. Jobs are those of Table 2; with PSO_SLURM_RECORD=1 they are those of the
whole workflow, and results/benchmarks/slurm.{json,md} are written.
"""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from slurm_lab import FREEZER, GPUS, Lab, alive, marked, missing, wait_until

from pso.paths import LORA_FILE, run_dir
from pso.provenance import atomic, write_json

pytestmark = pytest.mark.slurm
PROFILE = ROOT / "workflow" / "profiles" / "slurm"
WHOLE = bool(os.environ.get("PSO_SLURM_RECORD"))
# the same as in the profile, but for machines where nobody else waits for an answer
QUICK = (
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--max-status-checks-per-second",
    "10",
    "--latency-wait",
    "5",
)


@pytest.fixture(scope="module")
def lab():
    if names := missing():
        reason = f"{', '.join(names)}: not installed; tests/slurm_setup.sh installs SLURM"
        could = os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/usr/bin/apt-get").exists()
        pytest.fail(reason) if could else pytest.skip(reason)
    cluster = Lab(Path(tempfile.mkdtemp(prefix="lab")), nodes=2)
    try:
        yield cluster.up()
    finally:
        cluster.down()


def test_a_lab_goes_away_whole_also_by_another_process(lab):
    base = Path(tempfile.mkdtemp(prefix="lab"))
    command = [sys.executable, str(ROOT / "tests" / "slurm_lab.py")]
    subprocess.run([*command, "up", str(base), "--nodes", "1"], check=True, timeout=60)
    own = Lab(base, nodes=1)
    began = [psutil.Process(one["pid"]) for one in own.known()]
    assert len(began) == 3 and all(map(alive, began))
    job = own.run("sbatch", "--parsable", "-o", "none", "--wrap", "sleep 600")
    wait_until(lambda: own.state(job) == "RUNNING", 20, "the job runs")
    subprocess.run([*command, "down", str(base), "--nodes", "1"], check=True, timeout=60)
    assert not any(map(alive, began)) and not marked(base) and not base.exists()
    assert not list(FREEZER.glob(f"slurm_{own.name}*"))
    assert "is UP" in lab.run("scontrol", "ping")  # the other one was left alone


def start(lab: Lab, snakefile: Path, folder: Path, *options: str) -> subprocess.Popen:
    """Snakemake with the profile; what it says is in folder/driver.log."""
    path = os.pathsep.join([str(lab.base / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    words = [sys.executable, str(ROOT / "tests" / "slurm_lab.py"), "snakemake", "--snakefile", str(snakefile)]
    words += ["--directory", str(folder), "--workflow-profile", str(PROFILE), *QUICK, *options]
    with open(folder / "driver.log", "w") as output:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(driver: subprocess.Popen, folder: Path, seconds: float) -> str:
    try:
        code = driver.wait(timeout=seconds)
    finally:
        driver.kill()
    said = (folder / "driver.log").read_text()
    assert code == 0, said[-6000:]
    return said


def program(job: str, module: str) -> psutil.Process | None:
    """The process of a module in a job of SLURM; neither the launcher nor srun before it."""
    for one in psutil.process_iter():
        try:
            words = [word for word in one.cmdline()[:4] if word != "-u"]  # torchrun's
            if words[1:3] == ["-m", module] and one.environ().get("SLURM_JOB_ID") == job:
                return one
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


# ---- signals ----

LISTENER = """
import signal, sys, time
from pathlib import Path
name = Path(sys.argv[1])
def hear(sign, frame):
    name.with_suffix(".heard").touch()
    sys.exit(75)
if name.with_suffix(".started").exists():
    name.with_suffix(".done").touch()
    sys.exit()
signal.signal(signal.SIGTERM, hear)
name.with_suffix(".started").touch()
time.sleep(600)
"""
SIGNAL_RULES = """
rule all:
    input: "launched.done", "plain.done"
rule launched:
    output: "launched.done"
    resources: gpu=1, nodes=1
    shell: "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} -m listener launched 2>&1 | tee a.log"
rule plain:
    output: "plain.done"
    resources: gpu=1, nodes=1
    shell: "python -m listener plain 2>&1 | tee b.log"
"""


def test_a_signal_reaches_what_the_launcher_started_and_nothing_else(lab, tmp_path):
    (tmp_path / "listener.py").write_text(LISTENER)
    (tmp_path / "Snakefile").write_text(SIGNAL_RULES)
    driver = start(lab, tmp_path / "Snakefile", tmp_path)
    try:
        for name in ("launched", "plain"):
            wait_until((tmp_path / f"{name}.started").exists, 60, f"{name} runs")
        running = {one["comment"]: one["id"] for one in lab.jobs() if one["state"] == "RUNNING"}
        lab.run("scancel", running["rule_launched"], running["rule_plain"])
    finally:
        said = finish(driver, tmp_path, 120)
    assert "SLURM status is: 'CANCELLED'" in said and "Trying to restart job" in said
    assert (tmp_path / "launched.heard").exists()
    if lab.proctrack == "cgroup":  # linuxproc signals the whole tree; clusters rarely have it
        assert not (tmp_path / "plain.heard").exists()


# ---- several processes ----

RANKS = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
name = sys.argv[1]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
def hear(sign, frame):
    Path(f"{name}.heard{rank}").touch()
    sys.exit(75)
if rank == 0 and not Path(f"{name}.started").exists():
    Path(f"{name}.started").touch()
    first = torch.ones(1)
else:
    first = torch.zeros(1)
dist.broadcast(first, 0)
if first.item():
    signal.signal(signal.SIGTERM, hear)
    Path(f"{name}.ready{rank}").touch()
    time.sleep(600)
total = torch.tensor([float(rank)])
dist.all_reduce(total)
if rank == 0:
    said = [os.environ[name] for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK")]
    Path(f"{name}.done").write_text(" ".join([str(world), f"{total.item():.0f}", *said]))
dist.destroy_process_group()
"""
# the launcher itself, which here starts another program than pso.tune on several GPUs
LAUNCHER = """
from pso import launch
launch.MULTI_PROCESS.add("ranks")
launch.main()
"""
RANK_RULES = """
SHELL = "python -m launcher --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads} -m ranks {rule}"
rule all:
    input: "one.done", "two.done"
rule one:
    output: "one.done"
    resources: gpu=2, nodes=1
    shell: SHELL + " 2>&1 | tee one.log"
rule two:
    output: "two.done"
    resources:
        gpu=2, nodes=2, tasks=2, tasks_per_gpu=0, mpi="srun", gres="gpu:1", slurm_partition="all", cpus_per_task=3
    shell: SHELL + " 2>&1 | tee two.log"
"""


def test_one_run_on_two_gpus_and_on_two_nodes_is_saved_by_all_its_processes(lab, tmp_path):
    for name, text in (("ranks.py", RANKS), ("launcher.py", LAUNCHER), ("Snakefile", RANK_RULES)):
        (tmp_path / name).write_text(text)
    driver = start(lab, tmp_path / "Snakefile", tmp_path)
    try:
        for _ in range(2):  # one after the other: the nodes have two GPUs each
            wait_until(lambda: len(list(tmp_path.glob("*.ready?"))) == 2, 120, "two processes have met")
            name = next(tmp_path.glob("*.ready0")).stem
            job = next(j["id"] for j in lab.jobs() if j["state"] == "RUNNING" and j["comment"] == f"rule_{name}")
            lab.run("scancel", job)
            wait_until(lambda job=job: lab.state(job) == "CANCELLED", 30, "the job has ended")
            for rank in (0, 1):
                assert (tmp_path / f"{name}.heard{rank}").exists(), (tmp_path / f"{name}.log").read_text()[-3000:]
                (tmp_path / f"{name}.ready{rank}").unlink()
    finally:
        finish(driver, tmp_path, 180)
    assert (tmp_path / "one.done").read_text() == "2 1 2 1"
    assert (tmp_path / "two.done").read_text() == "2 1 1 3"


# ---- the whole workflow ----

# what is done to the first job of a program that has got somewhere, in this order
DISTURBED = (("scancel", "pso.tune"), ("time limit", "pso.tune"), ("requeue", "eval.generate"))
ENDED = {"scancel": "CANCELLED", "time limit": "TIMEOUT"}


def under_way(one: psutil.Process, folder: Path) -> bool:
    """Whether the process has written something that a killed one could lose."""
    words = one.cmdline()
    given = {name.removeprefix("--"): value for name, value in zip(words, words[1:], strict=False) if name[:2] == "--"}
    if "method" in given:
        run = folder / run_dir("smoke", given["task"], given["model"], given["method"], given["seed"])
        return (run / "train.jsonl").exists() and (run / "train.jsonl").stat().st_size > 0
    return any((folder / "results" / "smoke" / given["task"] / given["model"]).rglob("shard*.parquet"))


def disturb(lab: Lab, job: str, what: str, one: psutil.Process) -> bool:
    """Whether it happened: the job may have ended by itself just before."""
    if what == "requeue":
        lab.run("scontrol", "requeue", job)
        return True
    one.send_signal(signal.SIGSTOP)  # it hangs; SLURM wakes it before it ends it
    if what == "scancel":
        lab.run("scancel", job)
    else:
        lab.expire(job)
    wait_until(lambda: lab.state(job) not in ("RUNNING", "COMPLETING"), 120, f"the job is ended by {what}")
    return lab.state(job) == ENDED[what]


def disturb_all(lab: Lab, driver: subprocess.Popen, folder: Path, seconds: float) -> dict[str, str]:
    """Wait for the workflow and disturb it; what was done -> the job."""
    done: dict[str, str] = {}
    end = time.monotonic() + seconds
    for what, module in DISTURBED:
        while what not in done and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.3)
            for job in [one["id"] for one in lab.jobs() if one["state"] == "RUNNING"]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                    one = program(job, module)
                    if one is not None and under_way(one, folder) and disturb(lab, job, what, one):
                        done[what] = job
                        break
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=max(0, end - time.monotonic()))
    return done


# what Snakemake writes when the program of a rule begins and ends, inside of a job
STAMP = re.compile(
    r"^\[\w{3} (\w{3} +\d+ [\d:]{8} \d{4})\]\n(localrule tune:|Finished jobid: \d+ \(Rule: tune\))", re.MULTILINE
)


def seconds_around(job: dict[str, str], folder: Path) -> tuple[float, float] | None:
    """Seconds of a tuning job of SLURM before its program began and after it had ended."""
    log = next((folder / ".snakemake" / "slurm_logs" / "rule_tune").rglob(f"{job['id']}.log")).read_text()
    stamps = {what[:8]: datetime.strptime(when, "%b %d %H:%M:%S %Y") for when, what in reversed(STAMP.findall(log))}
    began, ended = (datetime.fromisoformat(job[name]) for name in ("started", "ended"))
    return (stamps["localrul"] - began).total_seconds(), (ended - stamps["Finished"]).total_seconds()


def overhead(lab: Lab, folder: Path, seconds: float, disturbed: set[str]) -> dict:
    """What SLURM and Snakemake in it add to a job, from jobs that nothing happened to."""
    jobs = lab.jobs()
    quiet = [j for j in jobs if j["state"] == "COMPLETED" and j["id"] not in disturbed and "rule_tune" in j["comment"]]
    before, after = zip(*(seconds_around(job, folder) for job in quiet), strict=True)
    both = [a + b for a, b in zip(before, after, strict=True)]
    mean = round(statistics.mean(both), 1)
    return {
        "seconds": round(seconds),
        "jobs": len(jobs),
        "jobs_measured": len(quiet),
        "seconds_added": {"median": statistics.median(both), "mean": mean, "max": max(both)},
        "before": {"median": statistics.median(before), "max": max(before)},
        "after": {"median": statistics.median(after), "max": max(after)},
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": GPUS,
        "load_average_15_minutes": round(os.getloadavg()[2], 1),
        "slurm": lab.run("sinfo", "--version"),
        "versions": {name: version(name) for name in ("snakemake", "snakemake-executor-plugin-slurm")},
    }  # fmt: skip


def record(figures: dict) -> None:
    """results/benchmarks/slurm.{json,md}."""
    write_json(ROOT / "results" / "benchmarks" / "slurm.json", figures)
    rows = {"added to a job": "seconds_added", "before its program begins": "before", "after its program ends": "after"}
    table = "\n".join(
        f"| {row} | {figures[name]['median']:.0f} | {figures[name]['max']:.0f} |" for row, name in rows.items()
    )
    made = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    paragraphs = [
        "# What a job of SLURM costs beside its program",
        "The smoke workflow through `workflow/profiles/slurm` on a SLURM of one node on loopback, three jobs disturbed "
        f"(scancel, time limit, requeue): {figures['jobs']} jobs of SLURM in {figures['seconds']} s on CPUs: "
        f"{figures['cpus']}, jobs with a (fake) GPU at a time: {figures['gpus']}. Of {figures['jobs_measured']} tuning "
        "jobs that nothing happened to:",
        f"| seconds | median | max |\n|:--|--:|--:|\n{table}",
        f"The mean is {figures['seconds_added']['mean']} s: two starts of Snakemake, one inside of the other. Times of "
        "SLURM and Snakemake are whole seconds. Snakemake asked after its jobs twice a second; by default the plugin "
        "lets 40 to 180 s pass between two questions, and a job that is done waits that long to be noticed. Load "
        f"average of 15 minutes: {figures['load_average_15_minutes']}.",
        f"`PSO_SLURM_RECORD=1 python -m pytest tests/test_slurm.py`; {figures['slurm']}, {made}.",
    ]
    with atomic(ROOT / "results" / "benchmarks" / "slurm.md") as part:
        part.write_text("\n\n".join(paragraphs) + "\n")


RESULTS = ("tables/*.csv", "tables/*.tex", "tables/*.md", "tables/*.diff.json", "claims.*", f"*/*/*/*/lora/{LORA_FILE}",
           f"*/*/*/*/*/lora/{LORA_FILE}")  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    base = folder / "results" / "smoke"
    return {str(path.relative_to(base)): path.read_bytes() for pattern in RESULTS for path in base.glob(pattern)}


def test_a_workflow_with_jobs_killed_gives_the_results_of_a_quiet_local_run(lab, smoke, tmp_path):
    began = time.time()
    target = () if WHOLE else ("table2",)
    driver = start(lab, ROOT / "workflow" / "Snakefile", tmp_path, *target, "--config", "scale=smoke")
    try:
        done = disturb_all(lab, driver, tmp_path, 3000)
    finally:
        said = finish(driver, tmp_path, 5)
    assert set(done) == {what for what, _ in DISTURBED}
    states = {one["id"]: one["state"] for one in lab.jobs()}
    assert states[done["requeue"]] == "COMPLETED"  # under its old number
    assert f"SLURM-job '{done['time limit']}' failed, SLURM status is: 'TIMEOUT'" in said
    logs = [path.read_text() for path in tmp_path.rglob("tune.log")]
    assert any("SIGTERM: stopped after update" in log and "continuing after update" in log for log in logs)
    local, ours = results(smoke), results(tmp_path)
    assert len(local) > 60 and {"tables/table2.csv", "claims.md"} <= set(local)
    of_table2 = {name for name in local if name.startswith(("tables/table2.", "preference/sdxl_turbo/"))}
    wanted = set(local) if WHOLE else of_table2
    assert len(wanted) > 10 and wanted <= set(ours) <= set(local)
    assert [name for name, content in ours.items() if content != local[name]] == []
    figures = overhead(lab, tmp_path, time.time() - began, set(done.values()))
    print(json.dumps(figures, indent=2))
    if WHOLE:
        record(figures)
