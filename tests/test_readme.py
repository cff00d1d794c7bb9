"""Numbers of the documents: those of the committed results, and lost markers are one sentence."""

import subprocess
from pathlib import Path

import pytest
from documents import ROOT

from eval import readme
from eval.method_pages import modules
from pso.config import load
from pso.provenance import UserError


def committed(folder: Path, *names: str) -> None:
    """Put the files of the last commit into a folder: a run of `make` rewrites those of the working copy."""
    for name in names:
        done = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{name}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no commit with {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(done.stdout)


def test_the_documents_numbers_are_those_of_the_committed_results(tmp_path):
    config = load({"scale": "miniature"})
    tables = [f"tables/{name}.csv" for name in config.tables] + [f"tables/{name}.diff.json" for name in readme.SHOWN]
    committed(tmp_path, *(f"results/miniature/{name}" for name in (*tables, "claims.json", "cost.md")))
    committed(tmp_path, "results/verify_scorers.json", "results/benchmarks/cpu.json")
    contents = readme.blocks(config, tmp_path / "results" / "miniature")
    assert len(contents) == 3 + len(modules(config))
    for path, blocks in contents.items():
        assert all(len(content) > 100 for content in blocks.values())
        assert path.read_text() == readme.fill(path.read_text(), blocks), path


@pytest.mark.parametrize("text", ["", "<!-- cost:begin -->", "<!-- cost:begin --><!-- cost:end -->" * 2])
def test_lost_markers_are_one_sentence(text):
    with pytest.raises(UserError, match=r"^README\.md needs the lines <!-- cost:begin --> and <!-- cost:end -->"):
        readme.fill(text, {"cost": "x"})
