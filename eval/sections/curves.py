"""Section of report.html: what the probes measured while models were tuned, and scores over the cost of tuning."""

import pandas as pd
from markupsafe import Markup

from eval import style
from eval.curves import curves, runs
from eval.gains import cost, gains
from eval.scores import metric_title
from eval.sections.page import Context, render
from eval.tables import digits
from pso import figures
from pso.entries import UNTUNED, Config, Row

TITLE = "Curves and cost"
WHY_NONE = "No row of these tables was tuned, so there are no probes and no cost of tuning."
ENDS = ["value", "low", "high"]
NAMES = {"update": "Update", "reward": "Reward", "kl": "KL per element"}


def section(context: Context) -> str | None:
    config, results = context.config, context.results
    found = []
    for shown in figures.curves(config):
        every = runs(config, results, shown)
        found.append((curves(config, shown, every), *probe_table(config, every)))
    for shown in figures.costs(config):
        frame = gains(config, results, shown, context.scores)
        found.append((cost(config, shown, frame), *cost_table(context, shown, frame)))
    shown = [{"title": d.title, "caption": d.caption, "svg": element(d), "heads": h, "lines": li} for d, h, li in found]
    return render("curves.html", figures=shown) if shown else None


def element(drawn: style.Drawn) -> Markup:
    return Markup(style.svg(drawn.figure, f"figure-{drawn.name}", drawn.title, drawn.caption))


def probe_table(config: Config, every: list[tuple[Row, str, pd.DataFrame]]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line per run of eval.curves.runs: its first probe and its last."""
    columns = list(dict.fromkeys(name for *_, frame in every for name in frame.columns))
    heads = ["Run", *(NAMES.get(name) or metric_title(config, name) for name in columns)]
    lines = []
    for _, name, frame in every:
        ends = frame.iloc[[0, -1]] if len(frame) else frame
        texts = [" → ".join(f"{v:.4g}" for v in ends[c].dropna()) if c in ends else "" for c in columns]
        lines.append([name, *texts])
    return heads, lines


def cost_table(context: Context, shown: figures.Cost, frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line per row: what it took, and its scores with their intervals."""
    config = context.config
    kinds = [(metric, eval_set) for metric in shown.metrics for eval_set in shown.eval_sets]
    hours = bool((frame["gpu_hours"] > 0).any())
    heads = ["Row", "UNet forwards", "Reward queries", *(["GPU-hours"] * hours)]
    heads += [f"{metric_title(config, metric)}, {eval_set}" for metric, eval_set in kinds]
    lines = []
    for label, cells in frame.groupby("label", sort=False):
        first, of = cells.iloc[0], cells.set_index(["metric", "eval_set"])
        took = [f"{first['unet_forwards']:,.0f}", f"{first['reward_queries']:,.0f}"]
        took += [f"{first['gpu_hours']:.2f}"] * hours
        if first["method"] == UNTUNED:
            took = [""] * len(took)
        lines.append([str(label), *took, *(_cell(config, *of.loc[kind, ENDS], kind[0]) for kind in kinds)])
    return heads, lines


def _cell(config: Config, value: float, low: float, high: float, metric: str) -> str:
    places = digits(config.metrics[metric].decimals, [low, high])
    return f"{value:z.{places}f} [{low:z.{places}f}, {high:z.{places}f}]"
