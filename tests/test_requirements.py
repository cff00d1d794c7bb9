"""requirements.lock: exact public pins, torch first, within the bounds of pyproject.toml; conda installs the same."""

import re
import tomllib

import pytest
import yaml
from documents import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()


def test_the_lock_holds_exact_pins_alone():
    pin = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?==[0-9][\w.]*( ; [^;#]+)?")
    assert [line for line in LOCK if not pin.fullmatch(line)] == []


@pytest.mark.parametrize("part", ["--hash", "://", "+cpu", "+cu", "file:", " @ ", "-e ", "--index", "-f "])
def test_the_lock_holds_no_address_hash_or_local_build(part):
    assert [line for line in LOCK if part in line] == []


def test_the_lock_has_torch_first_and_leaves_its_builds_to_pip():
    names = [canonicalize_name(Requirement(line).name) for line in LOCK]
    assert names[0] == "torch" and "torchvision" not in names
    assert [n for n in names if n.startswith(("nvidia", "triton", "cuda"))] == []


def test_the_lock_pins_what_the_project_asks_for_within_its_bounds():
    pins = {}
    for line in LOCK:
        requirement = Requirement(line)
        pins.setdefault(canonicalize_name(requirement.name), []).append(next(iter(requirement.specifier)).version)
    for wanted in map(Requirement, PROJECT["dependencies"]):
        found = pins.get(canonicalize_name(wanted.name), [])
        assert found and all(Version(v) in wanted.specifier for v in found), f"{wanted}: {found}"


def test_the_conda_environment_installs_the_locked_torch():
    environment = yaml.safe_load((ROOT / "envs" / "pso-bench.yaml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert [line for line in pip if line.startswith("torch==")] == [LOCK[0]]
