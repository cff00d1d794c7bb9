"""Figures of the tables that were asked for, named by what they show. No torch.

Each is written as {name}.png, as {name}.pdf (lines and text stay such, pictures are embedded without loss) and as
{name}.tex, a figure environment around it. Which ones there are is in pso/figures.py, how they look in
eval/style.py; eval/grids.py, curves.py, gains.py and win_maps.py draw them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from eval import style
from eval.curves import curves, runs
from eval.gains import cost, gains
from eval.grids import of_subjects, samples
from eval.scores import ScoreFiles, table_entry
from eval.tables import as_latex
from eval.win_maps import win_map
from pso import figures, paths
from pso.config import add_arguments, from_arguments
from pso.entries import Config
from pso.provenance import atomic, sentences


def drawn(config: Config, results: Path) -> Iterator[style.Drawn]:
    """Every figure, in the order of figures.figure_names."""
    files = ScoreFiles(config, results)
    for grid in figures.grids(config):
        yield (of_subjects if table_entry(config, grid.table).subjects else samples)(config, results, grid)
    for shown in figures.curves(config):
        yield curves(config, shown, runs(config, results, shown))
    for shown in figures.costs(config):
        yield cost(config, shown, gains(config, results, shown, files))
    for shown in figures.matrices(config):
        yield win_map(config, results, shown, files)


def to_latex(one: style.Drawn, scale: str) -> str:
    """A figure environment; the document needs graphicx, and the folder of the figures in its \\graphicspath.

    The file's kind is left to LaTeX: the PDF, or the PNG where there is no PDF.
    """
    return (
        f"% {one.name}, scale {scale}; needs \\usepackage{{graphicx}}\n"
        "\\begin{figure}[p]\n\\centering\n"
        f"\\includegraphics[width=\\textwidth,height=0.8\\textheight,keepaspectratio]{{{one.name}}}\n"
        f"\\caption{{{as_latex(one.caption)}}}\n\\label{{fig:{one.name}}}\n\\end{{figure}}\n"
    )


def write(config: Config, results: Path) -> list[Path]:
    folder, written = paths.scale_dir(config.scale, results) / "figures", []
    for one in drawn(config, results):
        written += [style.save(one.figure, folder / f"{one.name}{suffix}") for suffix in (".png", ".pdf")]
        with atomic(folder / f"{one.name}.tex") as part:
            part.write_text(to_latex(one, config.scale))
        written.append(folder / f"{one.name}.tex")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description="write results/{scale}/figures/*.{png,pdf,tex} of the tables asked for"
    )
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.figures"):
        for path in write(from_arguments(args), args.results):
            print(path)


if __name__ == "__main__":
    main()
