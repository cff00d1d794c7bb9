"""One thread per process, no network, and the smoke scale run once for every test that needs a hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

# the same examples in every run: whether `main` is green must not be a matter of luck
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}.items():
    os.environ[name] = value


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A command as a user would give it, with this interpreter first on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=3000)


def snakemake(
    *arguments: str, cwd: Path, scale: str = "smoke", settings=None, **environment: str
) -> subprocess.CompletedProcess:
    """The workflow on a folder of its own: `--directory` is where results/ appears."""
    given = []
    if settings is not None:
        given = ["--configfile", str(cwd / "settings.json")]
        (cwd / "settings.json").write_text(json.dumps(settings))
    return run(
        "snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--directory", str(cwd), "--cores", "2",
        *arguments, *given, "--config", f"scale={scale}", cwd=cwd, **environment,
    )  # fmt: skip


def pytest_collection_modifyitems(items):
    """Of several processes none may have the cluster's tests, which take longest, left at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name != "test_slurm.py")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A folder whose results/smoke the whole DAG has made: a new one, or the one that PSO_SMOKE names, which is brought
    up to date. Of several processes (pytest-xdist) the first makes it, and each works on a copy of its own."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = Path(os.environ.get("PSO_SMOKE") or (base.parent if several else base) / "smoke")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        done = snakemake(cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return shutil.copytree(folder, base / "smoke", symlinks=True) if several else folder


@pytest.fixture
def with_hub(smoke, tmp_path) -> Path:
    """An empty results folder that shares the smoke hub and its cache."""
    (tmp_path / "smoke").mkdir()
    for name in ("hub", "cache"):
        (tmp_path / "smoke" / name).symlink_to(smoke / "results" / "smoke" / name, target_is_directory=True)
    return tmp_path


def smoke_settings(**overrides) -> str:
    """--set for the smoke scale with nested overrides of its own entry."""
    return json.dumps({"scale": "smoke", "scales": {"smoke": overrides}})
