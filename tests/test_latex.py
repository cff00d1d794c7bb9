"""Every table and figure of the smoke run through a real TeX, as a paper would include it."""

import re
import shutil
import subprocess

import pytest
from test_figures import tree
from test_tables import latex

from eval.figures import write
from pso.config import load
from pso.figures import figure_names
from pso.paths import scale_dir

ENGINE = next((name for name in ("pdflatex", "xelatex", "lualatex", "tectonic") if shutil.which(name)), None)
TOLERANCE_PT = 1.0  # an Overfull \hbox below it is not seen
FLAGS = [] if ENGINE == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
EDGE_PT = 20.0  # at least so much paper on each side of a table
# \makebox hides what is wider than the text, so widths are told to the log
PAGE = r"""\documentclass{article}
\usepackage{booktabs}
\let\plainmakebox\makebox
\renewcommand\makebox[1][]{\measured}
\newcommand\measured[2][]{\sbox0{#2}\typeout{WIDTH \the\wd0, paper \the\paperwidth}%%
  \plainmakebox[\textwidth][c]{\usebox0}}
\begin{document}
%s
\end{document}
"""
FIGURES = r"""\documentclass{article}
\usepackage{graphicx}
\graphicspath{{figures/}}
\begin{document}
%s
\end{document}
"""


def compiled(folder, body: str, page: str = PAGE) -> str:
    """The log of one document; the test fails with its end where TeX fails."""
    (folder / "page.tex").write_text(page % body)
    command = [ENGINE, *FLAGS, "page.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (folder / "page.pdf").stat().st_size > 1000
    log = folder / "page.log"
    return log.read_text(errors="replace") if log.exists() else done.stdout + done.stderr


def problems(log: str, num_tables: int) -> list[str]:
    """What a reader of the page would see."""
    found = re.findall(r"Overfull \\[hv]box \(([\d.]+)pt too", log)
    seen = [f"{points} pt overfull" for points in found if float(points) > TOLERANCE_PT]
    widths = re.findall(r"WIDTH ([\d.]+)pt, paper ([\d.]+)pt", log)
    assert len(widths) >= num_tables
    seen += [f"{w} pt wide" for w, paper in widths if float(w) > float(paper) - 2 * EDGE_PT]
    signs = ("Float too large", "Undefined control sequence", "LaTeX Error", "Missing character")
    return seen + [sign for sign in signs if sign in log]


needs_tex = pytest.mark.skipif(ENGINE is None, reason="no pdflatex, xelatex, lualatex or tectonic is installed")


@pytest.fixture(scope="module")
def tables(smoke) -> dict[str, str]:
    """Every table that the smoke run made."""
    config = load({"scale": "smoke"})
    folder = scale_dir("smoke", smoke / "results") / "tables"
    return {name: (folder / f"{name}.tex").read_text() for name in config.tables}


@needs_tex
def test_every_table_of_the_smoke_run_compiles(tables, tmp_path):
    assert problems(compiled(tmp_path, "\n".join(tables.values())), len(tables)) == []


@needs_tex
def test_signs_of_latex_in_labels_compile(tmp_path):
    assert problems(compiled(tmp_path, latex(tmp_path)), 2) == []


@needs_tex
@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (r"\noindent\rule{400pt}{1pt}", "55.0 pt overfull"),
        (r"\noindent\makebox[\textwidth][c]{\rule{600pt}{1pt}}", "600.0 pt wide"),
        (r"\begin{table}[p]\rule{1pt}{700pt}\end{table}", "Float too large"),
    ],
)
def test_a_bad_page_is_seen(tmp_path, body, seen):
    assert problems(compiled(tmp_path, body), 0) == [seen]


@needs_tex
def test_the_pages_say_what_the_tables_say(tables, tmp_path):
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    compiled(tmp_path, "\n".join(tables.values()))
    subprocess.run(["pdftotext", "-layout", "page.pdf"], cwd=tmp_path, check=True, timeout=60)
    words = " ".join((tmp_path / "page.txt").read_text().replace("_", " ").split())
    config = load({"scale": "smoke"})
    for name in tables:
        entry = config.table_entries[name]
        for row in entry.all_rows:
            assert row.label in words
        for text in [*entry.eval_sets, "its numbers mean nothing"]:
            assert text.replace("_", " ") in words


# ---- figures ----


def included(folder, figures, kinds: tuple[str, ...]) -> str:
    """The log of a document with every figure's snippet beside its files of those kinds."""
    (folder / "figures").mkdir()
    for kind in kinds:
        for path in figures.glob(f"*.{kind}"):
            shutil.copy(path, folder / "figures")
    snippets = [path.read_text() for path in sorted(figures.glob("*.tex"))]
    assert snippets
    return compiled(folder, "\n\\clearpage\n".join(snippets), FIGURES)


@needs_tex
@pytest.mark.parametrize("kind", ["pdf", "png"])
def test_every_kind_of_figure_compiles_as_pdf_and_without_one_as_png(tmp_path, kind):
    cfg = tree(tmp_path / "results")
    write(cfg, tmp_path / "results")
    log = included(tmp_path, scale_dir(cfg.scale, tmp_path / "results") / "figures", (kind,))
    assert problems(log, 0) == []
    joined = log.replace("\n", "")
    assert [name for name in figure_names(cfg) if f"/{name}.{kind}" not in joined] == []


@needs_tex
def test_every_figure_of_the_smoke_run_compiles(smoke, tmp_path):
    log = included(tmp_path, scale_dir("smoke", smoke / "results") / "figures", ("pdf", "png"))
    assert problems(log, 0) == []
    joined = log.replace("\n", "")
    assert [name for name in figure_names(load({"scale": "smoke"})) if f"/{name}.pdf" not in joined] == []
