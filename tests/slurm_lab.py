"""A real SLURM on this machine's loopback, for tests: munged, slurmctld and a slurmd for each node, with fake GPUs.

    python tests/slurm_lab.py up BASE      # then PATH=BASE/bin:$PATH
    python tests/slurm_lab.py down BASE
    python tests/slurm_lab.py snakemake ARGUMENTS     # Snakemake, asking after its jobs twice a second

Everything is in the folder BASE, which must be short and readable for all; root is not needed. Daemons run in the
foreground, so that their process ids are ours; BASE/pids.json keeps them with their start times, so that `down` works
from another process and never meets a number that was given away again.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil

PROGRAMS = ("srun", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct")  # the package has all
DAEMONS = ("munged", "slurmctld", "slurmd")
MARKER = "PSO_SLURM_LAB"  # in the environment of all that belongs to a lab; Snakemake drops some of SLURM_*
FREEZER = Path("/sys/fs/cgroup/freezer")
GPUS, CPUS = 2, 16  # of a node; they need not be there
KILL_WAIT_S = 10


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in (*DAEMONS, *PROGRAMS) if find(name) is None]


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until(condition, seconds: float, what: str, pause: float = 0.1):
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
    return value


class Lab:
    """A cluster: partitions cpu and gpu are on its first node, partition `all` on all of them."""

    def __init__(self, base: Path, nodes: int = 2, proctrack: str | None = None):
        self.base = Path(base).resolve()
        self.name = f"lab{zlib.crc32(str(self.base).encode()) % 10000}"  # cgroups are named after nodes
        self.nodes = [f"{self.name}n{k + 1}" for k in range(nodes)]
        frozen = os.geteuid() == 0 and os.access(FREEZER / "cgroup.procs", os.W_OK)
        self.proctrack = proctrack or ("cgroup" if frozen else "linuxproc")
        self.conf = self.base / "etc" / "slurm.conf"

    # ---- settings ----

    def _config(self) -> str:
        controller, *node_ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        base = self.base
        general = f"""
            ClusterName=lab
            SlurmctldHost={host}(127.0.0.1)
            SlurmUser={_user()}
            SlurmdUser={_user()}
            AuthType=auth/munge
            AuthInfo=socket={base}/munge/socket,cred_expire=5
            CredType=cred/munge
            CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
            SlurmctldPort={controller}
            StateSaveLocation={base}/state
            SlurmdSpoolDir={base}/spool/%n
            SlurmctldPidFile={base}/run/slurmctld.pid
            SlurmdPidFile={base}/run/slurmd.%n.pid
            SlurmctldLogFile={base}/log/slurmctld.log
            SlurmdLogFile={base}/log/slurmd.%n.log
            ProctrackType=proctrack/{self.proctrack}
            TaskPlugin=task/none
            MpiDefault=none
            SwitchType=switch/none
            SchedulerType=sched/backfill
            SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core_Memory
            DefMemPerCPU=100
            AccountingStorageType=accounting_storage/none
            JobAcctGatherType=jobacct_gather/none
            JobCompType=jobcomp/none
            MailProg=/bin/true
            ReturnToService=1
            SlurmdParameters=config_overrides
            SlurmdTimeout=10
            SlurmctldTimeout=10
            MessageTimeout=10
            KillWait={KILL_WAIT_S}
            MinJobAge=86400
            JobRequeue=1
            GresTypes=gpu
        """
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS} Sockets=1 CoresPerSocket={CPUS} ThreadsPerCore=1"
        node += f" RealMemory=1000000 Gres=gpu:h200:{GPUS} State=UNKNOWN"
        lines = [line.strip() for line in general.strip().splitlines()]
        lines += [f"NodeName={name} Port={port} {node}" for name, port in zip(self.nodes, node_ports, strict=True)]
        limits = "MaxTime=7-00:00:00 DefaultTime=00:10:00 State=UP"
        lines += [f"PartitionName={name} Nodes={self.nodes[0]} {limits}" for name in ("cpu", "gpu")]
        lines += [f"PartitionName=all Nodes={','.join(self.nodes)} {limits} Default=YES"]
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        for name in ("bin", "dev", "etc", "log", "munge", "run", "spool", "state"):
            (self.base / name).mkdir(parents=True)
        os.chmod(self.base, 0o755)  # munged: its socket must be within reach of all
        self.conf.write_text(self._config())
        devices = f"File={self.base}/dev/gpu[0-{GPUS - 1}]"
        (self.conf.parent / "gres.conf").write_text(
            "".join(f"NodeName={name} Name=gpu Type=h200 {devices}\n" for name in self.nodes)
        )
        (self.conf.parent / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            "ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
        )
        for k in range(GPUS):  # a character device each: null and zero
            device = self.base / "dev" / f"gpu{k}"
            if os.geteuid() == 0:
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3 + 2 * k))
            else:
                device.symlink_to(("/dev/null", "/dev/zero")[k])
        key = self.base / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        exports = "".join(f"export {name}={value}\n" for name, value in self.variables.items())
        for name in PROGRAMS:  # Snakemake's jobs lose SLURM_CONF on the way to their own srun
            wrapper = self.base / "bin" / name
            wrapper.write_text(f'#!/bin/sh\n{exports}exec {find(name)} "$@"\n')
            wrapper.chmod(0o755)

    # ---- up and down ----

    def up(self) -> "Lab":
        if (names := missing()) != []:
            raise FileNotFoundError(f"{', '.join(names)}: not installed; run tests/slurm_setup.sh as root.")
        self.down()
        try:
            self._write()
            self._start_all()
            wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), 20, "slurmctld answers")
            wait_until(self._idle, 20, "all nodes are idle")
        except BaseException:
            self.down(keep_logs=True)  # they say why
            raise
        return self

    def _start_all(self) -> None:
        munge = self.base / "munge"
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--num-threads=4", *options)
        wait_until((munge / "socket").exists, 10, "munged is up")
        self._start("slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in self.nodes:
            self._start("slurmd", "-D", "-N", name, "-f", str(self.conf))

    def _start(self, program: str, *options: str) -> None:
        output = open(self.base / "log" / f"{program}.out", "ab")  # noqa: SIM115 (the daemon's)
        daemon = subprocess.Popen(
            [find(program), *options], env={**os.environ, **self.variables}, cwd=self.base, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        output.close()
        known = self.known()
        known.append({"program": program, "pid": daemon.pid, "started": psutil.Process(daemon.pid).create_time()})
        (self.base / "pids.json").write_text(json.dumps(known))

    def known(self) -> list[dict]:
        file = self.base / "pids.json"
        return json.loads(file.read_text()) if file.exists() else []

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "all", "-o", "%N %T", check=False).split("\n")
        return sorted(states) == sorted(f"{name} idle" for name in self.nodes)

    def down(self, keep_logs: bool = False) -> None:
        """Daemons, nodes first, then what is left of jobs, then the folder."""
        for program in reversed(DAEMONS):
            of_program = [d for d in self.known() if d["program"] == program]
            end([p for d in of_program if (p := process(d["pid"], d["started"])) is not None])
        end(marked(self.base))  # slurmstepd outlives its slurmd on purpose
        wait_until(self._cgroups_gone, 20, "cgroups are empty")
        if not keep_logs and self.conf.exists():  # never a folder of something else
            shutil.rmtree(self.base)

    def _cgroups_gone(self) -> bool:
        """Remove those that are empty; a dead process counts until somebody has asked for its exit code."""
        for folder in sorted(FREEZER.glob(f"slurm_{self.name}n*/**/"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not list(FREEZER.glob(f"slurm_{self.name}n*"))

    # ---- use ----

    @property
    def variables(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf), MARKER: str(self.base)}

    @property
    def path(self) -> str:
        """PATH with this cluster's programs first."""
        return f"{self.base / 'bin'}:{os.environ['PATH']}"

    def run(self, program: str, *options: str, check: bool = True) -> str:
        done = subprocess.run([str(self.base / "bin" / program), *options], capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{program} {' '.join(options)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """Every job of this cluster, done or not; times in seconds since the epoch."""
        names = ("id", "state", "comment", "submitted", "started", "ended", "reason")
        lines = self.run("squeue", "-h", "--states=all", "-o", "%i|%T|%k|%V|%S|%e|%r").splitlines()
        return [dict(zip(names, line.split("|"), strict=True)) for line in lines]

    def state(self, job: str) -> str:
        return next((one["state"] for one in self.jobs() if one["id"] == job), "")

    def expire(self, job: str) -> None:
        """The time limit is reached now; slurmctld looks for such jobs every 30 s at the latest."""
        self.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")


def _user() -> str:
    return psutil.Process().username()


# ---- processes ----


def process(pid: int, started: float) -> psutil.Process | None:
    """The process of that number, if it is still the one that was started then."""
    try:
        found = psutil.Process(pid)
        return found if abs(found.create_time() - started) < 0.5 else None
    except psutil.NoSuchProcess:
        return None


def marked(base: Path) -> list[psutil.Process]:
    """Whatever carries a lab's marker in its environment; never this process nor those above it."""
    ours = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(OSError):  # gone, or another user's
            # as bytes: slurmstepd writes its title over the first variables, and psutil reads to the first empty one
            variables = Path(f"/proc/{one.pid}/environ").read_bytes().split(b"\0")
            if one.pid not in ours and f"{MARKER}={base}".encode() in variables:
                found.append(one)
    return found


def alive(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: list[psutil.Process]) -> None:
    """SIGTERM; what is there five seconds later gets SIGKILL (a slurmd without its slurmctld does not listen)."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(sign)
        late = time.monotonic() + 5
        while (processes := [one for one in processes if alive(one)]) and time.monotonic() < late:
            time.sleep(0.05)


# ---- Snakemake that asks often ----


def snakemake(arguments: list[str], pause: float = 0.5) -> None:
    """Snakemake itself; only the pause between two questions after the state of jobs is shorter than 40 to 180 s."""
    from snakemake import cli
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    async def sleep(self):
        await asyncio.sleep(min(pause, self.next_seconds_between_status_checks))

    RemoteExecutor.sleep = sleep
    cli.main(arguments)


def main() -> None:
    if sys.argv[1:2] == ["snakemake"]:
        snakemake(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["up", "down"])
    parser.add_argument("base", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--proctrack", choices=["cgroup", "linuxproc"])
    args = parser.parse_args()
    if not re.fullmatch(r"[\w./-]+", str(args.base.resolve())) or len(str(args.base.resolve())) > 60:
        sys.exit(f"{args.base}: give a short path without spaces.")
    lab = Lab(args.base, args.nodes, args.proctrack)
    lab.up() if args.do == "up" else lab.down()


if __name__ == "__main__":
    main()
