"""What sections about scores agree on: which metrics they show, how they mark what a row was trained on. No torch."""

from eval.tables import TRAINED_ON
from pso.entries import Config, Row, TableEntry
from pso.runs import metric_missing
from pso.trained_on import trained_on

BESIDE = ("hps_v21", "sharpness", "style")  # not in the paper's tables: another judge, and what changes in a picture


def judged(config: Config, table: TableEntry) -> list[str]:
    """The paper's metrics of a table and those BESIDE them, of what has numbers at this scale."""
    shown = [*table.metrics, *(metric for metric in table.extra_metrics if metric in BESIDE)]
    return [metric for metric in shown if metric_missing(config, table, metric) is None]


def marked(config: Config, row: Row, metric: str, label: str) -> str:
    """The label, with a sign where the row was trained on the metric or a copy of it."""
    return f"{label} {TRAINED_ON}" if trained_on(config, row.method, metric) else label
