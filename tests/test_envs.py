"""Environments of stages and containers: the versions of the lock, nothing that is missing, nothing secret."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layers import METRICS, TORCH_FREE

ENVS = ROOT / "envs"
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
LISTS = ("driver.txt", "score.txt")
CONDA = {"pso-bench.yaml": "../requirements.lock", "score.yaml": "score.txt", "driver.yaml": "driver.txt"}
RECIPES = ("Dockerfile", "pso-bench.def")
OWN = {"pso-bench", "setuptools", "pip"}
# imports modules where only the distributions of a list seem to be installed
BLOCK = """
import importlib, sys
from importlib import metadata
allowed = set(sys.argv[1].split(","))
owners = metadata.packages_distributions()
clean = lambda name: name.lower().replace("_", "-").replace(".", "-")

class Only:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        found = {clean(d) for d in owners.get(name.partition(".")[0], [])}
        if found and not found & allowed:
            return None
        return next((s for f in self.finders if (s := f.find_spec(name, path, target)) is not None), None)

    def find_distributions(self, context=metadata.DistributionFinder.Context()):
        for finder in self.finders:
            for found in getattr(finder, "find_distributions", lambda _: ())(context):
                if clean(found.metadata["Name"]) in allowed:
                    yield found

sys.meta_path[:] = [Only()]
for module in sys.argv[2:]:
    importlib.import_module(module)
print("imported")
"""


def names(listed):
    return {canonicalize_name(Requirement(line).name) for line in (ENVS / listed).read_text().splitlines()}


def pip_of(environment):
    (found,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    return found


# ---- lists ----


@pytest.mark.parametrize("listed", LISTS)
def test_every_line_is_a_line_of_the_lock(listed):
    lines = (ENVS / listed).read_text().splitlines()
    assert len(lines) > 40 and len(lines) == len(set(lines))
    # by version: what a package is wanted for on which platform differs with who asks for it
    pinned = {line.partition(" ;")[0] for line in LOCK}
    assert not {line.partition(" ;")[0] for line in lines} - pinned


@pytest.mark.parametrize("listed", LISTS)
def test_all_that_a_package_requires_is_listed_too(listed):
    """As in the lock, what torch alone requires is left to pip, which takes the packages of the chosen build."""
    found, locked = names(listed), {canonicalize_name(Requirement(line).name) for line in LOCK}
    here = {canonicalize_name(dist.metadata["Name"]) for dist in metadata.distributions()}
    for name in sorted(found & here - {"torch"}):
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted = canonicalize_name(requirement.name)
                assert wanted in found | {"setuptools"} or wanted not in locked, f"{name} requires {wanted}"


def test_the_driver_is_light_and_can_start_jobs():
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "tokenizers", "datasets", "safetensors"}
    assert not names("driver.txt") & heavy
    assert {"snakemake", "snakemake-executor-plugin-slurm", "pydantic", "pandas"} <= names("driver.txt")
    assert "torch" in names("score.txt") and "snakemake" not in names("score.txt")


@pytest.mark.parametrize(
    ("listed", "modules"),
    [
        ("driver.txt", [*TORCH_FREE, "snakemake.cli", "snakemake_executor_plugin_slurm"]),
        ("score.txt", ["eval.score", *METRICS]),
    ],
)
def test_what_is_imported_is_listed(listed, modules):
    allowed = sorted(names(listed) | OWN)
    if "torch" in allowed:  # its own
        allowed += ["sympy", "mpmath", "networkx"]
    command = [sys.executable, "-c", BLOCK, ",".join(allowed), *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "imported", done.stderr[-2000:]


def test_a_list_that_lacks_something_is_noticed():
    allowed = sorted((names("driver.txt") | OWN) - {"pandas"})
    command = [sys.executable, "-c", BLOCK, ",".join(allowed), "eval.tables"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "No module named 'pandas'" in done.stderr


def test_make_lock_writes_the_lists():
    makefile = (ROOT / "Makefile").read_text()
    for listed in LISTS:
        assert re.search(rf"--only-group {listed.removesuffix('.txt')}.*> envs/{listed}$", makefile, re.M)


# ---- conda ----


@pytest.mark.parametrize("name", CONDA)
def test_conda_gives_python_and_pip_gives_the_locked_versions(name):
    environment = yaml.safe_load((ENVS / name).read_text())
    assert environment["channels"] == ["conda-forge"]
    assert [d for d in environment["dependencies"] if isinstance(d, str)] == ["python=3.12", "pip"]
    *first, listed = pip_of(environment)
    assert listed == f"-r {CONDA[name]}" and (ENVS / CONDA[name]).is_file()
    assert first == ([] if name == "driver.yaml" else [LOCK[0]])


RULE = re.compile(r"^ *rule(?: (\w+))?:.*?(?=^ *rule(?: \w+)?:|\Z)", re.M | re.S)


def test_every_rule_names_the_environment_of_its_module():
    seen = set()
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        for match in RULE.finditer(path.read_text()):
            modules = re.findall(r"\b((?:pso|eval|baselines)\.[\w.]+) ", match[0].partition("shell:")[2])
            conda = re.findall(r'"../../envs/(\S+)"', match[0])
            if not modules:
                assert not conda, f"{path.name}: {match[1]}"
                continue
            module, seen = modules[-1], seen | set(conda)
            light = module in TORCH_FREE and module != "pso.estimate"  # which counts with torch where it has to
            expected = "driver.yaml" if light else "score.yaml" if module == "eval.score" else "pso-bench.yaml"
            assert conda == [expected], f"{path.name}: {match[1]} runs {module}"
    assert seen == set(CONDA)


# ---- containers ----


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_installs_the_lock_torch_first(name):
    text = (ENVS / name).read_text()
    steps = re.findall(r"pip install .*", text)
    assert len(steps) == 2 and "grep '^torch==' /requirements.lock" in steps[0]
    assert "--requirement /requirements.lock" in steps[1]
    assert not re.search(r"\w==\d", text), "a version beside the lock's"
    assert LOCK[0].startswith("torch==")


def test_recipes_and_conda_agree_on_python():
    bases = [re.search(r"^FROM (\S+)|^From: (\S+)", (ENVS / name).read_text(), re.M) for name in RECIPES]
    base = {match[1] or match[2] for match in bases}
    assert base == {"python:3.12-slim-bookworm"}


def test_the_image_runs_without_root_and_holds_no_checkout_and_no_secret():
    text = (ENVS / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")
    after = lines[lines.index(f"USER {users[-1]}") :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "ADD"))]
    assert [line.split()[1:] for line in lines if line.startswith(("COPY", "ADD"))] == [
        ["requirements.lock", "/requirements.lock"]
    ]
    ignored = (ENVS / "Dockerfile.dockerignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith("#")] == ["*", "!requirements.lock"]
    for name in RECIPES:
        body = "\n".join(line for line in (ENVS / name).read_text().splitlines() if not line.startswith("#"))
        assert not re.search(r"TOKEN|SECRET|PASSWORD|ARG |curl|wget", body, re.I), name


def test_the_readme_names_every_file():
    text = (ENVS / "README.md").read_text()
    for path in ENVS.iterdir():
        assert path.name in ("README.md", "Dockerfile.dockerignore") or f"`{path.name}`" in text, path.name
    assert "not built" in text
