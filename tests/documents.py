"""What the tests of the documents share: which documents there are, their code, commands, examples and paths."""

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pso", "baselines", "eval")
# every folder with a README.md of the fixed headings; further folders are listed by the one above
FOLDERS = (
    *("baselines", "docs", "envs", "eval", "eval/metrics", "eval/reference", "eval/sections"),
    *("pso", "pso/miniature", "pso/peers", "results", "tests", "workflow"),
)
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documents() -> list[str]:
    """All that people wrote: of results/ its README alone, the rest is generated."""
    found = chain(ROOT.glob("*.md"), *(ROOT.glob(f"{top}/**/*.md") for top in {f.split("/")[0] for f in FOLDERS}))
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return [name for name in names if not name.startswith("results/") or name == "results/README.md"]


DOCUMENTS = documents()


def text_of(name: str) -> str:
    assert (ROOT / name).exists(), f"{name} is missing"
    return (ROOT / name).read_text()


def blocks_of(text: str) -> list[str]:
    """Lines of fenced and indented blocks."""
    fenced = FENCE.findall(text)
    indented = re.findall(r"^ {4}(.*)$", FENCE.sub("", text), re.MULTILINE)
    return [*chain.from_iterable(block.splitlines() for block in fenced), *indented]


def inline_of(text: str) -> list[str]:
    rest = re.sub(r"^ {4}.*$", "", FENCE.sub("", text), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", re.sub(r"\$\$?[^$]*\$\$?", "", rest))


def code_of(text: str) -> list[str]:
    """Lines of fenced and indented blocks, and inline code."""
    return [*blocks_of(text), *inline_of(text)]


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


def examples_of(text: str) -> dict[str, str]:
    """Path -> content of every file of a reader's own that is shown: its path in backticks, then a fenced block."""
    shown = re.findall(
        r"`(mine/[\w./]+\.(?:py|yaml))`[^`\n]*\n\n```(?:python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return dict(shown)


def section(text: str, heading: str) -> str:
    """What stands below a heading `## ...`, up to the next one of its level."""
    _, _, after = text.partition(f"\n## {heading}\n")
    return re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0]


def files_of_the_repository() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


# ---- the path grammar ----


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
