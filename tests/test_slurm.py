"""The workflow on a real SLURM (tests/slurm_lab.py) through its `slurm` profile, with jobs killed on the way.

tests/slurm_setup.sh installs what is needed. PSO_SLURM_RECORD=1 writes results/benchmarks/slurm.{json,md}.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from slurm_lab import Lab, missing, wait_until

from pso.paths import LORA_FILE, run_dir

pytestmark = pytest.mark.slurm
PROFILE = ROOT / "workflow" / "profiles" / "slurm"
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
            if one.cmdline()[1:3] == ["-m", module] and one.environ().get("SLURM_JOB_ID") == job:
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


# ---- the whole workflow ----

# what is done to the first job of a program that has got somewhere, in this order
DISTURBED = (("scancel", "pso.tune"), ("time limit", "pso.tune"), ("requeue", "eval.generate"))


def under_way(one: psutil.Process, folder: Path) -> bool:
    """Whether the process has written something that a killed one could lose."""
    words = one.cmdline()
    given = {name.removeprefix("--"): value for name, value in zip(words, words[1:], strict=False) if name[:2] == "--"}
    if "method" in given:
        run = folder / run_dir("smoke", given["task"], given["model"], given["method"], given["seed"])
        return (run / "train.jsonl").exists() and (run / "train.jsonl").stat().st_size > 0
    return any((folder / "results" / "smoke" / given["task"] / given["model"]).rglob("shard*.parquet"))


def disturb(lab: Lab, job: str, what: str, one: psutil.Process) -> None:
    if what == "scancel":
        lab.run("scancel", job)
    elif what == "requeue":
        lab.run("scontrol", "requeue", job)
    else:
        one.send_signal(signal.SIGSTOP)  # it hangs; SLURM wakes it before it ends it
        lab.expire(job)


def disturb_all(lab: Lab, driver: subprocess.Popen, folder: Path, seconds: float) -> dict[str, str]:
    """Wait for the workflow and disturb it; what was done -> the job."""
    done: dict[str, str] = {}
    end = time.monotonic() + seconds
    while driver.poll() is None and time.monotonic() < end:
        for job in [one["id"] for one in lab.jobs() if one["state"] == "RUNNING"]:
            left = [(what, module) for what, module in DISTURBED if what not in done]
            if not left or job in done.values():
                continue
            what, module = left[0]
            one = program(job, module)
            if one is not None and under_way(one, folder):
                disturb(lab, job, what, one)
                done[what] = job
        time.sleep(0.3)
    return done


RESULTS = ("tables/*.csv", "tables/*.tex", "tables/*.md", "tables/*.diff.json", "claims.*", f"*/*/*/*/lora/{LORA_FILE}",
           f"*/*/*/*/*/lora/{LORA_FILE}")  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    base = folder / "results" / "smoke"
    return {str(path.relative_to(base)): path.read_bytes() for pattern in RESULTS for path in base.glob(pattern)}


def test_the_whole_workflow_with_jobs_killed_gives_the_results_of_a_quiet_local_run(lab, smoke, tmp_path):
    began = time.time()
    driver = start(lab, ROOT / "workflow" / "Snakefile", tmp_path, "--config", "scale=smoke")
    try:
        done = disturb_all(lab, driver, tmp_path, 3000)
    finally:
        said = finish(driver, tmp_path, 5)
    assert set(done) == {what for what, _ in DISTURBED}
    states = {one["id"]: one["state"] for one in lab.jobs()}
    assert [states[done[what]] for what, _ in DISTURBED] == ["CANCELLED", "TIMEOUT", "COMPLETED"]
    assert f"SLURM-job '{done['time limit']}' failed, SLURM status is: 'TIMEOUT'" in said
    local = results(smoke)
    assert len(local) > 60 and {"tables/table2.csv", "claims.md"} <= set(local)
    assert set(results(tmp_path)) == set(local)
    assert [name for name, content in results(tmp_path).items() if content != local[name]] == []
    figures = overhead(lab, tmp_path, time.time() - began, set(done.values()))
    print(json.dumps(figures, indent=2))
    if os.environ.get("PSO_SLURM_RECORD"):
        record(figures)
