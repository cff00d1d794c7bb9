"""Untuned rows against the paper's cells: nothing was trained in them, so what is off is a scorer or the protocol.

Only where weights, data and judges are the published ones (`hub: fetched`). No torch.
"""

import math

import pandas as pd

from eval.paper import DOUBTFUL, load_reference, reference_file
from eval.scores import metric_title
from pso.entries import UNTUNED, Config, TableEntry

WITHIN, OFF = "within", "off"
RULE = """\
*within*: |ours - paper| <= sqrt(2) h + half a unit of the last printed digit, with h the distance from our mean to that
end of its 95 % interval (bootstrap over prompts) which lies on the paper's side; else *off*. The paper states no
variance and has one image per prompt, so its own mean is taken to be as uncertain as ours, and the two are added in
quadrature. Both means are over the same prompts: the rule is generous, so a cell that is off is hardly chance."""


def is_held(config: Config) -> bool:
    """Whether untuned rows of this scale may be held against the paper's: the same models, data and judges."""
    return config.scale_entry.hub == "fetched"


def judge(cell: pd.Series, ours: float, low: float, high: float) -> dict:
    """Our mean with its 95 % interval against a cell of the paper, by RULE."""
    side = ours - low if cell["value"] < ours else high - ours
    tolerance = math.sqrt(2) * side + 0.5 * 10.0 ** -int(cell["decimals"])
    difference = ours - cell["value"]
    verdict = WITHIN if abs(difference) <= tolerance else OFF
    return {"difference": difference, "tolerance": tolerance, "verdict": verdict}


def cells(table: TableEntry, name: str) -> pd.DataFrame:
    """The paper's cells of a table's untuned rows; none for a table that the paper does not have."""
    if not reference_file(name).exists():
        return pd.DataFrame()
    reference = load_reference(name)
    rows = {row.label: row.method for row in table.rows}
    of = reference["label"].map(rows).fillna(reference["method"])  # a missing row of ours has no method
    return reference[of == UNTUNED]


def sentence(config: Config, cell: pd.Series, ours: float, low: float, high: float) -> str:
    """`SDXL-DMD2, CLIP, pickapic_test: ours 0.3779 [0.3751, 0.3806], the paper's 0.3679`."""
    places = int(cell["decimals"]) + 1
    own = f"ours {ours:z.{places}f} [{low:z.{places}f}, {high:z.{places}f}]"
    doubt = f" {DOUBTFUL}" if cell["note"] else ""
    title = metric_title(config, cell["metric"])
    return f"{cell['label']}, {title}, {cell['eval_set']}: {own}, the paper's {cell['printed']}{doubt}"


def off(config: Config, name: str, measured: dict[tuple[str, str, str], tuple[float, float, float]]) -> list[str]:
    """A sentence for each untuned cell of a table that is off.

    measured: (eval set, label, metric) -> our mean and its interval.
    """
    if not is_held(config):
        return []
    found = []
    for _, cell in cells(config.table_entries[name], name).iterrows():
        ours = measured.get((cell["eval_set"], cell["label"], cell["metric"]))
        if ours is not None and judge(cell, *ours)["verdict"] == OFF:
            found.append(sentence(config, cell, *ours))
    return found


def warning(config: Config, named: list[str]) -> str | None:
    """One line that names the cells, or None."""
    if not named:
        return None
    cells_are = "1 untuned cell is" if len(named) == 1 else f"{len(named)} untuned cells are"
    return (
        f"Warning: {cells_are} off the paper's by more than the interval, which points at a scorer or at the protocol "
        f"(results/{config.scale}/calibrate.md, `snakemake calibrate`): {'; '.join(named)}."
    )
