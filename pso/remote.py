"""A published repository: its commit, its files, or why it gives none, as one sentence. Torch-free.

Hugging Face is asked through huggingface_hub, whose variables (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE ...)
count as everywhere; GitHub through its API and its raw files, at PSO_BENCH_GITHUB_API and PSO_BENCH_GITHUB_RAW, where
those are set. What a commit holds never changes: its list of files is kept beside the cache, so that a second look
needs no network.
"""

import contextlib
import email.utils
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from pso.config import users_offline
from pso.entries import Config, RepositoryEntry
from pso.lockfile import read_lock
from pso.provenance import UserError, write_json
from pso.replacing import replacement
from pso.steps import published_entry, slug

constants.HF_HUB_OFFLINE = users_offline()  # the workflow sets HF_HUB_OFFLINE for jobs that must not go online

TRIES = 6  # with 1, 2, 4, 8 and 16 s between them
LONGEST_WAIT = 300  # seconds; a server that asks for more is left alone
PASSING = (408, 429, 500, 502, 503, 504)
ASKING_TIMEOUT = 30
sleep = time.sleep
T = TypeVar("T")


class Refusal(UserError):
    """Why a repository gives no files; `state` is the word for it in the doctor's table."""

    def __init__(self, state: str, message: str):
        super().__init__(message)
        self.state = state


@dataclass(frozen=True)
class File:
    """One file of a commit. `blob` is its name in the cache: sha256 where it lies in LFS, else git's sha1."""

    path: str
    size: int
    blob: str


@dataclass(frozen=True)
class Snapshot:
    """A commit and all its files."""

    commit: str
    files: tuple[File, ...]  # or, if not `whole`, those that huggingface_hub has cached
    gated: bool = False  # files are for accounts that accepted its terms
    whole: bool = True


@dataclass(frozen=True)
class Repository:
    name: str
    entry: RepositoryEntry
    config: Config

    @classmethod
    def of(cls, config: Config, name: str) -> "Repository":
        return cls(name, published_entry(config, name), config)

    @property
    def github(self) -> bool:
        return self.entry.source == "github"

    @property
    def kind(self) -> str:
        """As huggingface_hub calls it."""
        return "dataset" if self.entry.source == "hub_dataset" else "model"

    @property
    def page(self) -> str:
        """For people."""
        if self.github:
            return f"https://github.com/{self.name}"
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def notes(self) -> Path:
        """Where its lists of files are kept: huggingface_hub's folder for what other programs cache."""
        return Path(constants.HF_ASSETS_CACHE) / "pso-bench" / self.entry.source / slug(self.name)

    @property
    def store(self) -> Path:
        """Its folder of blobs/ and snapshots/: in huggingface_hub's own cache, or, of GitHub, one like it."""
        if self.github:
            return self.notes
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    def revision(self, lock: Path) -> str | None:
        """The commit in its entry, else the one in the lock file."""
        return self.entry.revision or read_lock(lock).get(self.name)

    # ---- asking ----

    def ask(self, revision: str | None, tries: int = TRIES) -> Snapshot:
        """What the server says of a commit, or of the newest one."""
        if users_offline():
            raise self._no_revision() if revision is None else self.offline()
        try:
            snapshot = asked(lambda: self._of_github(revision) if self.github else self._of_hub(revision), tries)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            raise self.refusal(error) from error
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal(
                "unreachable",
                f"{self.name}: {self.host} gave no answer of a repository; are HF_ENDPOINT, PSO_BENCH_GITHUB_API and "
                "the proxy right? Correct them, then run the same command again.",
            ) from error
        write_json(self._note(snapshot.commit), [asdict(file) for file in snapshot.files])
        return snapshot

    def kept(self, revision: str | None) -> Snapshot | None:
        """A commit without asking: its kept list of files, or what huggingface_hub has cached of it."""
        if revision is None:
            return None
        for note in sorted(self.notes.glob(f"{revision}*.json")):  # a revision may be the beginning of a commit
            with contextlib.suppress(ValueError, TypeError):  # a damaged one is written anew
                return Snapshot(note.stem, tuple(File(**file) for file in json.loads(note.read_text())))
        for folder in sorted(self.store.glob(f"snapshots/{revision}*")) if users_offline() else ():
            paths = sorted(path for path in folder.rglob("*") if path.is_symlink() and path.exists())
            found = [File(str(p.relative_to(folder)), p.stat().st_size, Path(os.readlink(p)).name) for p in paths]
            return Snapshot(folder.name, tuple(found), whole=False)
        return None

    def check_access(self) -> None:
        """Whether files of a gated repository would be given."""
        try:
            asked(lambda: HfApi().auth_check(self.name, repo_type=self.kind))
        except (HfHubHTTPError, httpx2.TransportError) as error:
            raise self.refusal(error) from error

    def _note(self, commit: str) -> Path:
        return self.notes / f"{commit}.json"

    def _of_hub(self, revision: str | None) -> Snapshot:
        info = HfApi().repo_info(
            self.name, repo_type=self.kind, revision=revision, files_metadata=True, timeout=ASKING_TIMEOUT
        )
        files = [
            File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else str(one.blob_id)) for one in info.siblings
        ]
        return Snapshot(str(info.sha), tuple(files), gated=bool(info.gated))

    def _of_github(self, revision: str | None) -> Snapshot:
        token = os.environ.get("GITHUB_TOKEN", "").strip()  # a line end would be no header
        headers = {"Authorization": f"Bearer {token}"} if token else {}

        def get(path: str) -> dict:
            url = f"{github('API')}/repos/{self.name}/{path}"
            answer = get_session().get(url, headers=headers, timeout=ASKING_TIMEOUT, follow_redirects=True)
            hf_raise_for_status(answer)
            return answer.json()

        commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None
        commit = commit or get(f"commits/{revision or 'HEAD'}")["sha"]
        tree = get(f"git/trees/{commit}?recursive=1")
        if tree.get("truncated"):
            raise UserError(
                f"{self.name} has more files than GitHub lists; expected a repository of less than 100,000."
            )
        files = [File(one["path"], one["size"], one["sha"]) for one in tree["tree"] if one["type"] == "blob"]
        return Snapshot(commit, tuple(files))

    # ---- files ----

    def address(self, commit: str, path: str) -> str:
        if self.github:
            return f"{github('RAW')}/{self.name}/{commit}/{quote(path)}"
        return hf_hub_url(self.name, path, repo_type=self.kind, revision=commit)

    def headers(self) -> dict[str, str]:
        """The token goes to the hub alone; a redirect to another host drops it."""
        return {} if self.github else build_hf_headers()

    # ---- why not ----

    def _no_revision(self) -> Refusal:
        return Refusal(
            "offline: not cached",
            f"{self.name} has no revision, neither in repositories.yaml nor in hub.lock.json, and HF_HUB_OFFLINE "
            "is set; unset it to look the newest commit up, or write a cached commit into the entry's revision.",
        )

    def offline(self, path: str | None = None) -> Refusal:
        """Something of a commit is not cached; `path`: a file, or a glob."""
        what = f"{path} of {self.name}" if path else self.name
        return Refusal(
            "offline: not cached",
            f"{what} is not in the cache and HF_HUB_OFFLINE is set; unset it, or fetch the files on a machine "
            "with a network and the same HF_HOME, then run the same command again.",
        )

    @property
    def host(self) -> str:
        return urlsplit(github("API") if self.github else constants.ENDPOINT).hostname or "the server"

    def refusal(self, error: HfHubHTTPError | httpx2.TransportError, path: str | None = None) -> Refusal:
        """An error of the network or the server as one sentence; `path` is the file that was asked for."""
        what = f"{path} of {self.name}" if path else self.name
        if not isinstance(error, HfHubHTTPError):
            return Refusal(
                "unreachable",
                f"{what}: no answer from {self.host} ({type(error).__name__}); is there a network, a proxy, a right "
                "HF_ENDPOINT? Run the same command again, or set HF_HUB_OFFLINE=1 to work from the cache.",
            )
        answer = error.response
        status, code = answer.status_code, answer.headers.get("X-Error-Code")
        if status == 429 or (self.github and status == 403 and answer.headers.get("X-RateLimit-Remaining") == "0"):
            token = "GITHUB_TOKEN" if self.github else "HF_TOKEN"
            message = (
                f"{what}: {self.host} answers {status}, too many requests; wait, or set {token}, which allows more "
                "of them, then run the same command again."
            )
            return Refusal("unreachable", message)
        if code == "GatedRepo" or (status == 403 and not self.github):
            return Refusal("gated", self._gated(what, status))
        if status == 401 and "Invalid" in answer.headers.get("X-Error-Message", "") + (error.server_message or ""):
            token = "GITHUB_TOKEN" if self.github else "HF_TOKEN, or in the token file,"
            if self.github or _has_token():
                message = f"{what}: {self.host} answers 401, the token in {token} is not valid; replace or remove it."
                return Refusal("gated", message)
        if status in (401, 404, 410, 451):
            return Refusal("gone", self._gone(what, status, code, path))
        return Refusal(
            "unreachable",
            f"{what}: {self.host} answers {status}; run the same command again later, what was fetched is kept.",
        )

    def _gated(self, what: str, status: int) -> str:
        other = "of your account" if not _has_token() else "of the account that accepted them: yours has no access"
        return (
            f"{what} is gated (status {status}): accept its terms at {self.page}, set HF_TOKEN to a token {other}, "
            "then run the same command again."
        )

    def _gone(self, what: str, status: int, code: str | None, path: str | None) -> str:
        if code == "RevisionNotFound":
            return (
                f"{self.name} has no such commit (status {status}); correct repositories.{self.name}.revision, or "
                "remove its line from hub.lock.json to look the newest one up."
            )
        if path is not None and code == "EntryNotFound":
            return f"{what} is not there at that commit (status {status}); correct repositories.{self.name}.files."
        known = f" ({self.entry.gone})" if self.entry.gone else ""
        words = "it is gone, renamed or private" if not self.github else "it is gone or renamed"
        return f"{what}: {self.host} answers {status}, {words}{known}; {self.instead()}."

    def instead(self) -> str:
        """How to take a copy, which is the user's decision."""
        mirror = next(iter(self.entry.mirrors), None)
        if mirror is None:
            return "no copy is known: put one that you have into the configuration in its place"
        others = f" (or {', '.join(self.entry.mirrors[1:])})" if self.entry.mirrors[1:] else ""
        settings = " ".join(f"'{one}'" for one in replacement(self.config, self.name, mirror))
        added = f"--config scale={self.config.scale} {settings}".rstrip()
        return f"a copy was seen at {mirror}{others}; to take it, add {added}"


def github(what: str) -> str:
    """GitHub's address for the API, or for RAW files."""
    defaults = {"API": "https://api.github.com", "RAW": "https://raw.githubusercontent.com"}
    return os.environ.get(f"PSO_BENCH_GITHUB_{what}", defaults[what]).rstrip("/")


def _has_token() -> bool:
    return bool(os.environ.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).is_file()


# ---- again, after a while ----


def passing(error: Exception) -> bool:
    """Whether it may go away by itself."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)


def wait_before(error: Exception, attempt: int) -> float:
    """Seconds before the next attempt: what the server asks for, else twice as long each time."""
    asked_for = None
    if isinstance(error, HfHubHTTPError):
        headers = error.response.headers
        asked_for = _seconds(headers.get("Retry-After"))
        limit = parse_ratelimit_headers(headers)
        if asked_for is None and limit is not None and limit.remaining == 0:
            asked_for = limit.reset_in_seconds
    return 2.0**attempt if asked_for is None else asked_for


def _seconds(text: str | None) -> float | None:
    """A Retry-After header: seconds, or a date."""
    if text is None or text.strip().isdigit():
        return None if text is None else float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def asked(call: Callable[[], T], tries: int = TRIES) -> T:
    """The call's answer, after further attempts where it fails in a way that passes."""
    for attempt in range(tries):
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError) as error:
            wait = wait_before(error, attempt)
            if not passing(error) or attempt == tries - 1 or wait > LONGEST_WAIT:
                raise
            sleep(wait)
    raise AssertionError("there is a first attempt")


def snapshot_of(repository: Repository, lock: Path) -> Snapshot:
    """The snapshot at the repository's revision, or, where it has none, at its newest commit."""
    revision = repository.revision(lock)
    return repository.kept(revision) or repository.ask(revision)
