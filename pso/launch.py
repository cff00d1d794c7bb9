"""How a job of the workflow starts its program: on GPUs of its own, and where signals reach it. Torch-free.

    python -m pso.launch --gpus 1 --cpus 4 -m pso.tune --model sdxl_dmd2 --method pso_offline

One machine: the program replaces this process; with several GPUs pso.tune runs as one process for each (torchrun).
GPUs are taken by locks on files, which last as long as the program: never two jobs of ours on one GPU, whoever started
them, and a killed job frees its own. A CUDA_VISIBLE_DEVICES that is set says which there are to choose from.

SLURM: the program gets a step of its own, because under proctrack/cgroup SIGTERM (a time limit, pre-emption, scancel)
reaches only what slurmstepd itself started, and a rule's shell is not that. Several nodes, one torchrun on each: the
rule must be an mpi job for Snakemake's plugin; `workflow/profiles/slurm/config.yaml` says how it is declared.
"""

import argparse
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pso.provenance import UserError, sentences

MULTI_PROCESS = {"pso.tune"}
# torchrun passes on what it handles, and kills what has not saved and ended in time
TORCHRUN = ("-m", "torch.distributed.run", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
SHUTDOWN_TIMEOUT = "--shutdown-timeout=600"
# all else that SLURM says of the enclosing step would become an option of the new one
KEPT = {"SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST"}
WAIT_S = 2.0


@dataclass(frozen=True)
class Wanted:
    """A program, and on what: GPUs of all nodes together, CPUs of one node."""

    module: str
    arguments: tuple[str, ...] = ()
    gpus: int = 1
    nodes: int = 1
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.module not in MULTI_PROCESS:
            raise UserError(f"gpu={self.gpus}: {self.module} uses one GPU; give gpu=1 to this rule in --set-resources.")
        if self.nodes > 1 and (self.gpus < self.nodes or self.gpus % self.nodes):
            raise UserError(
                f"gpu={self.gpus}, nodes={self.nodes}: gpu counts the GPUs of all nodes; give a multiple of nodes."
            )


# ---- commands ----


def program(wanted: Wanted) -> list[str]:
    """On one machine: one process, or one for each GPU."""
    run = ["-m", wanted.module, *wanted.arguments]
    if wanted.gpus <= 1:
        return [sys.executable, *run]
    own = [sys.executable, *TORCHRUN, SHUTDOWN_TIMEOUT, "--standalone", f"--nproc-per-node={wanted.gpus}"]
    return [*own, *run]


def step(wanted: Wanted, devices: list[str], taken: list[str]) -> list[str]:
    """A SLURM step on one node, beside the one of the rule's shell. It has the job's GPUs; the program those taken."""
    srun = ["srun", "--overlap", "--input=none", "-N1", "-n1", f"-c{wanted.cpus}"]
    if devices:
        srun.append(f"--gpus={len(devices)}")
    if len(taken) < len(devices):
        srun += ["env", f"CUDA_VISIBLE_DEVICES={','.join(taken)}"]
    return [*srun, *program(wanted)]


def nodes_step(wanted: Wanted, job: str, host: str) -> list[str]:
    """One torchrun on each node; this process is on the first one, where they meet."""
    each = wanted.gpus // wanted.nodes
    srun = ["srun", "--input=none", f"-N{wanted.nodes}", f"-n{wanted.nodes}", "--ntasks-per-node=1", f"-c{wanted.cpus}"]
    srun += [f"--gres=gpu:{each}", "--kill-on-bad-exit=1"]
    meet = ["--rdzv-backend=c10d", f"--rdzv-id={job}", f"--rdzv-endpoint={host}:{20000 + int(job) % 20000}"]
    own = [sys.executable, *TORCHRUN, SHUTDOWN_TIMEOUT, f"--nnodes={wanted.nodes}", f"--nproc-per-node={each}", *meet]
    return [*srun, *own, "-m", wanted.module, *wanted.arguments]


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    prefixes = ("SLURM_", "SRUN_", "SBATCH_")
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(prefixes)}


def cpus_of(job: str, wanted: Wanted, environment: Mapping[str, str]) -> Wanted:
    """With the CPU cores that the job has for a task: a rule knows only its threads, which are one for each process."""
    said = environment.get("SLURM_CPUS_PER_TASK")
    if said is None and shutil.which("squeue", path=environment.get("PATH")):  # an mpi job does not say it
        asked = ["squeue", "-h", "-j", job, "-O", "cpus-per-task"]
        said = subprocess.run(asked, env=dict(environment), capture_output=True, text=True).stdout.strip()
    return replace(wanted, cpus=max(wanted.cpus, int(said) if said and said.isdecimal() else 0))


# ---- GPUs ----


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that may be used, without torch."""
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in given.split(",")]
        valid = names[: names.index("-1")] if "-1" in names else names  # CUDA reads no further
        return [name for name in valid if name not in ("", "NoDevFiles")]
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return []
    listed = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(listed, env=dict(environment), capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def lock_folder(environment: Mapping[str, str]) -> Path:
    """The user's own; under SLURM the job's, because each job counts its GPUs from 0 and no other has them."""
    name = f"pso-gpus-{os.getuid()}"
    return Path(tempfile.gettempdir()) / (f"{name}-job{job}" if (job := environment.get("SLURM_JOB_ID")) else name)


def locked(path: Path, wait: bool = False) -> int | None:
    """An open file with an exclusive lock, which what is executed in this process inherits; None if another has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    os.set_inheritable(handle, True)
    return handle


def take(count: int, devices: list[str], folder: Path) -> list[str]:
    """Names of that many GPUs that nobody else has. Who waits stands in a queue: few do not overtake many."""
    if count > len(devices):
        raise UserError(
            f"gpu={count}: there {'is' if len(devices) == 1 else 'are'} {len(devices)} here ({', '.join(devices)}); "
            f"give at most gpu={len(devices)} in --set-resources, or free others in CUDA_VISIBLE_DEVICES."
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    taken: list[str] = []
    queue = locked(folder / "queue", wait=True)
    told = False
    while True:
        for name in devices:
            if len(taken) < count and name not in taken and locked(folder / re.sub(r"[^\w.-]", "_", name)) is not None:
                taken.append(name)
        if len(taken) == count:
            os.close(queue)
            return [name for name in devices if name in taken]
        if not told:
            print(f"launch: waiting for {count} of the GPUs {', '.join(devices)}", file=sys.stderr, flush=True)
            told = True
        time.sleep(WAIT_S)


# ---- main ----


def command(wanted: Wanted, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What is executed in the place of this process, and with which environment."""
    job = environment.get("SLURM_JOB_ID") if shutil.which("srun", path=environment.get("PATH")) else None
    if job is not None:
        wanted = cpus_of(job, wanted, environment)
    if wanted.nodes > 1:
        if job is None:
            how = "use --workflow-profile workflow/profiles/slurm, or nodes=1"
            raise UserError(f"nodes={wanted.nodes}: several nodes need SLURM; {how}.")
        return nodes_step(wanted, job, socket.gethostname()), step_environment(environment)
    devices = visible_devices(environment) if wanted.gpus else []
    taken = take(wanted.gpus, devices, lock_folder(environment)) if devices else []
    if job is not None:
        return step(wanted, devices, taken), step_environment(environment)
    chosen = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if taken else {}
    return program(wanted), {**environment, **chosen}


def parsed(words: list[str]) -> Wanted:
    parser = argparse.ArgumentParser(
        prog="python -m pso.launch", usage="%(prog)s [--gpus N] [--nodes K] [--cpus C] -m MODULE ARGUMENTS"
    )
    parser.add_argument("--gpus", type=int, default=1, help="of all nodes together")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="of one node")
    end = words.index("-m") if "-m" in words else len(words)
    options = parser.parse_args(words[:end])
    if not (rest := words[end + 1 :]):
        parser.error("-m MODULE is missing")
    return Wanted(rest[0], tuple(rest[1:]), **vars(options))


def main() -> None:
    words, environment = command(parsed(sys.argv[1:]), os.environ)
    sys.stderr.flush()
    os.execvpe(words[0], words, environment)


if __name__ == "__main__":
    with sentences("launch"):
        main()
