"""A process that has imported torch and its like, from which jobs are forked: hundreds of them in a test.

What is forked has its own process id, arguments, environment and standard files, runs the module that its command
names as `python -m` does, and ends as Python ends. Only the imports are shared.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shim import hand_over

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (  # what jobs import, and no job's own module, which is run anew each time
    *("pso.models", "pso.sources", "pso.stepwise", "pso.checkpoint", "pso.journal", "pso.probe", "pso.training_data"),
    *("baselines.spo", "pso.pso_offline", "pso.pso_online", "eval.pictures", "eval.scoring", "eval.score_folder"),
    *("eval.metrics.pick_score", "eval.metrics.clip_score", "eval.metrics.aesthetic_score", "eval.metrics.sharpness"),
    *("eval.run_notes", "eval.scores", "eval.stats", "eval.untuned", "jinja2", "pandas.io.formats.style", "tabulate"),
    *("accelerate", "peft", "transformers.models.clip.modeling_clip", "diffusers.loaders"),
    *("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "pyarrow.parquet", "scipy.stats"),
)


# ---- the warm process ----


def serve(path: str) -> dict:
    """Forks a job for every connection; returns in the job's process, with what it is to do."""
    for name in IMPORTED:
        importlib.import_module(name)
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    os.set_blocking(readable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        server.bind(f"{path}.new")
        server.listen(64)
        os.rename(f"{path}.new", path)
        selector.register(server, selectors.EVENT_READ)
        selector.register(readable, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)  # at its end whoever started this is gone
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    line, _ = server.accept()
                    job = receive(line)
                    if (pid := os.fork()) == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for inherited in (line, *waiting.values()):
                            inherited.close()
                        os.close(readable)
                        os.close(writable)
                        return job
                    for file in job["files"]:
                        os.close(file)
                    waiting[pid] = line
                    answer(line, pid)
                elif key.fileobj is sys.stdin:
                    sys.exit()
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(readable, 4096)
                    ended(waiting)


def receive(line: socket.socket) -> dict:
    """The job and its standard files."""
    head, files, _, _ = socket.recv_fds(line, 4, 3)
    size, content = int.from_bytes(head, "big"), b""
    while len(content) < size:
        content += line.recv(size - len(content))
    return json.loads(content) | {"files": files}


def answer(line: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked may have been killed
        line.sendall(f"{number}\n".encode())


def ended(waiting: dict[int, socket.socket]) -> None:
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with waiting.pop(pid) as line:
            answer(line, status)


def become(job: dict) -> None:
    """The job that was asked for."""
    for target, file in enumerate(job["files"]):
        os.dup2(file, target)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    if "FAULTS_FOLDER" in os.environ:  # tests/faults.c, preloaded
        ctypes.CDLL(None).faults_arm()
    runpy.run_module(job["argv"][0], run_name="__main__", alter_sys=True)


# ---- for tests ----


def run(python: str, argv: list[str], work: Path, **environment: str) -> tuple[int, str]:
    """Exit code of a job (as of subprocess) and what it printed."""
    with tempfile.TemporaryFile() as said, open(os.devnull) as nothing:
        files = [nothing.fileno(), said.fileno(), said.fileno()]
        with hand_over(python, argv, work, {**os.environ, **environment}, files) as line, line.makefile() as answers:
            answers.readline()
            status = int(answers.readline())
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode()


@contextlib.contextmanager
def warm(**environment: str) -> Iterator[str]:
    """The socket of a warm process, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="pso") as folder:
        path = Path(folder) / "warm"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(path)]
        process = subprocess.Popen(command, env=env | environment, cwd=ROOT, stdin=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 120
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the warm process did not start")
                time.sleep(0.05)
            yield str(path)
        finally:
            process.stdin.close()
            process.wait()


def main() -> None:
    become(serve(sys.argv[1]))


if __name__ == "__main__":
    main()
