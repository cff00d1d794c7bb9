"""One process at a time in a folder of results. Torch-free.

A lock is a file that its holder keeps locked for the kernel (flock), which is over the moment the holder dies, however
it dies. Some cluster file systems keep such locks on one machine only, so the holder also beats: it writes a new number
every few seconds. A lock of another machine that does not beat is stale. Nothing in the file names machine or user.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pso.provenance import UserError, digest

log = logging.getLogger("tune")
BEAT_S = 5.0
SILENT_S = 30.0  # so long without a beat, and a holder on another machine is gone
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Hold lock files, made here and removed at the end; a sentence if another process holds one."""
    with contextlib.ExitStack() as held:
        for path in paths:
            held.enter_context(_locked(Path(path)))
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle, by_kernel = _open(path)
    try:
        _refuse_if_beating(handle, path, by_kernel)
        who = {"machine": _machine(), "holder": secrets.token_hex(4)}
        _beat(handle, who, 1)
        if not by_kernel:  # of two that began at once, the last to write is in
            time.sleep(BEAT_S)
            if _read(handle).get("holder") != who["holder"]:
                raise _refusal(path)
        with _beats(handle, who):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether the kernel locked it. One that its holder removed meanwhile is no lock, and made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle, by_kernel = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _refusal(path) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise
            by_kernel = False
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle, by_kernel
        os.close(handle)


def _refusal(path: Path) -> UserError:
    return UserError(
        f"{path.parent} is in use by another process, which holds {path.name}; wait until it ends, or end it, and run "
        "the same command again."
    )


def _refuse_if_beating(handle: int, path: Path, by_kernel: bool) -> None:
    """A file whose holder did not end well. On this machine the kernel has said that it is gone; else it is gone if it
    is silent."""
    before = _read(handle)
    if not before or (by_kernel and before.get("machine") == _machine()):
        return
    log.warning("%s was left by a process that may be alive elsewhere; listening for %g s", path, SILENT_S)
    end = time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(BEAT_S, max(end - time.monotonic(), 0)))
        if _read(handle) != before:
            raise _refusal(path)
    log.warning("%s: its holder is gone; this process goes on in its place", path)


def _read(handle: int) -> dict:
    try:
        found = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """Told apart from other machines, and from this one before it was started anew, without its name."""
    with contextlib.suppress(OSError):
        return digest(Path("/proc/sys/kernel/random/boot_id").read_text())
    return digest(os.uname().nodename)


def _beat(handle: int, who: dict, number: int) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the run here
        os.pwrite(handle, json.dumps({**who, "beat": number}).ljust(200).encode(), 0)


@contextlib.contextmanager
def _beats(handle: int, who: dict) -> Iterator[None]:
    done = threading.Event()

    def go_on() -> None:
        number = 1
        while not done.wait(BEAT_S):
            number += 1
            _beat(handle, who, number)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
