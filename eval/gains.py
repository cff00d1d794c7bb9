"""What tuning gained against what it took: scores of a model's rows, with intervals, over UNet forwards. No torch.

All rows are scored on the same prompts and noise. So the interval of a row is that of its difference to the untuned
row, set at the row's own score: it leaves out the untuned level where the two differ.

UNet forwards are counted (run.json: pictures through the network forward, probes too, backward not), so they do not
depend on the machine. GPU-hours are told where a run had a GPU: seconds of the job times its processes.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from eval import style
from eval.cost import gpu_hours
from eval.curves import model_and_task
from eval.scores import ScoreFiles, Scores, metric_title, run_folders
from eval.tables import scale_sentence
from eval.wins import by_prompt, mean_intervals
from pso.entries import UNTUNED, Config, Row
from pso.figures import Cost, short
from pso.provenance import UserError, read_json
from pso.trained_on import trained_on

COUNTED = ("unet_forwards", "reward_queries", "gpu_hours")
APART = 0.03  # of the axis: points of equal cost


def spent(config: Config, results: Path, row: Row, tasks: tuple[str, ...]) -> dict[str, float]:
    """COUNTED, means over the runs of a tuned row; 0 where there is none."""
    found = []
    for task in tasks:
        for folder in run_folders(config, results, task, row).values():
            path = folder / "run.json"
            if not path.exists():
                raise UserError(f"{path} is not there; run `snakemake --cores 2` first.")
            run = read_json(path)
            found.append({"reward_queries": 0, **run["cost"], "gpu_hours": gpu_hours(run) or 0.0})
    return pd.DataFrame(found)[list(COUNTED)].mean().to_dict()


def gains(config: Config, results: Path, shown: Cost, files: ScoreFiles | None = None) -> pd.DataFrame:
    """label, method, eval_set, metric, value, low, high and COUNTED (missing for the untuned row), a line per cell.

    files: what has been read already.
    """
    files, lines = files or ScoreFiles(config, results), []
    took = {row.label: spent(config, results, row, shown.tasks) for row in shown.rows if row.method != UNTUNED}
    base = next((place for place, row in enumerate(shown.rows) if row.method == UNTUNED), None)
    for eval_set in shown.eval_sets:
        for metric in shown.metrics:
            scores = [files(row, eval_set, metric, shown.tasks) for row in shown.rows]
            for row, cell in zip(shown.rows, _cells(config, scores, base), strict=True):
                place = {"label": row.label, "method": row.method, "eval_set": eval_set, "metric": metric}
                lines.append(place | cell | took.get(row.label, dict.fromkeys(COUNTED)))
    return pd.DataFrame(lines).astype(dict.fromkeys(COUNTED, float))


def _cells(config: Config, scores: list[Scores], base: int | None) -> list[dict[str, float]]:
    """value, low and high of each row; ends of others than the base are those of the difference to it, moved."""
    means, strata = by_prompt(scores)
    if base is not None:
        others = np.arange(len(means)) != base
        means = np.concatenate([means, means[others] - means[base]])
    value, low, high = mean_intervals(
        means, strata, config.scale_entry.bootstrap_resamples, config.scale_entry.eval_seed
    )
    count = len(scores)
    ends = np.stack([low, high])[:, :count]
    if base is not None:
        ends[:, others] = value[:count][others] + np.stack([low, high])[:, count:] - value[count:]
    return [dict(zip(("value", "low", "high"), cell, strict=True)) for cell in zip(value[:count], *ends, strict=True)]


@style.look()
def cost(config: Config, shown: Cost, frame: pd.DataFrame) -> style.Drawn:
    """A panel for each metric and eval set: a point with its interval for each row, a line for the untuned one.

    frame: `gains` of the same.
    """
    wide, lines = len(shown.eval_sets), len(shown.metrics)
    figure = Figure(figsize=(style.WIDTH, 2.7 * lines + 1.4), layout="constrained")
    panels = figure.subplots(lines, wide, squeeze=False, sharex=True)
    for metric, row in zip(shown.metrics, panels, strict=True):
        for eval_set, panel in zip(shown.eval_sets, row, strict=True):
            here = frame[(frame["metric"] == metric) & (frame["eval_set"] == eval_set)]
            _panel(config, panel, here)
            panel.set(title=f"{metric_title(config, metric)}, {eval_set}")
        row[0].set(ylabel=metric_title(config, metric))
    for panel in panels[-1]:
        panel.set(xlabel="UNet forwards of tuning")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    title = f"{model_and_task(config, shown.rows[0].model, shown.tasks)}: scores against the cost of tuning"
    style.head(figure, f"{title}. Scale {config.scale}.")
    told = [f"{title}.", *_told(config, shown), scale_sentence(config)]
    return style.Drawn(shown.name, figure, title, " ".join(told))


def _panel(config: Config, panel: Axes, here: pd.DataFrame) -> None:
    untuned, tuned = here[here["method"] == UNTUNED], here[here["method"] != UNTUNED]
    for line, place in zip(tuned.itertuples(), beside(tuned["unet_forwards"]), strict=True):
        panel.errorbar(
            place,
            line.value,
            [[line.value - line.low], [line.high - line.value]],
            capsize=2.5,
            elinewidth=1.2,
            label=_legend(line),
            **style.method_style(config, line.method) | {"linestyle": "none"},
        )
    for line in untuned.itertuples():
        panel.axhline(line.value, label="untuned", **style.UNTUNED_LINE)
    panel.set_xscale("log")
    costs = tuned["unet_forwards"]
    narrow = costs.max() < 5 * costs.min()
    panel.xaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=(1, 2, 5), numticks=8))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())


def beside(costs: pd.Series) -> np.ndarray:
    """Places on a logarithmic axis: equal costs stand side by side, a little apart."""
    costs = costs.to_numpy(float)
    apart = max(np.ptp(np.log(costs)), 0.2) * APART
    same = costs[:, None] == costs
    number, many = np.tril(same, -1).sum(1), same.sum(1)
    return costs * np.exp(apart * (number - (many - 1) / 2))


def _legend(line) -> str:
    """The row, and what it took beside UNet forwards."""
    told = [f"{line.reward_queries:,.0f} reward queries"] if line.reward_queries else []
    told += [f"{line.gpu_hours:.1f} GPU-hours"] if line.gpu_hours else []
    return short(line.label) + (f" ({', '.join(told)})" if told else "")


def _told(config: Config, shown: Cost) -> list[str]:
    told = ["Mean score of each tuned row on test prompts; points of equal cost stand side by side."]
    if any(row.method == UNTUNED for row in shown.rows):
        told.append("Fine dashes: the untuned model; bars: 95 % intervals of the difference to it on the same prompts.")
    else:
        told.append("Bars: 95 % intervals over prompts.")
    told.append("They do not cover the training seed.")
    if len(shown.tasks) * len(config.seeds) > 1:
        told.append("Costs are means over the runs of a row.")
    told += [
        f"Some rows were trained on {metric_title(config, metric)} or a copy of it."
        for metric in shown.metrics
        if any(trained_on(config, row.method, metric) for row in shown.rows)
    ]
    return [*told, "UNet forwards: pictures through the network, the backward pass not counted."]
