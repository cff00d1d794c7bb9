"""Curves of the probes in train.jsonl: reward, trajectory KL and further metrics while a model's rows are tuned.

The KL is that of the whole trajectory: the exact KL of each transition under the tuned model's own samples, a mean over
the latent's elements as in the objectives, summed over transitions. Times elements it is the KL of all. A deterministic
sampler has none. No torch.
"""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval import style
from eval.scores import metric_title, run_folders
from eval.tables import scale_sentence
from pso.entries import Config, Row
from pso.figures import Curves, short
from pso.paths import root_of, subject_of
from pso.provenance import UserError

UPDATE, KL = "Update", "KL(theta | pre) per latent element"
SEVERAL = 5  # runs of a figure that one line of its head names
FEW_LEVELS = 3  # untuned levels that a panel shows: runs on other prompts, or of other subjects, begin elsewhere
BLURS = "sharpness"  # the metric that falls where a run blurs its pictures


def read_probes(path: Path) -> pd.DataFrame:
    """update, reward, kl and each further metric of every probe, NaN where it has none; the last of equal updates."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path} line {number} is no JSON object; delete that line and draw the curves again.")
        if entry.get("event") == "probe":
            total = sum(entry["kl"].values()) if entry["kl"] else None
            found = {"update": entry["update"], "reward": entry.get("reward"), "kl": total}
            lines.append(found | entry.get("metrics", {}))
    frame = pd.DataFrame(lines, columns=None if lines else ["update", "reward", "kl"]).astype(float)
    return frame.drop_duplicates("update", keep="last").sort_values("update")


def runs(config: Config, results: Path, shown: Curves) -> list[tuple[Row, str, pd.DataFrame]]:
    """(row, its run's name, its probes in the unit of the tables) of every training seed and subject."""
    found, reward = [], probe_reward(config, shown)
    for row in shown.rows:
        for task in shown.tasks:
            for seed, folder in run_folders(config, results, task, row).items():
                parts = [short(row.label), subject_of(task), f"seed {seed}" if len(config.seeds) > 1 else None]
                path = folder / "train.jsonl"
                frame = read_probes(path) if path.exists() else pd.DataFrame()
                for column in frame.columns:
                    entry = config.metrics.get(reward if column == "reward" else column)
                    frame[column] *= 1.0 if entry is None else entry.scale
                found.append((row, ", ".join(filter(None, parts)), frame))
    return found


def probe_reward(config: Config, shown: Curves) -> str | None:
    """The metric that every run's probes call the reward, if it is one."""
    rewards = {config.methods[row.method].tune.probe_reward for row in shown.rows} - {None}
    return rewards.pop() if len(rewards) == 1 else None


@style.look()
def curves(config: Config, shown: Curves, every: list[tuple[Row, str, pd.DataFrame]]) -> style.Drawn:
    """Panels of one model: a colour, marker and dash for each row, a line for each of its runs.

    every: `runs` of the same.
    """
    columns = [name for *_, frame in every for name in frame.columns if name not in ("update", "reward", "kl")]
    further = sorted(dict.fromkeys(columns), key=lambda name: name != BLURS)
    axes = [("update", "reward"), ("update", "kl"), ("kl", "reward"), *(("update", name) for name in further)]
    axes = [pair for pair in axes if any(len(_values(frame, *pair)) for *_, frame in every)] or axes[:1]
    lines, wide = -(-len(axes) // 2), min(len(axes), 2)
    figure = Figure(figsize=(style.WIDTH, 2.7 * lines + 1.2), layout="constrained")
    panels = figure.subplots(lines, wide, squeeze=False).ravel()
    for panel in panels[len(axes) :]:
        panel.remove()
    levels = 0
    for panel, (x, y) in zip(panels, axes, strict=False):
        _panel(config, panel, x, y, shown, every)
        levels = max(levels, _untuned(panel, y, every))
    named = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3)
    title = f"{model_and_task(config, shown.rows[0].model, shown.tasks)} while it is tuned"
    absent = [f"{what}: {_some(names)}." for what, names in _without(every).items()]
    style.head(figure, " ".join([f"{title}.", *absent, f"Scale {config.scale}."]))
    caption = [f"{title}: what probes measured, on pictures of the same prompts and noise in all of a run."]
    caption += [f"Panels: {', '.join(_title(config, shown, *pair) for pair in axes)}."]
    caption += ["KL: mean over the latent's elements, sum over transitions."] * any("kl" in pair for pair in axes)
    caption += ["Fine dashes: before the first update."] * (levels > 0)
    caption += ["There are several, as a run's probes are of its own training prompts."] * (levels > 1)
    return style.Drawn(shown.name, figure, title, " ".join([*caption, *absent, scale_sentence(config)]))


def model_and_task(config: Config, model: str, tasks: tuple[str, ...]) -> str:
    task = root_of(tasks[0])
    return config.models[model].title + (f" ({task})" if task != "preference" else "")


def _values(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The probes that measured both; what is not finite is told in the head and not drawn."""
    if not {x, y} <= set(frame):
        return pd.DataFrame(columns=[x, y], dtype=float)
    return frame[[x, y]].replace([np.inf, -np.inf], np.nan).dropna()


def _title(config: Config, shown: Curves, x: str, y: str) -> str:
    reward = probe_reward(config, shown)
    name = "Reward" if reward is None else f"Reward ({config.metrics[reward].title})"
    if x == "kl":
        return f"{name} against KL"
    titles = {"reward": name, "kl": "Distance from the untuned model", BLURS: "Sharpness: falls where pictures blur"}
    return titles.get(y) or metric_title(config, y)


def _label(config: Config, name: str) -> str:
    if name in ("update", "kl"):
        return {"update": UPDATE, "kl": KL}[name]
    return "Reward" if name == "reward" else metric_title(config, name)


def _panel(config: Config, panel: Axes, x: str, y: str, shown: Curves, every: list) -> None:
    labelled = set()
    for row, _, frame in every:
        label = None if row.label in labelled else short(row.label)
        labelled.add(row.label)
        values = _values(frame, x, y)
        panel.plot(values[x], values[y], label=label, **style.method_style(config, row.method))
    if not any(len(_values(frame, x, y)) for *_, frame in every):
        panel.text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])
    panel.set(title=_title(config, shown, x, y), xlabel=_label(config, x), ylabel=_label(config, y))
    highest = max((_values(frame, "update", "kl")["kl"].max() for *_, frame in every), default=0)
    for name, axis in (("x", x), ("y", y)):
        if axis == "kl" and highest > 0:  # two decades, and below them linear, as it begins at 0
            getattr(panel, f"set_{name}scale")("symlog", linthresh=10.0 ** math.floor(math.log10(highest) - 1))
            getattr(panel, f"{name}axis").set_major_formatter("{x:g}")


def _untuned(panel: Axes, y: str, every: list) -> int:
    """A fine line at the value before the first update, or one for each of a few; how many."""
    if y == "kl":
        return 0
    first = [values.loc[values["update"] == 0, y] for *_, frame in every if len(values := _values(frame, "update", y))]
    levels = pd.concat(first) if first else pd.Series(dtype=float)
    distinct = [level for i, level in enumerate(levels) if not np.isclose(levels.iloc[:i], level, rtol=1e-4).any()]
    if not 0 < len(distinct) <= FEW_LEVELS:
        return 0
    for i, level in enumerate(distinct):
        panel.axhline(level, label=None if i else "untuned", zorder=1, **style.UNTUNED_LINE)
    return len(distinct)


def _without(every: list) -> dict[str, list[str]]:
    """What is not there -> names of the runs without it."""
    found: dict[str, list[str]] = {}
    for _, name, frame in every:
        if frame.empty:
            found.setdefault("No probes", []).append(name)
            continue
        if np.isinf(frame.to_numpy()).any():
            found.setdefault("Not finite in some probes", []).append(name)
        for column, what in (("reward", "No reward measured"), ("kl", "No KL (deterministic sampler)")):
            if frame[column].isna().all():
                found.setdefault(what, []).append(name)
        if BLURS not in frame:
            found.setdefault("No sharpness measured", []).append(name)
    return found


def _some(names: list[str]) -> str:
    rest = len(names) - SEVERAL
    return ", ".join(names[:SEVERAL]) + (f" and {rest} more" if rest > 0 else "")
