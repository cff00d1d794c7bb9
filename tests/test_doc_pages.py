"""Every folder's README.md: the same headings, every file once and none that is not there, and tests that exist."""

import re
from fnmatch import fnmatch

import pytest
from documents import FOLDERS, ROOT, files_of_the_repository, is_made, section, text_of

HEADINGS = ["What it is", "Files", "How to use it", "How to change it", "Checked by"]
GROUPED = ("tests", "workflow")  # whose lists may have globs: tests by theme, generated schemas
LIMIT = 400


def readme_of(folder: str) -> str:
    return text_of(f"{folder}/README.md")


def own_files(folder: str, tree: list[str]) -> list[str]:
    """Files of a folder, and those of folders below it that have no README.md of their own."""
    inner = [f"{other}/" for other in FOLDERS if other.startswith(f"{folder}/")]
    below = [path for path in tree if path.startswith(f"{folder}/") and not path.startswith(tuple(inner))]
    return [path.removeprefix(f"{folder}/") for path in below if path != f"{folder}/README.md"]


def named_files(text: str) -> list[str]:
    """Code of the first column of every table below `## Files`."""
    rows = re.findall(r"^\| (`[^|]*) \|", section(text, "Files"), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def fits(file: str, name: str) -> bool:
    """A glob stays within its folder."""
    return fnmatch(file, name) and file.count("/") == name.count("/")


def faults(names: list[str], files: list[str]) -> list[str]:
    """What a list of names (or globs) says wrongly of the files that there are."""
    found = [f"{name} is not there" for name in names if not any(fits(file, name) for file in files)]
    for file in files:
        times = sum(fits(file, name) for name in names)
        if times != 1:
            found.append(f"{file} is named {times} times")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_headings_are_the_same_everywhere(folder):
    assert re.findall(r"^## (.*)$", readme_of(folder), re.MULTILINE) == HEADINGS
    assert all(section(readme_of(folder), heading).strip() for heading in HEADINGS)
    assert readme_of(folder).startswith(f"# {folder}/")


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "results"])
def test_every_file_is_named_once_and_none_that_is_not_there(folder):
    names = named_files(readme_of(folder))
    assert faults(names, own_files(folder, files_of_the_repository())) == []
    assert folder in GROUPED or not any("*" in name for name in names)


def test_every_committed_result_has_its_place_in_the_grammar():
    files = own_files("results", files_of_the_repository())
    assert len(files) > 50 and [path for path in files if not is_made(f"results/{path}")] == []


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in (*GROUPED, "results", "docs")])
def test_the_list_is_sorted(folder):
    names = named_files(readme_of(folder))
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("names", "files", "told"),
    [
        (["a.py", "b.py"], ["a.py", "b.py"], []),
        (["a.py"], ["a.py", "b.py"], ["b.py is named 0 times"]),
        (["a.py", "a.py"], ["a.py"], ["a.py is named 2 times"]),
        (["a.py", "c.py"], ["a.py"], ["c.py is not there"]),
        (["test_*.py", "test_a.py"], ["test_a.py"], ["test_a.py is named 2 times"]),
        (["*.json"], ["a.json", "more/b.json"], ["more/b.json is named 0 times"]),
    ],
)
def test_a_wrong_list_is_noticed(names, files, told):
    assert faults(names, files) == told


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_checked_by_tests_that_exist(folder):
    named = re.findall(r"`(tests/[\w.]+)`", section(readme_of(folder), "Checked by"))
    assert named and [path for path in named if not (ROOT / path).is_file()] == []
    assert all(re.fullmatch(r"tests/test_\w+\.py", path) for path in named)


def test_every_folder_with_tracked_files_has_a_readme_or_is_listed_by_the_one_above():
    tops = {path.split("/")[0] for path in files_of_the_repository() if "/" in path} - {".ci"}
    assert tops == {folder for folder in FOLDERS if "/" not in folder}
    packages = {path.rpartition("/")[0] for path in files_of_the_repository() if path.endswith("/__init__.py")}
    assert packages <= set(FOLDERS)


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) < LIMIT
