"""A Hub of our own that takes pushes, as far as huggingface_hub 2.4 asks; it counts every request, and can refuse."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class PushHub:
    """`with PushHub() as hub`: hub.files holds what was committed, hub.requests every method and path."""

    def __init__(self):
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.repos: dict[str, bool] = {}  # -> private
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.refuse: dict[str, tuple[int, dict]] = {}  # part of a path -> status and answer
        self.hang_up: list[str] = []  # parts of paths that get no answer
        self.gitignore: set[str] = set()  # files that the repository's own keeps out, unless a push gives another
        self.ignored: set[str] = set()  # files that are kept out whatever a push gives
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "PushHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: PushHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        self.hub.requests.append((self.command, self.path))
        self.hub.tokens.add(self.headers.get("Authorization"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if any(part in self.path for part in self.hub.hang_up):
            self.close_connection = True
            return None
        for part, (status, content) in self.hub.refuse.items():
            if part in self.path:
                return self.answer(content, status)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, self.path):
                return answer(self, **match.groupdict())
        return self.answer({}, 404)

    do_GET = do_POST = do_PUT = handle_any

    def create(self) -> None:
        told = json.loads(self.body)
        name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = told.get("private", told.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def info(self, name: str) -> None:
        if name not in self.hub.repos:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": name, "private": self.hub.repos[name], "siblings": []})

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name: str) -> None:
        told, modes = json.loads(self.body), {True: "lfs", False: "regular"}
        kept_out = self.hub.ignored | (set() if "gitIgnore" in told else self.hub.gitignore)
        paths = [file["path"] for file in told["files"]]
        files = [
            {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": p in kept_out} for p in paths
        ]
        self.answer({"files": files})

    def xet_token(self, name: str) -> None:
        """Where hf_xet uploads to: here, where nothing of it is known."""
        self.answer({"casUrl": self.hub.url, "exp": int(time.time()) + 3600, "accessToken": "of-the-storage"})

    def batch(self, name: str) -> None:
        found = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/storage/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": found})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer({})

    def commit(self, name: str) -> None:
        files = self.hub.files.setdefault(name, {})
        for line in map(json.loads, self.body.splitlines()):
            told = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(told["summary"])
            elif line["key"] == "file":
                files[told["path"]] = base64.b64decode(told["content"])
            else:
                files[told["path"]] = self.hub.blobs[told["oid"]]
        self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}"})

    def answer(self, content: dict, status: int = 200) -> None:
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)


NAME = r"(?P<name>[^/]+/[^/]+?)"
ROUTES = [
    ("/api/repos/create", Handler.create),
    ("/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}/preupload/main", Handler.preupload),
    (rf"/api/models/{NAME}/xet-write-token/main", Handler.xet_token),
    (rf"/api/models/{NAME}/commit/main", Handler.commit),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/storage/(?P<oid>[0-9a-f]{64})", Handler.upload),
]
