"""results/{scale}/report.html: all that came out, on one page that needs no network. No torch.

    python -m eval.report

Made in seconds from what tables, claims, figures and runs left; sections are modules of eval/sections/.
"""

import argparse
from pathlib import Path
from types import ModuleType

from markupsafe import Markup

from eval.sections import categories, claims, cost, curves, grids, overview, provenance, tables, wins
from eval.sections.page import FOLDER, Context, inline, render
from eval.tables import scale_sentence
from pso.config import add_arguments, from_arguments
from pso.paths import RESULTS, scale_dir
from pso.provenance import UserError, atomic, sentences

# in the order of the page; imported by name, so that their code is part of the rule's
SECTIONS = (overview, tables, claims, grids, curves, wins, categories, cost, provenance)
WITHOUT_RUNS = (overview, tables, claims)  # of files that the repository holds; the others read what runs left
NO_RUNS = "No job has left its record here; `snakemake --cores 2` runs them and makes this page again."
NOT_WHOLE = "Results are not whole: {} jobs have left no record. `snakemake --cores 2` goes on with them."


def page(context: Context) -> str:
    """The whole page."""
    found = [
        {"id": module.__name__.rpartition(".")[2], "title": module.TITLE, "html": _html(context, module)}
        for module in SECTIONS
    ]
    style, script = (Markup((FOLDER / f"page.{kind}").read_text()) for kind in ("css", "js"))
    title = f"PSO-bench: results of scale {context.config.scale}"
    told = scale_sentence(context.config)
    return render("page.html", title=title, scale_sentence=told, sections=found, style=style, script=script)


def _html(context: Context, module: ModuleType) -> Markup:
    """A section, or a sentence in its place; while jobs are to come what they left so far need not go together."""
    if module not in WITHOUT_RUNS and not context.records:
        return _sentence(NO_RUNS)
    try:
        html = module.section(context)
    except UserError as error:
        if module in WITHOUT_RUNS or not context.lost_records:
            raise
        said = str(error).replace(str(context.results), RESULTS.name)  # a page names no place of a machine
        return _sentence(f"{NOT_WHOLE.format(len(context.lost_records))} {said}")
    return _sentence(module.WHY_NONE) if html is None else html


def _sentence(text: str) -> Markup:
    return Markup("<p>{}</p>").format(inline(text))


def write(context: Context) -> Path:
    path = scale_dir(context.config.scale, context.results) / "report.html"
    with atomic(path) as part:
        part.write_text(page(context))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("report"):
        print(write(Context(from_arguments(args), args.results)))


if __name__ == "__main__":
    main()
