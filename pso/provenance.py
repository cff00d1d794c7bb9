"""Where results come from: atomic files, fingerprints of code, and the record beside every result.

Torch-free. Nothing here writes a host name, user name, token or absolute path.
"""

import ast
import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pandas", "pyarrow")
ROOT = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """Something the user can put right; the message is a sentence that says how."""


@contextlib.contextmanager
def sentences(program: str, status: int = 1) -> Iterator[None]:
    """Around a command's main: a UserError, or an OSError that nobody foresaw, becomes a sentence and the exit code."""
    try:
        yield
        return
    except UserError as error:
        said = f"{error}"
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        said = (
            f"could not read or write {what}{error.strerror or error}; make room or put the file right, "
            "then run the same command again."
        )
    if status == 1:
        sys.exit(f"{program}: {said}")  # Python's own way to print and to exit with 1
    print(f"{program}: {said}", file=sys.stderr)
    sys.exit(status)


def _write_errors() -> tuple[type[Exception], ...]:
    """What a writer raises when the disk is full; safetensors has an error of its own, looked up, not imported."""
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name only when it is complete and on disk.

    When writing fails (a full disk, say) the temporary file goes away and an old `path` stays. That of a writer that
    was killed goes away when `path` is next written.
    """
    path = Path(path)
    part = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = _temporary(path)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except _write_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"could not write {path}: {reason}; nothing half-written was left behind. "
            "Make room or make the folder writable, then run the same command again."
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file beside path, locked while its writer lives, and those without a writer removed."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        sweeping = _lock(folder)  # nobody looks between making and locking; some file systems have no such locks
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.part") if sweeping else ():
            with contextlib.suppress(OSError):
                _remove_if_nobodys(old)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        _lock(handle)
        return handle, Path(name)
    finally:
        os.close(folder)


def _remove_if_nobodys(part: Path) -> None:
    handle = os.open(part, os.O_RDWR)
    try:
        if _lock(handle, wait=False):
            part.unlink()
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = True) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n")


def read_json(path: Path, remedy: str = "delete it and run `snakemake --cores 2` again") -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # cut off, or no text at all
        raise UserError(f"{path} is no JSON ({error}); {remedy}.") from None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """Short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


# Plumbing: what it passes on stands in a rule's params, and it changes no number.
NOT_COUNTED = {
    *("pso", "pso.provenance", "pso.paths", "pso.config", "pso.checks", "pso.entries", "pso.runs", "pso.hub"),
    *("pso.strict", "pso.standin_entries", "pso.steps", "pso.params", "pso.trackers"),
}


def fingerprint(*modules: str) -> str:
    """Hash of the code of modules and of all that they import: of their `fingerprints`."""
    return digest(sorted(fingerprints(*modules).items()))


def fingerprints(*modules: str) -> dict[str, str | None]:
    """Module -> hash of its code: of modules, and of every module of this repository that they import, however deep.

    Comments and layout do not count, nor does the plumbing (NOT_COUNTED). `package.module:name` is the
    module of `name`. Of a module of the user's from elsewhere the one file counts, or its name if there is none (None).
    """
    found, todo = {}, [module.partition(":")[0] for module in modules]
    elsewhere = {name: _users_file(name) for name in todo if _source(name) is None}
    while todo:
        module = todo.pop()
        if module in found or module in NOT_COUNTED:
            continue
        found[module] = None
        if (path := _source(module) or elsewhere.get(module)) is not None:
            found[module], imported = _parsed(path.read_text())
            todo += [name for name in imported if _source(name) is not None]
    return dict(sorted(found.items()))


@functools.cache  # the workflow asks a hundred times about the same few files
def _parsed(code: str) -> tuple[str, frozenset[str]]:
    """Hash of a module without comments and layout, and the names that it imports."""
    tree = ast.parse(code)
    return digest(ast.dump(tree)), frozenset(_imported(tree))


def _users_file(module: str) -> Path | None:
    """The file of a module outside this repository, found as Python finds it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _source(module: str) -> Path | None:
    """The file of a module of this repository."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else None


def _imported(tree: ast.AST) -> set[str]:
    """Dotted names that may be modules; this repository has no relative imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def code_state() -> dict:
    """Commit, and the hash of what differs from it."""
    changes = _git("diff", "HEAD", "--", "*.py", "workflow")
    new = (_git("ls-files", "--others", "--exclude-standard", "--", "*.py", "workflow") or "").splitlines()
    added = [(name, sha256_of(ROOT / name)) for name in new]
    return {
        "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
        "dirty": digest([changes, added]) if changes or added else None,
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def hardware() -> dict:
    """CPU architecture and count, and the GPUs if torch is loaded and sees any."""
    found: dict = {"machine": platform.machine(), "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return found


class Meter:
    """Cost of a job since its process started (imports are most of a short one): seconds, peak memory, named counts.

    `earlier` is the cost of the sessions before this one, for a job that was interrupted and goes on.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.earlier: dict[str, float] = {}

    def cost(self) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        sums = {"wall_s": time.time() - psutil.Process().create_time(), "cpu_s": time.process_time(), **self.counts}
        peaks = {"peak_rss_gib": peak}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            peaks["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found = {k: v + self.earlier.get(k, 0) for k, v in sums.items()}
        found |= {k: max(v, self.earlier.get(k, 0)) for k, v in peaks.items()}
        return {k: round(v, 1 if k.endswith("_s") else 2) for k, v in found.items()}


def record(job: str, config: dict, inputs: list[dict], meter: Meter, **more: Any) -> dict:
    """The content of a run.json: what was asked, by which code, from what, on what, at what cost."""
    return {
        "schema_version": 1,
        "job": job,
        "config": config,
        "config_digest": digest(config),
        "code": code_state(),
        "inputs": inputs,
        "versions": versions(),
        "hardware": hardware(),
        "cost": meter.cost(),
        **more,
    }
