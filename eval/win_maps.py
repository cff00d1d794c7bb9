"""Maps of win rates: on what share of prompts each row of a table scores above each other one. No torch."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval import style
from eval.scores import ScoreFiles, metric_title, table_entry
from eval.tables import resampled, scale_sentence, unit
from eval.wins import win_rates
from pso.entries import Config
from pso.figures import Matrix

MAP = "PuOr"  # ColorBrewer's: its ends are told apart with any colour vision, its middle is white
DARK, LIGHT = "#010101", "#ffffff"  # of numbers on cells, whatever the page's own colours are
EQUAL_CONTRAST = 0.18  # luminance (WCAG) of a cell on which black and white are read equally well
CELL = 0.25  # inches of a line
SIDE_BY_SIDE = 8  # rows that leave room for two maps


@style.look()
def win_map(config: Config, results: Path, shown: Matrix, files: ScoreFiles | None = None) -> style.Drawn:
    """A map for each metric: the row's share against the column's; bold where its interval leaves out one half.

    files: what has been read already.
    """
    names = [row.label for row in shown.rows]
    beside = len(names) <= SIDE_BY_SIDE
    maps = len(shown.metrics)
    high = CELL * len(names) + 0.7
    figure = Figure(figsize=(style.WIDTH, high * (1 if beside else maps) + 0.9), layout="constrained")
    panels = figure.subplots(*((1, maps) if beside else (maps, 1)), squeeze=False).ravel()
    table, count = table_entry(config, shown.table), 0
    for place, (metric, panel) in enumerate(zip(shown.metrics, panels, strict=True)):
        found = win_rates(config, results, shown.table, metric, shown.eval_set, files)
        count = int(found["prompts"].max())
        tables = {name: _square(found, names, name) for name in ("win_rate", "low", "high")}
        _panel(panel, tables, names if not beside or place == 0 else None)
        panel.set(title=f"{metric_title(config, metric)}, {shown.eval_set}")
    title = f"{shown.table}: on how many of {count} {unit(table)} a row scores above another, in %"
    style.head(figure, f"{title}. Bold: the 95 % interval leaves out 50. {shown.shows}. Scale {config.scale}.")
    told = [
        f"{title}. The row against the column, of the same prompts and noise; equal scores count half.",
        f"Bold: the 95 % interval, a bootstrap over {resampled(table)} "
        "that is not corrected for many pairs, leaves out 50.",
        f"{shown.shows}; eval set {shown.eval_set}.",
    ]
    return style.Drawn(shown.name, figure, title, " ".join([*told, scale_sentence(config)]))


def cell_colours(rate: float) -> tuple[tuple[float, ...], str]:
    """Of a cell and of the number on it."""
    back = matplotlib.colormaps[MAP](rate / 100)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in back[:3]]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return back, DARK if luminance > EQUAL_CONTRAST else LIGHT


def _square(found: pd.DataFrame, names: list[str], column: str) -> np.ndarray:
    """[row, column] in per cent, NaN on the diagonal."""
    return (
        100 * found.pivot(index="left", columns="right", values=column).reindex(index=names, columns=names).to_numpy()
    )


def _panel(panel: Axes, tables: dict[str, np.ndarray], names: list[str] | None) -> None:
    rate, places = tables["win_rate"], range(len(tables["win_rate"]))
    panel.pcolormesh(rate, cmap=MAP, vmin=0, vmax=100, edgecolors=LIGHT, linewidth=0.6)
    for i in places:
        for k in places:
            if i == k:
                continue
            clear = tables["low"][i, k] > 50 or tables["high"][i, k] < 50
            panel.text(
                *(k + 0.5, i + 0.5, f"{rate[i, k]:.0f}"),
                **{"ha": "center", "va": "center", "fontsize": 7.5, "color": cell_colours(rate[i, k])[1]},
                weight="bold" if clear else "normal",
            )
    panel.invert_yaxis()
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    ticks, numbers = [i + 0.5 for i in places], [f"{i}" for i in range(1, len(places) + 1)]
    panel.set_xticks(ticks, numbers)
    panel.set_yticks(ticks, [f"{name}  {n}" for name, n in zip(names, numbers, strict=True)] if names else numbers)
