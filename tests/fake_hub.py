"""A hub of our own on this machine, as far as huggingface_hub 2.4 and GitHub's API ask; it can be told to fail.

Files in LFS are redirected to another host name, as the real hub does.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants

from pso import remote
from pso.config import OFFLINE_VARIABLE

API = "api"  # stands for a file's path where the question is about the repository


@dataclass
class Fault:
    """What is answered instead; `times` requests long, or always."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    times: int | None = None
    cut_after: int | None = None  # bytes of the file, then the connection is closed
    short: int | None = None  # so many bytes, as if that were all
    content: bytes | None = None  # instead of the file's
    pause: float = 0.0  # seconds before every 64 KiB


GATED = Fault(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."})
GATED_401 = Fault(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."})
UNKNOWN = Fault(401, {"X-Error-Message": "Invalid username or password."})  # the hub's word for: not there
NOT_FOUND = Fault(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
BAD_TOKEN = Fault(401, {"X-Error-Message": "Invalid credentials in Authorization header"})


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    newest: str = ""
    lfs: tuple[str, ...] = (".safetensors", ".bin", ".parquet", ".pt")
    gated: bool = False
    faults: dict[str, Fault] = field(default_factory=dict)  # path, or API

    def commit(self, files: dict[str, bytes], name: str | None = None) -> str:
        self.newest = name or hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[self.newest] = files
        return self.newest


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    start: int | None  # of its Range
    authorization: str | None
    host: str


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """`with FakeHub() as hub: hub.repo("owner/name").commit({"config.json": b"{}"})`."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.waits: list[float] = []  # of this process, see set_process
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def repo(self, name: str, kind: str = "model") -> Repo:
        """kind: model, dataset or github."""
        return self.repos.setdefault((kind, name), Repo())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home) -> dict[str, str]:
        """Of a command that takes this for the Hub and GitHub."""
        return {
            "HF_ENDPOINT": self.url,
            "PSO_BENCH_GITHUB_API": f"{self.url}/gh-api",
            "PSO_BENCH_GITHUB_RAW": f"{self.url}/gh-raw",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }

    def downloads(self) -> list[Request]:
        """Requests for the content of files."""
        return [r for r in self.requests if r.method == "GET" and ("/resolve/" in r.path or "/gh-raw/" in r.path)]


def set_process(monkeypatch, hub, home) -> None:
    """As if huggingface_hub had been imported with the fake hub's environment."""
    environment = hub.environment(home)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    for name in ("HF_TOKEN", "GITHUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    values |= {"HF_HUB_CACHE": str(home / "hub"), "HF_ASSETS_CACHE": str(home / "assets")}
    values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_XET": True}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(remote, "sleep", hub.waits.append)
    close_session()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = int(start[1]) if start else None
        token, host = self.headers.get("Authorization"), self.headers["Host"]
        self.hub.requests.append(Request(self.command, path, self.start, token, host))
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, **match.groupdict())
                return
        self.error(Fault(404))

    # ---- the hub ----

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        if (repo := self.asked_for(kind, name, API)) is None:
            return
        commit = revision or repo.newest
        if commit not in repo.commits:
            self.error(Fault(404, {"X-Error-Code": "RevisionNotFound"}))
            return
        siblings = []
        for path, content in repo.commits[commit].items():
            one = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if path.endswith(repo.lfs):
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(one)
        gated = "auto" if repo.gated else False
        self.json({"id": name, "sha": commit, "gated": gated, "private": False, "siblings": siblings})

    def access(self, kind: str, name: str) -> None:
        if (repo := self.asked_for(kind, name, "auth-check")) is not None:
            self.error(GATED) if repo.gated else self.json({})

    def resolve(self, name: str, commit: str, path: str, kind: str = "model") -> None:
        repo = self.asked_for(kind, name, path, cut=True)
        if repo is None:
            return
        content = repo.commits.get(commit, {}).get(path)
        if content is None:
            self.error(Fault(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}))
            return
        lfs = path.endswith(repo.lfs)
        etag = hashlib.sha256(content).hexdigest() if lfs else git_sha1(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if lfs:
            other = f"http://localhost:{self.server.server_port}/cdn/{kind}/{name}/{commit}/{path}"
            self.answer(302, b"", headers | {"Location": other, "X-Linked-Etag": f'"{etag}"'})
        else:
            self.content(repo, path, content, headers)

    def cdn(self, kind: str, name: str, commit: str, path: str) -> None:
        repo = self.hub.repos[(kind.removesuffix("s"), name)]
        self.content(repo, path, repo.commits[commit][path], {})

    # ---- GitHub ----

    def github_commit(self, name: str, reference: str) -> None:
        if (repo := self.asked_for("github", name, API)) is None:
            return
        found = [c for c in repo.commits if c.startswith(repo.newest if reference == "HEAD" else reference)]
        self.json({"sha": found[0]}) if found else self.error(Fault(422))

    def github_tree(self, name: str, commit: str) -> None:
        if (repo := self.asked_for("github", name, API)) is not None:
            files = repo.commits[commit]
            tree = [{"path": p, "type": "blob", "sha": git_sha1(c), "size": len(c)} for p, c in files.items()]
            self.json({"sha": commit, "tree": [{"path": "a folder", "type": "tree", "sha": "0"}, *tree]})

    def github_raw(self, name: str, commit: str, path: str) -> None:
        repo = self.asked_for("github", name, path, cut=True)
        if repo is not None:
            self.content(repo, path, repo.commits[commit][path], {})

    # ---- answers ----

    def asked_for(self, kind: str, name: str, path: str, cut: bool = False) -> Repo | None:
        """The repository, unless it is told to fail here. Faults of content come later."""
        kind = kind.removesuffix("s")
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            self.error(Fault(404) if kind == "github" else UNKNOWN)
            return None
        fault = repo.faults.get(path)
        if fault is None or fault.status == 200 or not self.due(fault):
            return repo
        self.error(fault)
        return None

    @staticmethod
    def due(fault: Fault) -> bool:
        if fault.times is not None:
            fault.times -= 1
        return fault.times is None or fault.times >= 0

    def content(self, repo: Repo, path: str, content: bytes, headers: dict[str, str]) -> None:
        fault = repo.faults.get(path)
        if fault is None or fault.status != 200 or not self.due(fault):
            fault = Fault()
        content = content if fault.content is None else fault.content
        content = content if fault.short is None else content[: fault.short]
        if self.start is not None and self.start >= len(content):
            self.error(Fault(416))
            return
        rest, status = content[self.start or 0 :], 200 if self.start is None else 206
        if fault.cut_after is None and not fault.pause:
            self.answer(status, rest, headers)
            return
        self.answer(status, rest, headers, body=False)
        for i in range(0, len(rest), 2**16):
            time.sleep(fault.pause)
            piece = rest[i : i + 2**16]
            left = len(rest) if fault.cut_after is None else max(0, fault.cut_after - (self.start or 0) - i)
            self.wfile.write(piece[:left])
            if left < len(piece):
                break
        self.close_connection = True

    def json(self, content: dict) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, fault: Fault) -> None:
        self.answer(fault.status, b"", fault.headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
OWNED = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (rf"/api/(?P<kind>models|datasets)/{OWNED}/auth-check", Handler.access),
    (rf"/api/(?P<kind>models|datasets)/{NAME}/revision/(?P<revision>[^/]+)", Handler.info),
    (rf"/api/(?P<kind>models|datasets)/{NAME}", Handler.info),
    (rf"/(?P<kind>datasets)/{NAME}/resolve/(?P<commit>[^/]+)/(?P<path>.+)", Handler.resolve),
    (rf"/{NAME}/resolve/(?P<commit>[^/]+)/(?P<path>.+)", Handler.resolve),
    (rf"/cdn/(?P<kind>\w+)/{NAME}/(?P<commit>[0-9a-f]{{40}})/(?P<path>.+)", Handler.cdn),
    (rf"/gh-api/repos/{OWNED}/commits/(?P<reference>\w+)", Handler.github_commit),
    (rf"/gh-api/repos/{OWNED}/git/trees/(?P<commit>\w+)", Handler.github_tree),
    (rf"/gh-raw/{OWNED}/(?P<commit>\w+)/(?P<path>.+)", Handler.github_raw),
]
