"""What sections about scores agree on: which metrics they show, which first, and which row a row is held against."""

from eval.tables import TRAINED_ON, all_metrics
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.runs import metric_missing

BESIDE = (
    "hps_v21",
    "sharpness",
    "style",
)  # of what the paper's tables lack: another judge, and what a change looks like
FIRST = (
    "hps_v21",
    "image_reward",
    "aesthetic_score",
)  # judges that are looked at before others, if nobody trained on them


def judged(config: Config, table: TableEntry) -> list[str]:
    """The paper's metrics of a table and those BESIDE them, of what has numbers at this scale."""
    extra = [metric for metric in all_metrics(table) if metric in (*table.metrics, *BESIDE)]
    return [metric for metric in extra if metric_missing(config, table, metric) is None]


def two_first(config: Config, table: TableEntry) -> list[str]:
    """PickScore, and a metric that no row of the table was trained on; without PickScore the table's first two."""
    metrics = judged(config, table)
    rewards = {reward_of(config, row) for row in table.shown_rows}
    others = [metric for metric in [*FIRST, *metrics] if metric in metrics and metric not in {*rewards, "pick_score"}]
    first = "pick_score" if "pick_score" in table.metrics[:1] and "pick_score" in metrics else None
    return [first, *others[:1]] if first else metrics[:2]


def reward_of(config: Config, row: Row) -> str | None:
    return None if row.method == UNTUNED else config.methods[row.method].reward


def marked(config: Config, row: Row, metric: str, label: str) -> str:
    """The label, with a sign where the metric was the row's training reward."""
    return f"{label} {TRAINED_ON}" if reward_of(config, row) == metric else label


def untuned_of(table: TableEntry, row: Row) -> Row | None:
    """The row of the same model and steps before anything was trained, where the table shows it."""
    if row.method == UNTUNED:
        return None
    same = ((row.model, row.steps, UNTUNED) == (one.model, one.steps, one.method) for one in table.shown_rows)
    return next((one for one, fits in zip(table.shown_rows, same, strict=True) if fits), None)
