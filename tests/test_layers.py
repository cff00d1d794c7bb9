"""Who may import whom, and that files and functions stay short (design, section 3)."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pso", "baselines", "eval")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
STANDARD = sys.stdlib_module_names
CHAIN = (
    *("pso.mdp", "pso.evidence", "pso.policy", "pso.models", "pso.rollout", "pso.sources"),
    *("pso.objective", "pso.loop", "pso.tune"),
)
BRANCHING = ("pso.rollout", "pso.forks", "pso.sources", "pso.stepwise", "pso.tune")  # tune finds stepwise by its path
TORCH_FREE = [
    "eval.method_pages",
    *(
        f"eval.{name}"
        for name in (
            *("stats", "scores", "tables", "diff", "claims", "figures", "grids", "curves", "cost", "readme"),
            *("paper", "untuned", "calibrate", "run_notes", "compare", "report", "wins", "style", "gains", "win_maps"),
            *(f"sections.{part}" for part in ("page", "overview", "tables", "claims", "grids", "curves", "wins")),
            *(f"sections.{part}" for part in ("categories", "cost", "provenance")),
        )
    ),
    *(
        f"pso.{name}"
        for name in (
            "background",
            "card",
            "templates",
            "tuned",
            "card_metadata",
            "card_scores",
            "leaks",
            "licences",
            "publish",
            "usage",
            "campaign",
            "timeline",
            "progress",
            "resources",
            "launch",
            "checks",
            "estimate",
            "params",
            "why",
            "work",
            "strict",
            "standin_entries",
            "steps",
            "config",
            "entries",
            "provenance",
            "paths",
            "runs",
            "data",
            "pairs",
            "visits",
            "leakage",
            "shards",
            "dreambooth",
            "hub",
            "imagefolder",
            "chosen",
            "download",
            "fetch",
            "lockfile",
            "locks",
            "stopping",
            "remote",
            "replacing",
            "figures",
            "rehearsal_data",
            "trained_on",
        )
    ),
]
NEEDS_TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchvision"}
METRICS = [name for name in FILES if name.startswith("eval.metrics.")]
LOSSES = [
    name
    for name, path in FILES.items()
    if (path.parent.name == "pso" and path.stem.startswith("pso"))
    or (name.startswith("baselines.") and "\ndef loss(" in path.read_text())
]


def imports_of(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of everything that a piece of code imports, at any depth and in any function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from pso import mdp` imports pso.mdp
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in FILES else base)
    return found


@cache
def imports(module: str) -> frozenset[str]:
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(imports_of(ast.parse(path.read_text()), package))


def parents(module: str) -> set[str]:
    """Packages whose __init__ runs with the module."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))} & set(FILES)


@cache
def closure(module: str) -> frozenset[str]:
    """Every module that importing this one imports, of this project and (by its top name) of others."""
    found, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()):
            for one in {name, *parents(name)} if name in FILES else {name.split(".")[0]}:
                if one not in found:
                    found.add(one)
                    todo += [one] if one in FILES else []
    return frozenset(found)


def outside(module: str, allowed: set[str]) -> set[str]:
    """What a module imports beyond the standard library and what is allowed (by exact or top name)."""
    names = imports(module)
    return {n for n in names if n not in allowed and n.split(".")[0] not in allowed | STANDARD}


# ---- the reader of imports itself ----


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from pso import mdp", {"pso.mdp"}),
        ("from pso.mdp import Chain", {"pso.mdp"}),
        ("from . import mdp", {"pso.mdp"}),
        ("from .mdp import Chain", {"pso.mdp"}),
        ("def f():\n    import torch", {"torch"}),
        ("if True:\n    from eval.metrics import sharpness", {"eval.metrics.sharpness"}),
    ],
)
def test_every_form_of_import_is_seen(code, found):
    assert imports_of(ast.parse(code), "pso") == found


def test_the_closure_follows_project_modules():
    assert {"pso.mdp", "pso.evidence", "torch", "diffusers", "yaml"} <= closure("pso.tune")


def test_torch_is_found_where_it_is_only_reached_through_another_module():
    assert "torch" not in {n.split(".")[0] for n in imports("eval.metrics.pick_score")}
    assert "torch" in closure("eval.metrics.pick_score")


# ---- leaves ----


@pytest.mark.parametrize("module", METRICS)
def test_a_metric_imports_only_torch_and_its_neighbours(module):
    shared = ("transforms", "clip_model", "compared", "affine", "checkpoints", "open_clip_weights")
    libraries = {"torch", "numpy", "PIL", "transformers", "pso.provenance", "pso.state_dicts"}
    assert outside(module, libraries | {f"eval.{name}" for name in shared} | set(METRICS)) == set()


@pytest.mark.parametrize("module", LOSSES)
def test_a_loss_imports_only_torch_and_its_contract(module):
    assert outside(module, {"torch", "pydantic", "pso.entries", "pso.evidence"}) == set()


def test_there_are_metrics_and_losses_to_look_at():
    assert len(METRICS) >= 5 and {"pso.pso", "pso.pso_offline", "pso.pso_online"} <= set(LOSSES)
    assert {"baselines.diffusion", "baselines.spo"} <= set(LOSSES)


# ---- directions ----


@pytest.mark.parametrize("module", CHAIN)
def test_no_link_of_the_chain_imports_a_later_one(module):
    later = set(CHAIN[CHAIN.index(module) + 1 :])
    assert closure(module) & later == set()


@pytest.mark.parametrize("module", BRANCHING)
def test_no_link_of_the_branching_chain_imports_a_later_one(module):
    assert closure(module) & set(BRANCHING[BRANCHING.index(module) + 1 :]) == set()


def test_the_chain_is_complete():
    assert set(CHAIN) - {"pso.tune"} <= closure("pso.tune")


def test_tune_imports_neither_baselines_nor_eval():
    assert {n for n in closure("pso.tune") if n.split(".")[0] in ("baselines", "eval")} == set()


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "pso"])
def test_the_package_pso_imports_neither_baselines_nor_eval(module):
    assert {n for n in imports(module) if n.split(".")[0] in ("baselines", "eval")} == set()


@pytest.mark.parametrize("module", [n for n in FILES if not n.startswith("pso.miniature")])
def test_nothing_imports_the_stand_in_world(module):
    assert {n for n in imports(module) if n.startswith("pso.miniature")} == set()


def test_nobody_imports_in_a_circle():
    circles = [name for name in FILES if name in closure(name) and FILES[name].name != "__init__.py"]
    assert circles == []


@pytest.mark.parametrize("module", FILES)
def test_nobody_imports_torchvision(module):
    assert not any(name.split(".")[0] == "torchvision" for name in imports(module))


def code_files():
    return [*FILES.values(), *sorted((ROOT / "tests").glob("*.py"))]


@pytest.mark.parametrize("path", code_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_eval_the_builtin_is_not_shadowed_by_a_plain_import(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            bound = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            assert "eval" not in bound, f"line {node.lineno}: write `from eval.x import y`"


# ---- without torch ----


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_torch_free_module_reaches_no_torch(module):
    assert closure(module) & NEEDS_TORCH == set()


def test_torch_free_modules_really_start_without_torch():
    code = f"import importlib, sys\nfor m in {TORCH_FREE}:\n    importlib.import_module(m)\n"
    code += "    assert 'torch' not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the workflow ----

RULES = sorted([ROOT / "workflow" / "Snakefile", *(ROOT / "workflow").rglob("*.smk")])
IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+(.+)|import\s+([\w., ]+))\s*(?:#.*)?$", re.MULTILINE)


def rule_imports(path: Path) -> set[str]:
    """Snakemake's language is not Python, but its imports are."""
    found = set()
    for base, names, plain in IMPORT.findall(path.read_text()):
        tree = ast.parse(f"from {base} import {names.strip('( ').split(',')[0]}" if base else f"import {plain}")
        found |= imports_of(tree, "workflow")
        found |= {f"{base}.{n.strip()}" for n in names.split(",") if f"{base}.{n.strip()}" in FILES}
    return found


@pytest.mark.parametrize("path", RULES, ids=lambda p: p.name)
def test_the_workflow_imports_only_torch_free_modules_of_the_project(path):
    for name in rule_imports(path):
        assert name.split(".")[0] in STANDARD | {"snakemake", "pso"}, name
        if name in FILES:
            assert name in TORCH_FREE and closure(name) & NEEDS_TORCH == set(), name


def test_the_workflows_imports_are_seen():
    assert {"pso.config", "pso.provenance", "pso.runs"} <= rule_imports(ROOT / "workflow" / "rules" / "common.smk")


@pytest.mark.parametrize("path", RULES, ids=lambda p: p.name)
def test_modules_named_in_rules_exist(path):
    text = path.read_text()
    named = set(re.findall(r'"((?:pso|eval|baselines)\.[\w.]+)"', text)) | set(re.findall(r"python -m ([\w.]+)", text))
    assert {name for name in named if name not in FILES} == set()


# ---- size ----


def too_long_functions(tree: ast.AST, limit: int) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [f"{f.name}: {n}" for f in functions if (n := f.end_lineno - f.lineno + 1) > limit]


def test_a_long_function_is_noticed():
    assert too_long_functions(ast.parse("def f():\n" + "    x = 1\n" * 60), 60) == ["f: 61"]
    assert too_long_functions(ast.parse("def f():\n" + "    x = 1\n" * 59), 60) == []


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_a_file_has_at_most_420_lines(path):
    assert len(path.read_text().splitlines()) <= 420


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_a_function_has_at_most_60_lines(path):
    assert too_long_functions(ast.parse(path.read_text()), 60) == []
