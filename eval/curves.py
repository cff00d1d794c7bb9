"""Curves of the probes in train.jsonl: reward, trajectory KL and further metrics while a model's rows are tuned.

The KL is that of the whole trajectory: the exact KL of each transition under the tuned model's own samples, summed. A
deterministic sampler has none. No torch.
"""

import json
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from eval.scores import run_folders
from pso.entries import Config, Row
from pso.figures import Curves, short
from pso.paths import subject_of
from pso.provenance import UserError

DPI = 100
# Okabe and Ito's colours; marker and dash tell the lines apart in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 3, 1, 3))]
NAMES = {"update": "Update", "reward": "Reward of the probe's images", "kl": "KL(theta | pre) of a trajectory"}
SMALL_KL = 1e-3  # below it the axis is linear, as it begins at 0
SEVERAL = 5  # runs of a figure that one line of its head names


def read_probes(path: Path) -> pd.DataFrame:
    """update, reward, kl and each further metric of every probe, NaN where it has none; the last of equal updates."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path} line {number} is not JSON; delete that line and draw the curves again.") from None
        if entry.get("event") == "probe":
            total = sum(entry["kl"].values()) if entry["kl"] else None
            found = {"update": entry["update"], "reward": entry.get("reward"), "kl": total}
            lines.append(found | entry.get("metrics", {}))
    frame = pd.DataFrame(lines, columns=None if lines else ["update", "reward", "kl"]).astype(float)
    return frame.drop_duplicates("update", keep="last").sort_values("update")


def runs(config: Config, results: Path, shown: Curves) -> list[tuple[Row, str, pd.DataFrame]]:
    """(row, its run's name, its probes) of every training seed and subject."""
    found = []
    for row in shown.rows:
        for task in shown.tasks:
            for seed, folder in run_folders(config, results, task, row).items():
                parts = [short(row.label), subject_of(task), f"seed {seed}" if len(config.seeds) > 1 else None]
                path = folder / "train.jsonl"
                found.append(
                    (row, ", ".join(filter(None, parts)), read_probes(path) if path.exists() else pd.DataFrame())
                )
    return found


def curves(config: Config, results: Path, shown: Curves) -> Figure:
    """Panels of one model: a colour, marker and dash for each row, a line for each of its runs."""
    every = runs(config, results, shown)
    further = list(dict.fromkeys(name for *_, frame in every for name in frame.columns if name not in NAMES))
    axes = [("update", "reward"), ("update", "kl"), ("kl", "reward"), *(("update", name) for name in further)]
    axes = [pair for pair in axes if any(_values(frame, *pair).size for *_, frame in every)] or axes[:1]
    columns = 3 if len(axes) > 4 or len(axes) == 3 else min(len(axes), 2)
    lines = -(-len(axes) // columns)
    figure = Figure(figsize=(15, 4.4 * lines + 1.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(axes) :]:
        panel.remove()
    for panel, (x, y) in zip(panels, axes, strict=False):
        _panel(config, panel, x, y, shown.rows, every)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    told = [f"Scale {config.scale}.", *(f"{what}: {_some(names)}." for what, names in _without(every).items())]
    figure.suptitle("\n".join(textwrap.wrap(" ".join(told), 170)), fontsize=10)
    return figure


def _values(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The probes that measured both."""
    there = {x, y} <= set(frame)
    return frame[[x, y]].dropna() if there else pd.DataFrame(columns=[x, y], dtype=float)


def _panel(config: Config, panel, x: str, y: str, rows: tuple[Row, ...], every: list) -> None:
    labelled = set()
    for row, _, frame in every:
        place = rows.index(row)
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 11], "linestyle": DASHES[place % 8]}
        label = None if row.label in labelled else short(row.label)
        labelled.add(row.label)
        values = _values(frame, x, y)
        panel.plot(values[x], values[y], markersize=5, linewidth=1.6, label=label, **style)
    title = {name: metric.title for name, metric in config.metrics.items()}
    panel.set(xlabel=NAMES[x], ylabel=NAMES.get(y) or f"{title.get(y, y)} of the probe's images")
    for name, scale in ((x, panel.set_xscale), (y, panel.set_yscale)):
        if name == "kl":
            scale("symlog", linthresh=SMALL_KL)
    panel.grid(alpha=0.3)


def _without(every: list) -> dict[str, list[str]]:
    """What is not there -> names of the runs without it."""
    found: dict[str, list[str]] = {}
    for _, name, frame in every:
        if frame.empty:
            found.setdefault("No probes", []).append(name)
            continue
        for column, what in (("reward", "No reward measured"), ("kl", "No KL (deterministic sampler)")):
            if frame[column].isna().all():
                found.setdefault(what, []).append(name)
    return found


def _some(names: list[str]) -> str:
    rest = len(names) - SEVERAL
    return ", ".join(names[:SEVERAL]) + (f" and {rest} more" if rest > 0 else "")
