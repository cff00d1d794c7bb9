"""What the documents say: commands that exist, paths that are there or are made, names in the code; and no leaks."""

import ast
import importlib.util
import json
import posixpath
import re
import shlex
import tomllib
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest
import yaml
from documents import (
    DOCUMENTS,
    FENCE,
    PACKAGES,
    ROOT,
    all_commands,
    code_of,
    commands_of,
    examples_of,
    files_of_the_repository,
    grammar,
    inline_of,
    is_made,
    text_of,
)

from pso.config import load
from pso.entries import TOP_LEVEL
from pso.paths import LORA_FILE, images_dir, model_dir, run_dir, scores_file
from pso.provenance import UserError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ---- the readers themselves ----

EXAMPLE = """
Run `make test` or `python -m pso.tune --seed 3`; see [x](results/a.md).

    make CORES=8    # all of it
    . .venv/bin/activate && snakemake -n

```bash
snakemake --cores 2 all
```
"""


def test_commands_are_found_in_every_kind_of_code():
    assert commands_of(EXAMPLE, "make") == [["CORES=8"], ["test"]]
    assert commands_of(EXAMPLE, "snakemake") == [["--cores", "2", "all"], ["-n"]]
    assert commands_of(EXAMPLE, "python") == [["-m", "pso.tune", "--seed", "3"]]


# ---- commands ----


def test_the_readme_names_the_two_commands():
    assert [] in commands_of(text_of("README.md"), "make") and ["test"] in commands_of(text_of("README.md"), "make")


def test_every_make_command_has_its_target_and_variable():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    for name, words in all_commands("make"):
        for word in words:
            known = variables if "=" in word else targets
            assert word.split("=")[0] in known, f"{name}: make {word}; known: {sorted(known)}"


def source_of(program: str, is_module: bool) -> str | None:
    """The source of what Python runs, if there is any."""
    if not is_module:
        return (ROOT / program).read_text() if (ROOT / program).exists() else None
    spec = importlib.util.find_spec(program)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{program}.__main__")
    return None if spec is None else Path(spec.origin).read_text()


def test_every_module_and_script_that_is_run_exists_and_knows_its_flags():
    """A flag is the command's own, or of a module that adds some to its parser."""
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    added, wrong = "".join(source for source in sources if "def add_arguments(" in source), []
    for name, words in all_commands("python"):
        if not words:  # the program alone
            continue
        program = words[1] if words[0] == "-m" else words[0]
        source = source_of(program, words[0] == "-m")
        if source is None or 'if __name__ == "__main__"' not in source:
            wrong.append(f"{name}: python {' '.join(words)}")
        elif words[0] != "-m" or program.split(".")[0] in PACKAGES:
            flags = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
            wrong += [f"{name}: {program} {flag}" for flag in flags if f'"{flag}"' not in source + added]
    assert wrong == []


def rules() -> set[str]:
    files = [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow").rglob("*.smk")]
    return set(chain.from_iterable(re.findall(r"^rule (\w+):", f.read_text(), re.MULTILINE) for f in files))


@pytest.fixture(scope="module")
def snakemake_commands():
    """(document, words, parsed) of every snakemake command, read by Snakemake itself."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    return [(name, words, *parser.parse_known_args(words)) for name, words in all_commands("snakemake")]


def settings_of(name: str, parsed) -> dict:
    """What a command lays over workflow/config: a file that its document shows, and --config."""
    from snakemake.cli import parse_config

    shown = examples_of(text_of(name))
    files = [yaml.safe_load(shown[str(path)]) for path in parsed.configfile or []]
    return {key: value for one in [*files, parse_config(parsed.config)] for key, value in one.items()}


def test_every_snakemake_command_has_known_flags_settings_and_targets(snakemake_commands):
    assert len(snakemake_commands) > 10
    wrong = []
    for name, words, parsed, unknown in snakemake_commands:
        try:
            targets = rules() | set(load(settings_of(name, parsed)).table_entries)
        except UserError as error:
            wrong.append(f"{name}: snakemake {' '.join(words)}: {error}")
            continue
        if unknown or not all(target in targets or is_made(target) for target in parsed.targets):
            wrong.append(f"{name}: snakemake {' '.join(words)}")
    assert wrong == []


def test_settings_that_are_named_without_a_command_are_accepted():
    from snakemake.cli import parse_config

    found = [(name, line) for name in DOCUMENTS for line in inline_of(text_of(name)) if line.startswith("--config ")]
    assert len(found) > 2
    for _, line in found:
        load(parse_config(shlex.split(line)[1:]))


# of programs that are none of ours
OTHERS = {"--env": "docker", "--volume": "docker", "--local-dir": "hf", "--logdir": "tensorboard", "--me": "squeue"}


def test_every_option_that_is_named_exists():
    from snakemake.cli import get_argument_parser

    files = [path for path in files_of_the_repository() if path.endswith((".py", "Makefile"))]
    known = set(re.findall(r"[\"'](--[a-z][\w-]*)[\"'=]", "".join((ROOT / path).read_text() for path in files)))
    known |= {option for action in get_argument_parser()._actions for option in action.option_strings} | set(OTHERS)
    for name in DOCUMENTS:
        for line in code_of(text_of(name)):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
                assert option in known, f"{name}: {option} in `{line}`"


# ---- keys and names ----


def keys_of_the_configuration() -> set[str]:
    """Names of all fields of entries, by the JSON Schemas that the code writes."""
    found: set[str] = set()

    def look(node) -> None:
        if isinstance(node, dict):
            found.update(node.get("properties", {}))
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    for path in (ROOT / "workflow" / "schemas").rglob("*.json"):
        look(json.loads(path.read_text()))
    return found | TOP_LEVEL


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_key_with_a_value_is_one_of_the_configuration(name):
    keys = keys_of_the_configuration()
    for code in inline_of(text_of(name)):
        if found := re.fullmatch(r"([a-z_.]+): [^/]+", code):
            assert set(found[1].split(".")) <= keys, f"{name}: `{code}`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_is_somewhere_in_the_repository(name, everything):
    """Entries, columns, functions, variables of the environment: a word with an underscore is none of a language."""
    shown = "\n".join(examples_of(text_of(name)).values())
    for code in inline_of(text_of(name)):
        if re.fullmatch(r"[A-Za-z]+(_[A-Za-z0-9]+)+", code):
            assert re.search(rf"\b{code}\b", everything + shown), f"{name}: `{code}`"


@pytest.fixture(scope="module")
def everything() -> str:
    files = [name for name in files_of_the_repository() if name.endswith((".py", ".yaml", ".smk", "Snakefile"))]
    return "\n".join((ROOT / name).read_text() for name in files)


# ---- paths ----


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("results/miniature/preference/sdxl_dmd2/pso/seed0/run.json", True),
        ("results/miniature/preference/sdxl_dmd2/pso/seed0/images/parti_prompts/steps4/shard0.parquet", True),
        ("results/miniature/tables/table1.tex", True),
        ("results/miniature/tables/table1.docx", False),
        ("results/miniature/cost.txt", False),
        ("results/benchmarks/count.{json,md}", True),
        ("results/benchmarks/count.{txt,md}", False),
        ("results/miniature/preference/sdxl_dmd2/images.json", True),
        ("results/miniature/preference/sdxl_dmd2/pso/seed0/run.xml", False),
        ("results/miniature/preference/sdxl_dmd2/pso/seed0/lora", True),
        ("results/miniature/preference/sdxl_dmd2/pso/seed0/loras", False),
        ("results/miniature/hub/clip.json", True),
        ("results/miniature/hubs/clip.json", False),
    ],
)
def test_the_path_grammar_is_read(path, made):
    assert is_made(path) == made


def test_the_path_grammar_is_that_of_the_code():
    run = run_dir("smoke", "preference", "sdxl", "pso", 1)
    model = model_dir("smoke", "preference", "sdxl")
    names = ("run.json", "config.yaml", "train.jsonl", "tune.log", "state/x", f"lora/{LORA_FILE}", "lora/README.md")
    paths = [run / name for name in names] + [model / "images.json", model / "scores.json"]
    paths += [images_dir(run, "parti_prompts", 4) / "shard0.parquet", scores_file(run, "parti_prompts", 4, "hf_ratio")]
    assert [str(p) for p in paths if not is_made(str(p))] == []


def links_of(text: str) -> list[str]:
    rest = re.sub(r"`[^`\n]*`|\$\$?[^$]*\$\$?", "", FENCE.sub("", text))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", rest) if "://" not in link]


def paths_of(text: str) -> set[str]:
    """Paths of this repository in code."""
    own = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in (".git", ".venv", ".snakemake")]
    top = "|".join(map(re.escape, own))
    found = re.findall(rf"(?<![\w/:.-])((?:{top})/[\w./{{}},*+-]*)", "\n".join(code_of(text)))
    return {path.rstrip(".,") for path in found}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_is_there_or_is_made(name):
    tree = files_of_the_repository()
    for path in sorted(paths_of(text_of(name))):
        pattern = re.sub(r"\{[^}]*\}", "*", path).rstrip("/")
        there = any(fnmatch(file, pattern) or fnmatch(file, f"{pattern}/*") for file in tree)
        assert there or is_made(path) or path.startswith("results/{"), f"{name}: {path}"


def anchors(text: str) -> set[str]:
    """Of every heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_made_as_github_does():
    assert anchors("# pso/peers/\n## Your own: `a_b` & more, 4-step") == {"psopeers", "your-own-a_b--more-4-step"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file_of_the_repository_and_a_heading_in_it(name):
    tree = set(files_of_the_repository())
    for link in links_of(text_of(name)):
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        assert target in tree, f"{name}: {link}"
        assert not anchor or anchor in anchors(text_of(target)), f"{name}: {link}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_without_a_folder_exists(name):
    tree = {p.rpartition("/")[2] for p in files_of_the_repository()}
    made = {"config.yaml", "claims.md", "cost.md", "metadata.jsonl"}  # the last is a user's own
    made |= {"hub.lock.json"}  # written where the workflow is started
    made |= {name.rpartition("/")[2] for name in grammar()}
    for code in re.findall(r"`([\w.-]+\.(?:yaml|py|cff|lock|toml|md|smk|csv|jsonl|json))`", text_of(name)):
        assert code in tree | made, f"{name}: {code}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_dotted_name_is_in_the_code(name):
    for dotted in re.findall(rf"`((?:{'|'.join(PACKAGES)})\.[\w.]+)", text_of(name)):
        parts = dotted.rstrip(".").split(".")
        if parts[-1] == "py":  # a file, named without its folder
            continue
        files = [(ROOT / "/".join(parts[:i])).with_suffix(".py") for i in range(len(parts) + 1)]
        depth = max((i for i in range(2, len(files)) if files[i].exists()), default=1)
        if depth < len(parts):
            assert depth > 1, f"{name}: {dotted}"
            tree = ast.parse(files[depth].read_text())
            assert parts[depth] in {n.name for n in tree.body if hasattr(n, "name")}, f"{name}: {dotted}"


# ---- what a reader meets first ----


def test_the_first_line_of_the_readme_says_what_it_is():
    first = text_of("README.md").splitlines()[0]
    assert first.startswith("# PSO-bench") and "Pairwise Sample Optimization" in first


def test_the_changelog_has_an_entry_for_this_version():
    assert re.search(rf"^## \[?v?{re.escape(PROJECT['version'])}\b", text_of("CHANGELOG.md"), re.MULTILINE)


# ---- nothing of the machine that built it ----


# written in pieces, so that this file does not find itself
ABSOLUTE = re.compile("|".join(["(?<![\\w.~})/-])/(?:work|tmp|root|opt|home)" + "/", "(?<![\\w.])/" + "farm"]))
ADDRESS = re.compile("|".join(["find" + "-links", "index" + "-url", "download.pytorch" + ".org", "org/" + "simple"]))


@pytest.mark.parametrize(
    ("before", "after", "leaks"),
    [
        ("see /", "work/main", True),
        ("x='/", "tmp/y'", True),
        ("(/", "farm7/x)", True),
        ("http://a.org/", "opt/x", False),
        ("a/", "tmp/b", False),
        ("$(pwd)/", "tmp/b", False),
    ],
)
def test_an_absolute_path_is_noticed(before, after, leaks):
    assert bool(ABSOLUTE.search(before + after)) == leaks


@pytest.mark.parametrize("pattern", [ABSOLUTE, ADDRESS], ids=["paths", "addresses"])
def test_no_file_names_a_folder_or_index_of_the_machine_that_built_it(pattern):
    found = []
    for name in files_of_the_repository():
        for number, line in enumerate((ROOT / name).read_bytes().decode(errors="ignore").splitlines(), 1):
            found += [f"{name}:{number}: {m[0]}" for m in pattern.finditer(line)]
    assert found == []


def test_the_snakefile_begins_with_every_target_and_every_path_of_the_results():
    begins = text_of("workflow/Snakefile").partition("\nimport")[0]
    _, _, targets = begins.partition("Targets:")
    for name in (
        "all",
        "hub",
        "claims",
        "figures",
        "verify_scorers",
        "doctor",
        "cost",
        "calibrate",
        "leakage",
        "spent",
        "cards",
    ):
        assert re.search(rf"\b{name}\b", targets), name
    said = text_of("results/README.md")
    for path in ("calibrate", "leakage", "estimate", "claims"):
        assert f"{path}.{{md,json}}" in begins and f"results/{{scale}}/{path}.{{md,json}}" in said, path
    for path in (
        "untuned_images.json",
        "untuned_scores.json",
        "hub/repositories/{owner}--{name}.json",
        "hub.lock.json",
    ):
        assert path in begins and path in said, path
