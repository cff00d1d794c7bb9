"""Writes that fail: a drawn sample of tests/faults.py, and the library that makes them fail."""

import os
import shutil
import subprocess
import sys

import pytest
from faults import JOBS, OLD, SHARED, Stage, inject, library, partial
from same import made
from warm import warm

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: tests/faults.c cannot be built")


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    return library(tmp_path_factory.mktemp("faults"))


def test_no_write_that_fails_leaves_a_partial_file(smoke, preloaded, tmp_path):
    with warm(LD_PRELOAD=str(preloaded)) as python:
        *_, found = inject(python, tmp_path.resolve(), (smoke / "results/smoke").resolve(), list(JOBS), 3, 0, 2)
    assert found.problems == []
    assert set(found.cases) == set(JOBS) and all(found.cases.values())
    assert {"open", "write", "fsync", "rename"} <= set(found.calls["tune"])


# ---- the library ----

WRITER = """
import os, sys
folder = sys.argv[1]
try:
    with open(folder + "/a", "wb", buffering=0) as file:
        print(file.write(b"12345678"))
        print(file.write(b"9"))
        os.fsync(file.fileno())
    os.mkdir(folder + "/b")
    os.rename(folder + "/a", folder + "/b/a")
except OSError as error:
    print(error.errno)
"""
CALLS = ["open /in/a", "write /in/a", "write /in/a", "fsync /in/a", "mkdir /in/b", "rename /in/b/a"]
ENOSPC, EIO = "28", "5"


def write(preloaded, tmp_path, at: int, kind: str) -> tuple[list[str], list[str]]:
    """What the writer prints, and the calls that were numbered."""
    (tmp_path / "in").mkdir()
    told = {"FAULTS_FOLDER": str(tmp_path), "FAULTS_TRACE": str(tmp_path / "trace"), "FAULTS_AT": str(at)}
    env = {**os.environ, **told, "FAULTS_KIND": kind, "LD_PRELOAD": str(preloaded)}
    done = subprocess.run([sys.executable, "-c", WRITER, tmp_path / "in"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), (tmp_path / "trace").read_text().splitlines()


@pytest.mark.parametrize(
    ("at", "kind", "printed", "calls"),
    [
        (0, "eio", ["8", "1"], 6),
        (1, "enospc", [ENOSPC], 1),
        (2, "eio", [EIO], 2),
        (3, "enospc", ["8", ENOSPC], 3),
        (2, "short", ["4", ENOSPC], 3),
        (2, "partial", ["4", "1"], 6),
        (4, "eio", ["8", "1", EIO], 4),
        (5, "enospc", ["8", "1", ENOSPC], 5),
        (6, "eio", ["8", "1", EIO], 6),
    ],
)
def test_the_call_that_is_asked_for_fails_as_asked(preloaded, tmp_path, at, kind, printed, calls):
    assert write(preloaded, tmp_path, at, kind) == (printed, CALLS[:calls])


def test_elsewhere_nothing_fails(preloaded, tmp_path):
    (tmp_path / "in").mkdir()
    told = {"FAULTS_FOLDER": str(tmp_path / "i"), "FAULTS_AT": "1", "FAULTS_KIND": "enospc"}
    env = {**os.environ, **told, "LD_PRELOAD": str(preloaded)}
    subprocess.run([sys.executable, "-c", WRITER, tmp_path / "in"], env=env, check=True)
    assert (tmp_path / "in/b/a").read_bytes() == b"123456789"


# ---- what counts as partial ----


@pytest.fixture
def stage(tmp_path):
    """A job that writes a table, a log and a record over nothing."""
    run = tmp_path / "after/results/smoke/run"
    run.mkdir(parents=True)
    for name, text in {"table.md": "| 1 |\n", "train.jsonl": "1\n2\n", "run.json": '{"cost": 1, "seed": 0}'}.items():
        (run / name).write_text(text)
    (tmp_path / "before/results/smoke").mkdir(parents=True)
    return Stage("tune", tmp_path / "before", tmp_path / "after", [])


@pytest.mark.parametrize(
    ("name", "text", "bad"),
    [
        ("table.md", "| 1 |\n", False),
        ("table.md", OLD.decode(), False),
        ("table.md", "| 1", True),
        ("table.md", "", True),
        (".table.md.x.part", "| 1", False),
        ("train.jsonl", "1\n", False),
        ("train.jsonl", "", False),
        ("train.jsonl", "1\n2", True),
        ("run.json", '{"cost": 2, "seed": 0}', False),
        ("run.json", '{"cost": 2, "se', True),
        ("state/update0000002/progress.json", "{}", True),
    ],
)
def test_a_file_is_whole_as_before_or_absent(stage, tmp_path, name, text, bad):
    path = tmp_path / "work/results/smoke/run" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert partial(tmp_path / "work", stage) == ([f"run/{name}"] if bad else [])
    assert len(made(tmp_path / "work/results/smoke", SHARED)) == 1
