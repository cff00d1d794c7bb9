"""What the documents say: commands that exist, paths that are there or are made, names in the code; and no leaks."""

import ast
import importlib.util
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from eval import readme
from pso.config import load
from pso.paths import LORA_FILE, images_dir, model_dir, run_dir, scores_file
from pso.provenance import UserError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "results/README.md", "eval/reference/README.md", "CHANGELOG.md")
PACKAGES = ("pso", "baselines", "eval")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def text_of(name: str) -> str:
    assert (ROOT / name).exists(), f"{name} is missing"
    return (ROOT / name).read_text()


def code_of(text: str) -> list[str]:
    """Lines of fenced and indented blocks, and inline code."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*)$", rest, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ {4}.*$", "", rest, flags=re.MULTILINE))
    return [*chain.from_iterable(block.splitlines() for block in fenced), *indented, *inline]


def commands_of(text: str, program: str) -> list[list[str]]:
    """Words of every command of a program in a document's code."""
    found = []
    for line in code_of(text):
        for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
            try:
                words = shlex.split(part.strip().removeprefix("$ "), comments=True)
            except ValueError:  # an apostrophe: not a command
                continue
            if words and words[0] == program:
                found.append(words[1:])
    return found


def all_commands(program: str) -> list[tuple[str, list[str]]]:
    return [(name, words) for name in DOCUMENTS for words in commands_of(text_of(name), program)]


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


def test_every_module_that_is_run_exists_and_knows_its_flags():
    """A flag is the command's own, or of a module that adds some to its parser."""
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    added = "".join(source for source in sources if "def add_arguments(" in source)
    for name, words in all_commands("python"):
        if words[:1] != ["-m"]:
            continue
        module = words[1]
        assert importlib.util.find_spec(module) is not None, f"{name}: python -m {module}"
        if module.split(".")[0] in PACKAGES:
            source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
            assert 'if __name__ == "__main__"' in source, f"{name}: {module} is no command"
            for flag in (w.split("=")[0] for w in words[2:] if w.startswith("--")):
                assert f'"{flag}"' in source + added, f"{name}: {module} {flag}"


def rules() -> set[str]:
    files = [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow").rglob("*.smk")]
    named = set(chain.from_iterable(re.findall(r"^rule (\w+):", f.read_text(), re.MULTILINE) for f in files))
    return named | set(load().table_entries)


@pytest.fixture(scope="module")
def snakemake_commands():
    """(document, words, parsed) of every snakemake command, read by Snakemake itself."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    return [(name, words, *parser.parse_known_args(words)) for name, words in all_commands("snakemake")]


def test_every_snakemake_command_has_known_flags_and_rules(snakemake_commands):
    assert snakemake_commands
    for name, words, parsed, unknown in snakemake_commands:
        assert unknown == [], f"{name}: snakemake {' '.join(words)}"
        assert set(parsed.targets) <= rules(), f"{name}: snakemake {' '.join(words)}; rules: {sorted(rules())}"


def test_the_settings_of_every_snakemake_command_are_accepted(snakemake_commands):
    from snakemake.cli import parse_config

    for _, _, parsed, _ in snakemake_commands:
        load(parse_config(parsed.config))


# ---- paths ----


def grammar() -> list[str]:
    """The paths of results/README.md, with their {placeholders}; a folder in which nothing is listed ends with /."""
    found, run = [], ""
    for line in re.findall(r"^    (.*)$", text_of("results/README.md"), re.MULTILINE):
        words = line.split()
        names = [words.pop(0)]
        while words and re.fullmatch(r"[\w{},]+(\.[\w{},]+|/)", words[0]):
            names.append(words.pop(0))
        if not names[0].startswith("results/"):
            found += [run + name for name in names]
        elif "seed{seed}/" in names[0]:
            run = names[0]
        else:
            base = names[0].rstrip("/").rpartition("/")[0] + "/"
            found += [names[0], *(base + name for name in names[1:])]
    return found


def as_pattern(name: str) -> str:
    text = re.escape(name).replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"\{([^{}]*,[^{}]*)\}", lambda m: f"({m[1].replace(',', '|')})", text)
    return re.sub(r"\{\w+\}", "[^/]+", text)


def is_made(path: str) -> bool:
    """Whether a path is one of the grammar's, below one of its open folders, or a folder above one. Of {json,md} the
    first is looked for."""
    path = re.sub(r"\{([^{},]*),[^{}]*\}", r"\1", path)
    for name in grammar():
        if re.fullmatch(as_pattern(name) + (".+" if name.endswith("/") else ""), path):
            return True
        parts, above = path.rstrip("/").split("/"), name.split("/")[:-1]
        if "." not in parts[-1] and re.fullmatch(as_pattern("/".join(above[: len(parts)])), "/".join(parts)):
            return True
    return False


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


def paths_of(text: str) -> set[str]:
    """Paths of this repository in code and links."""
    links = re.findall(r"\]\(([^)#\s]+)", text)
    own = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in (".git", ".venv", ".snakemake")]
    top = "|".join(map(re.escape, own))
    found = re.findall(rf"(?<![\w/:.-])((?:{top})/[\w./{{}},*+-]*)", "\n".join([*code_of(text), *links]))
    return {path.rstrip(".,") for path in found} | {link for link in links if "://" not in link}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_is_there_or_is_made(name):
    tree = files_of_the_repository()
    for path in sorted(paths_of(text_of(name))):
        pattern = re.sub(r"\{[^}]*\}", "*", path).rstrip("/")
        there = any(fnmatch(file, pattern) or fnmatch(file, f"{pattern}/*") for file in tree)
        assert there or is_made(path) or path.startswith("results/{"), f"{name}: {path}"


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


def committed(folder: Path, *names: str) -> None:
    """Put the files of the last commit into a folder: a run of `make` rewrites those of the working copy."""
    for name in names:
        done = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{name}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no commit with {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(done.stdout)


def test_the_readmes_numbers_are_those_of_the_committed_results(tmp_path):
    tables = [f"tables/{name}.{kind}" for name in readme.SHOWN for kind in ("csv", "diff.json")]
    committed(tmp_path, *(f"results/miniature/{name}" for name in (*tables, "claims.json", "cost.md")))
    committed(tmp_path, "results/verify_scorers.json", "results/benchmarks/cpu.json")
    contents = readme.blocks(load(), tmp_path / "results" / "miniature")
    assert all(len(content) > 100 for content in contents.values())
    assert text_of("README.md") == readme.fill(text_of("README.md"), contents)


@pytest.mark.parametrize("text", ["", "<!-- cost:begin -->", "<!-- cost:begin --><!-- cost:end -->" * 2])
def test_lost_markers_are_one_sentence(text):
    with pytest.raises(UserError, match=r"^README\.md needs the lines <!-- cost:begin --> and <!-- cost:end -->"):
        readme.fill(text, {"cost": "x"})


# ---- the lock file ----

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


# ---- nothing of the machine that built it ----


def files_of_the_repository() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


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
