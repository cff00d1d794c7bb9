"""Files of a published repository into the cache: whole and checked, or not at all. Torch-free.

The cache is huggingface_hub's, so that what it has is not fetched again and what is fetched here it finds:
blobs/{hash} and snapshots/{commit}/{path}, a link to it. Its own downloader starts a file anew after every
interruption, which costs hours with files of 10 GB; here the beginning stays as blobs/{hash}.part.
"""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, hf_raise_for_status

from pso import remote
from pso.config import users_offline
from pso.provenance import UserError
from pso.remote import LONGEST_WAIT, TRIES, File, Refusal, Repository, Snapshot, passing, wait_before

WORKERS = 4  # files at once
CHUNK = 2**20
NEWS_EVERY = 60  # seconds between two lines about one file


def cached(repository: Repository, snapshot: Snapshot, file: File) -> bool:
    """Whether a file lies in the cache at its size; its content is checked when it is fetched."""
    path = _pointer(repository, snapshot, file)
    return path.is_file() and path.stat().st_size == file.size


def missing_bytes(repository: Repository, snapshot: Snapshot, files: list[File]) -> int:
    """What is still to be fetched; the beginnings of files count as there."""
    todo = [file for file in files if not cached(repository, snapshot, file)]
    parts = {file.blob: _part(repository, file) for file in todo}
    return sum(file.size - (parts[file.blob].stat().st_size if parts[file.blob].is_file() else 0) for file in todo)


def fetch_all(
    repository: Repository, snapshot: Snapshot, files: list[File], say: Callable[[str], None]
) -> dict[str, tuple[Path, str]]:
    """Path in the repository -> its place in the cache, and its sha256."""
    check_room(repository.store, missing_bytes(repository, snapshot, files), repository.name)
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = {f.path: pool.submit(_Download(repository, snapshot, f, say, stop).run) for f in files}
        try:
            done, _ = wait(tasks.values(), return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {path: task.result() for path, task in tasks.items()}


def check_room(folder: Path, num_bytes: int, name: str) -> None:
    free = free_bytes(folder)
    if num_bytes > free:
        raise UserError(
            f"{name} needs {num_bytes / 1e9:.1f} GB more and the disk of the cache has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to a larger disk, then run the same command again."
        )


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def link(target: Path, name: Path) -> None:
    """A link in place of whatever had its name."""
    name.parent.mkdir(parents=True, exist_ok=True)
    new = name.with_name(f".{name.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, name)


def _pointer(repository: Repository, snapshot: Snapshot, file: File) -> Path:
    return repository.store / "snapshots" / snapshot.commit / file.path


def _part(repository: Repository, file: File) -> Path:
    return repository.store / "blobs" / f"{file.blob}.part"


@dataclass(frozen=True)
class _Download:
    """One file's way into the cache."""

    repository: Repository
    snapshot: Snapshot
    file: File
    say: Callable[[str], None]
    stop: threading.Event

    def run(self) -> tuple[Path, str]:
        """Its place and its sha256; only one process at a time fetches the same."""
        file, store = self.file, self.repository.store
        pointer, blob = _pointer(self.repository, self.snapshot, file), store / "blobs" / file.blob
        lock = store.parent / ".locks" / store.name / f"{file.blob}.lock"  # huggingface_hub's own
        for path in (pointer, blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if pointer.is_file():
                return pointer, self.check(pointer, blob)
            digest = self.check(blob) if blob.is_file() else self.fetch(blob)
            link(Path(os.path.relpath(blob, pointer.parent)), pointer)
        return pointer, digest

    def fetch(self, blob: Path) -> str:
        part, start = _part(self.repository, self.file), time.monotonic()
        before = part.stat().st_size if part.is_file() else 0
        if before:
            self.say(f"{self.file.path}: goes on after {_share(before, self.file.size)}")
        self.download(part)
        digest = self.check(part)
        os.replace(part, blob)
        speed = (self.file.size - before) / 1e6 / max(time.monotonic() - start, 1e-3)
        self.say(f"{self.file.path}: {self.file.size / 1e6:.1f} MB, {speed:.0f} MB/s")
        return digest

    def download(self, part: Path) -> None:
        """The whole file in `part`, from where it had stopped. Attempts count anew whenever it has become longer."""
        attempt, longest, error = 0, -1, None
        part.touch()
        while (size := part.stat().st_size) < self.file.size:
            if users_offline():
                raise self.repository.offline(self.file.path)
            attempt = 0 if size > longest else attempt + 1
            if attempt:
                self.wait_or_give_up(attempt, size, error)
            longest, error = max(longest, size), None
            try:
                self.stream(part)
            except (HfHubHTTPError, httpx2.TransportError) as found:
                error = found
            except OSError as found:
                raise _disk_error(found, self.file) from found

    def wait_or_give_up(self, attempt: int, size: int, error: Exception | None) -> None:
        pause = 2.0 ** (attempt - 1) if error is None else wait_before(error, attempt - 1)
        again = attempt < TRIES and pause <= LONGEST_WAIT and (error is None or passing(error))
        if again:
            remote.sleep(pause)
        elif isinstance(error, HfHubHTTPError):
            raise self.repository.refusal(error, self.file.path) from error
        else:
            raise Refusal(
                "unreachable",
                f"{self.file.path} of {self.repository.name} ends after {size} of {self.file.size} bytes (the "
                "connection is cut, or the copy truncated); run the same command again, which goes on from there.",
            ) from error

    def stream(self, part: Path) -> None:
        """One request for what is missing."""
        have = part.stat().st_size
        headers = {**self.repository.headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        address = self.repository.address(self.snapshot.commit, self.file.path)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", address, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            if answer.status_code == 416:  # there is nothing behind what we have: it was something else
                part.write_bytes(b"")
                return
            hf_raise_for_status(answer)
            with open(part, "ab" if answer.status_code == 206 else "wb") as out:
                self.write(answer, out)

    def write(self, answer: httpx2.Response, out: BinaryIO) -> None:
        told = time.monotonic()
        for chunk in answer.iter_bytes():  # as they come: of a larger chunk the beginning would be lost
            out.write(chunk)
            if self.stop.is_set():
                raise UserError(f"{self.file.path} of {self.repository.name} was stopped; what was fetched is kept.")
            if time.monotonic() - told > NEWS_EVERY:
                told = time.monotonic()
                self.say(f"{self.file.path}: {_share(out.tell(), self.file.size)}")
        out.flush()
        os.fsync(out.fileno())

    def check(self, path: Path, *others: Path) -> str:
        """The sha256 of a file that is what its commit and its entry say; another one is removed."""
        name, commit = self.repository.name, self.snapshot.commit[:7]
        size, sha256, git = hashes(path, git=len(self.file.blob) == 40)
        content = git or sha256
        pinned = self.repository.entry.sha256.get(self.file.path)
        if size != self.file.size:
            wrong = f"{size} bytes; expected {self.file.size}"
        elif content != self.file.blob:
            wrong = f"hash {content}; expected {self.file.blob}, which commit {commit} has"
        elif pinned not in (None, sha256):
            wrong = f"sha256 {sha256}; expected {pinned}, which repositories.{name}.sha256 names"
        else:
            return sha256
        for each in (path, *others):
            each.unlink(missing_ok=True)
        raise UserError(
            f"{self.file.path} of {name} has {wrong}. It was removed; run the same command again, and if it says so "
            "again, do not use the repository."
        )


def _share(size: int, of: int) -> str:
    return f"{size / 1e6:.1f} of {of / 1e6:.1f} MB"


def _disk_error(error: OSError, file: File) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    room = "make room, or set HF_HOME to a larger disk" if full else "make the cache writable"
    return UserError(
        f"could not write {file.path} into the cache: {error.strerror or error}; {room}, then run the same command "
        "again, which goes on from there."
    )


def hashes(path: Path, git: bool) -> tuple[int, str, str | None]:
    """Size, sha256, and, where asked for, the sha1 under which git keeps the content."""
    size = path.stat().st_size
    found = [hashlib.sha256(), *([hashlib.sha1(b"blob %d\0" % size)] if git else [])]
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            for one in found:
                one.update(chunk)
    return size, found[0].hexdigest(), found[1].hexdigest() if git else None
