"""How jobs are started: which command, on which GPUs, and that signals and exit codes come through."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import snakemake

from pso import launch
from pso.launch import Wanted, command, parsed, take, visible_devices
from pso.provenance import UserError

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "workflow" / "profiles"
BARE = {"PATH": "/nowhere"}


def in_slurm(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a rule's shell in a job of SLURM."""
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "srun").chmod(0o755)
    inherited = {"SLURM_JOB_ID": "20007", "SLURM_CONF": "c", "SLURM_CPU_BIND": "q", "SRUN_DEBUG": "3", "HOME": "h"}
    return {"PATH": str(folder), **inherited, **more}


# ---- commands ----


def test_without_slurm_and_gpus_the_program_is_all_there_is():
    words, environment = command(parsed(["--gpus", "1", "-m", "pso.tune", "--seed", "3", "-m", "x"]), BARE)
    assert words == [sys.executable, "-m", "pso.tune", "--seed", "3", "-m", "x"]
    assert environment == BARE


def test_several_gpus_are_as_many_processes():
    words, _ = command(Wanted("pso.tune", ("--seed", "3"), gpus=4), BARE)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4"} < set(words)
    assert words[-4:] == ["-m", "pso.tune", "--seed", "3"]


def test_torchrun_passes_on_both_signals_and_waits_for_what_saves():
    words, _ = command(Wanted("pso.tune", gpus=2), BARE)
    from torch.distributed.run import parse_args

    options = parse_args(words[3:])
    assert {"SIGTERM", "SIGUSR1"} <= set(options.signals_to_handle.split(","))
    assert options.shutdown_timeout >= 300 and options.module and options.training_script == "pso.tune"


def test_in_slurm_the_program_gets_a_step_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words, environment = command(Wanted("eval.score", cpus=4), in_slurm(tmp_path, CUDA_VISIBLE_DEVICES="0"))
    step = ["srun", "--overlap", "--input=none", "-N1", "-n1", "-c4", "--gpus=1"]
    assert words == [*step, sys.executable, "-m", "eval.score"]
    assert "SLURM_CPU_BIND" not in environment and "SRUN_DEBUG" not in environment
    assert environment["SLURM_JOB_ID"] == "20007" and environment["SLURM_CONF"] == "c" and environment["HOME"] == "h"


def test_a_step_has_all_cores_of_its_job(tmp_path, monkeypatch):
    words, _ = command(Wanted("eval.score"), in_slurm(tmp_path, SLURM_CPUS_PER_TASK="6"))
    assert "-c6" in words
    here = in_slurm(tmp_path)
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$*" = "-h -j 20007 -O cpus-per-task" ] && echo "8   "\n')
    (tmp_path / "squeue").chmod(0o755)
    words, _ = command(Wanted("pso.tune", gpus=2, nodes=2), here)
    assert "-c8" in words


def test_in_slurm_without_gpus_none_is_asked_for(tmp_path):
    words, _ = command(Wanted("eval.score"), in_slurm(tmp_path))
    assert not any(word.startswith("--gpus") for word in words)


def test_a_job_that_runs_beside_another_in_one_allocation_gets_one_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    here = in_slurm(tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    chosen = []
    for _ in range(2):
        words, _ = command(Wanted("eval.score"), here)
        assert "--gpus=2" in words  # the step's; the program sees those that `env` names
        chosen.append(words[words.index("env") + 1])
    assert sorted(chosen) == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]


def test_several_nodes_are_one_torchrun_each_that_meet_on_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "first")
    words, environment = command(Wanted("pso.tune", ("--seed", "3"), 8, 2, 16), in_slurm(tmp_path))
    own = words.index(sys.executable)
    assert {"-N2", "-n2", "--ntasks-per-node=1", "-c16", "--gres=gpu:4", "--kill-on-bad-exit=1"} < set(words[:own])
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-id=20007", "--rdzv-endpoint=first:20007"} < set(words[own:])
    assert words[-4:] == ["-m", "pso.tune", "--seed", "3"] and "SLURM_CPU_BIND" not in environment


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"module": "eval.score", "gpus": 2}, r"^gpu=2: eval.score uses one GPU; give gpu=1 to this rule"),
        (
            {"module": "pso.tune", "gpus": 3, "nodes": 2},
            r"^gpu=3, nodes=2: gpu counts the GPUs of all nodes; give a mult",
        ),
        ({"module": "pso.tune", "gpus": 1, "nodes": 2}, r"^gpu=1, nodes=2: gpu counts the GPUs of all nodes"),
    ],
)
def test_what_cannot_be_is_a_sentence(wanted, sentence):
    with pytest.raises(UserError, match=sentence):
        Wanted(**wanted)


def test_several_nodes_without_slurm_are_a_sentence():
    with pytest.raises(UserError, match=r"^nodes=2: several nodes need SLURM; use --workflow-profile"):
        command(Wanted("pso.tune", gpus=2, nodes=2), BARE)


# ---- GPUs ----


@pytest.mark.parametrize(
    ("given", "found"),
    [("0,1", ["0", "1"]), (" 3 ", ["3"]), ("", []), ("2,-1,3", ["2"]), ("NoDevFiles", []), ("GPU-a,1", ["GPU-a", "1"])],
)
def test_the_variable_says_which_gpus_there_are(given, found):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": given}) == found


@pytest.mark.parametrize(("code", "found"), [(0, ["0", "1"]), (9, [])])
def test_without_it_nvidia_smi_says(tmp_path, code, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho 0\necho 1\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_devices({"PATH": f"{tmp_path}:{os.environ['PATH']}"}) == found


def test_more_gpus_than_there_are_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"^gpu=3: there are 2 here \(0, 1\); give at most gpu=2 in --set-resources"):
        take(3, ["0", "1"], tmp_path)


PROGRAM = """
import os, signal, sys, time
def end(sign, frame):
    print("heard", sign, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def started(tmp_path):
    """Starts the launcher with a program that tells its GPUs, as a rule does it: in a shell, through a pipe."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tmp").mkdir()
    running = []

    def start(gpus: int, seconds: float = 60, devices: str = "4,7") -> subprocess.Popen:
        line = f"set -euo pipefail; {sys.executable} -m pso.launch --gpus {gpus} -m program {seconds} 2>&1 | tee log"
        given = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "TMPDIR": str(tmp_path / "tmp"), "CUDA_VISIBLE_DEVICES": devices}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        one = subprocess.Popen(
            ["bash", "-c", line], cwd=tmp_path, env={**environment, **given}, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        running.append(one)
        return one

    yield start
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.stdout.close()
        one.wait()


def first_line(one: subprocess.Popen) -> list[str]:
    return one.stdout.readline().split()


def test_two_jobs_at_once_get_different_gpus_and_a_killed_one_frees_its_own(started):
    first, second = started(1), started(1)
    (pid, one), (other_pid, other) = first_line(first), first_line(second)
    assert {one, other} == {"4", "7"}
    third = started(1)
    assert first_line(third) == ["launch:", "waiting", "for", "1", "of", "the", "GPUs", "4,", "7"]
    os.kill(int(pid), signal.SIGKILL)
    assert first_line(third)[1] == one
    os.kill(int(other_pid), signal.SIGKILL)


def test_a_signal_reaches_the_program_and_its_exit_code_the_shell(started):
    one = started(1)
    pid, _ = first_line(one)
    os.kill(int(pid), signal.SIGTERM)
    assert first_line(one) == ["heard", "15"]
    assert one.wait(timeout=30) == 75


def test_a_program_without_gpus_has_no_such_variable_changed(started):
    assert first_line(started(1, devices=""))[1:] == []  # empty, as it was


def test_who_wants_several_is_not_overtaken(tmp_path, monkeypatch):
    held = launch.locked(tmp_path / "0")
    monkeypatch.setattr("time.sleep", lambda seconds: os.close(held))  # the holder ends while we wait
    assert take(2, ["0", "1"], tmp_path) == ["0", "1"]
    assert launch.locked(tmp_path / "queue") is not None  # the next may look
    assert launch.locked(tmp_path / "0") is None and launch.locked(tmp_path / "1") is None


# ---- profiles and rules ----


def test_the_profile_of_slurm_is_as_the_plugin_needs_it():
    profile = yaml.safe_load((PROFILES / "slurm" / "config.yaml").read_text())
    assert profile["executor"] == "slurm" and profile["retries"] >= 1 and profile["slurm-requeue"] is True
    assert profile["slurm-status-command"] == "squeue" and profile["slurm-status-attempts"] >= 60
    assert (PROFILES / "slurm" / profile["slurm-partition-config"]).exists()
    assert "attempt" in profile["default-resources"]["runtime"] and "attempt" in profile["default-resources"]["mem_mb"]
    assert "nodes" not in profile["default-resources"]  # would be summed over the members of a group
    assert "--signal=TERM@" in profile["set-resources"]["tune"]["slurm_extra"]


def test_the_profile_that_is_always_read_says_nothing_of_resources():
    profile = yaml.safe_load((PROFILES / "default" / "config.yaml").read_text())
    assert not {"default-resources", "set-resources", "executor", "jobs", "cores"} & set(profile)


RULES = sorted([ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")])


def rules() -> dict[str, str]:
    """Name -> text of every rule that has a name in its head."""
    found = {}
    for path in RULES:
        for block in path.read_text().split("\n    rule ") if "\n    rule " in path.read_text() else []:
            found[block.partition(":")[0]] = block
        for block in ("\n" + path.read_text()).split("\nrule ")[1:]:
            found[block.partition(":")[0]] = block
    return found


def test_no_rule_retries_by_itself():
    """Snakemake inside of a job would obey it as well: up to ten runs instead of three."""
    assert len(rules()) > 30
    assert [name for name, text in rules().items() if "\n    retries" in text] == []


def test_a_rule_with_a_gpu_is_started_by_the_launcher_on_one_node():
    launcher = '"python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"'
    with_gpu = {name for name, text in rules().items() if "gpu=" in text}
    assert {"tune", "generate", "score", "latents"} <= with_gpu
    for name in with_gpu:
        assert launcher in rules()[name] and "nodes=1," in rules()[name], name


def test_groups_and_settings_of_the_profile_name_rules_that_exist():
    profile = yaml.safe_load((PROFILES / "slurm" / "config.yaml").read_text())
    gpus = {name for name, text in rules().items() if "gpu=" in text}
    assert set(profile["set-resources"]) == gpus  # so that all have what is set for GPUs
    named = {*profile["groups"], *profile["set-resources"]}
    assert "set-threads" not in profile  # Snakemake gives a job OMP_NUM_THREADS=threads
    published = {f"hub_published_{name}" for name in ("dpo", "mapo", "spo")}
    assert named - published <= set(rules())
    assert set(profile["group-components"]) <= set(profile["groups"].values())


def test_several_gpus_leave_finished_runs_as_they_are(smoke):
    done = snakemake("-n", "--set-resources", "tune:gpu=4", "--set-threads", "tune=4", cwd=smoke)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stdout[-2000:]
