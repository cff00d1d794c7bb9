"""Stands on the PATH as `python` while tests watch the jobs of a workflow (tests/warm.py).

Says which process runs a job, by a datagram to SHIM_STARTS, then becomes it; where SHIM_WARM is set, the job is forked
from the warm process listening there instead, and this one waits for it and ends as it does. pso.launch, which without
GPUs does no more than become its program, is then left out.
"""

import array
import json
import os
import signal
import socket
import sys


def program(argv: list[str]) -> list[str]:
    """What a command line runs in the end, behind pso.launch."""
    return argv[argv.index("-m", 1) :] if argv[:2] == ["-m", "pso.launch"] else argv


def told(pid: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as starts:
        starts.sendto(json.dumps({"pid": pid, "argv": program(sys.argv[1:])}).encode(), os.environ["SHIM_STARTS"])


def hand_over(warm: str, argv: list[str], folder, environment: dict[str, str], files: list[int]) -> socket.socket:
    """A job for the warm process; its answers are the job's process id and, when it has ended, its wait status."""
    content = json.dumps({"argv": argv, "cwd": str(folder), "env": environment}).encode()
    line = socket.socket(socket.AF_UNIX)
    line.connect(warm)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    line.sendmsg([len(content).to_bytes(4, "big")], rights)
    line.sendall(content)
    return line


def main() -> None:
    warm, argv = os.environ.get("SHIM_WARM"), sys.argv[1:]
    if not warm or argv[:1] != ["-m"]:
        told(os.getpid())
        os.execv(os.environ["SHIM_PYTHON"], [os.environ["SHIM_PYTHON"], *argv])
    with (
        hand_over(warm, program(argv)[1:], os.getcwd(), dict(os.environ), [0, 1, 2]) as line,
        line.makefile() as answers,
    ):
        told(int(answers.readline()))
        status = int(answers.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
