"""How often one row of a table scores above another on the same prompts and noise, for every two of its rows. No torch.

The interval is that of eval.stats.win_rate, for all pairs of rows from one set of resamples. Where a row is above on
every prompt, or on none, resamples have no width; there the interval is the exact one of a share (Clopper and Pearson).
"""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from eval.scores import ScoreFiles, Scores, check_same_scorer, pair, per_image, table_entry, units
from eval.stats import BATCH, LEVEL, prompt_means, strata_of
from pso.entries import Config
from pso.provenance import UserError
from pso.runs import metric_missing

COLUMNS = ["left", "right", "win_rate", "low", "high", "prompts"]


def win_rates(
    config: Config, results: Path, table_name: str, metric: str, eval_set: str, files: ScoreFiles | None = None
) -> pd.DataFrame:
    """COLUMNS, for every left and every other right, labels in the table's order: the share of prompts on which left
    scores above right (equal scores count half), its 95 % interval, and how many prompts (or subjects) there are.

    Above is above, also of a metric that is better when lower. files: what has been read already.
    """
    table = table_entry(config, table_name)
    if eval_set not in table.eval_sets:
        raise UserError(f"{table_name} has no eval set {eval_set!r}; expected {' or '.join(table.eval_sets)}.")
    if reason := metric_missing(config, table, metric):
        raise UserError(f"{table_name} has no numbers of {metric!r}: {reason}; expected another metric.")
    files = files or ScoreFiles(config, results)
    rows = [files(row, eval_set, metric, table.tasks) for row in table.shown_rows]
    if len(rows) < 2:
        return pd.DataFrame(columns=COLUMNS)
    scale = config.scale_entry
    return _frame([row.label for row in rows], *by_prompt(rows), scale.bootstrap_resamples, scale.eval_seed)


def by_prompt(rows: list[Scores]) -> tuple[np.ndarray, list[np.ndarray]]:
    """[rows, prompts] (or subjects, where they are what is resampled), of the same images; places of each stratum."""
    check_same_scorer(rows)
    pairs = pair(rows[0], rows[0])  # the images, in order
    scores = [per_image(row) for row in rows]
    for other, found in zip(rows, scores, strict=True):
        if not found.index.equals(scores[0].index):  # both are sorted
            pair(rows[0], other)  # says what is not in both
    within = units(pairs)
    means = prompt_means(within["clusters"], *(found.to_numpy() for found in scores))
    return means, strata_of(**within) or [np.arange(means.shape[1])]


def _frame(labels: list[str], means: np.ndarray, strata: list[np.ndarray], resamples: int, seed: int) -> pd.DataFrame:
    """means: [rows, prompts]."""
    places = list(itertools.combinations(range(len(labels)), 2))
    left, right = np.array(places).T
    above = (np.sign(means[left] - means[right]) + 1) / 2  # [pairs, prompts]: 1, 0, or 1/2 where equal
    rate, low, high = shares(above, strata, resamples, seed)
    lines = {}
    for (i, k), *found in zip(places, rate, low, high, strict=True):
        lines[i, k] = found
        lines[k, i] = [1 - found[0], 1 - found[2], 1 - found[1]]
    prompts = means.shape[1]
    content = [[labels[i], labels[k], *map(float, lines[i, k]), prompts] for i, k in sorted(lines)]
    return pd.DataFrame(content, columns=COLUMNS)


def shares(
    above: np.ndarray, strata: list[np.ndarray], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of [pairs, prompts]: means over prompts (of the strata's means) and the ends of their intervals."""
    rate, low, high = mean_intervals(above, strata, resamples, seed)
    always, bound = np.ptp(above, axis=1) == 0, ((1 - LEVEL) / 2) ** (1 / above.shape[1])
    low[always & (rate == 1)], high[always & (rate == 0)] = bound, 1 - bound
    return rate, low, high


def mean_intervals(
    values: np.ndarray, strata: list[np.ndarray], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of [lines, prompts]: what eval.stats.mean_interval says of each line, for all from one set of resamples."""

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:  # places in each stratum
        # exact sums before the division: equal shares of two resamples have to be equal numbers
        sums = [values @ _counts(places.astype(int), values.shape[1]) / places.shape[-1] for places in drawn]
        return sum(sums) / len(drawn)

    asked = {"n_resamples": resamples, "batch": BATCH, "confidence_level": LEVEL, "vectorized": True}
    with warnings.catch_warnings():  # undefined BCa is the case that the percentiles are for
        warnings.simplefilter("ignore", (stats.DegenerateDataWarning, RuntimeWarning))
        first = stats.bootstrap(strata, statistic, method="BCa", rng=np.random.default_rng(seed), **asked)
    asked |= {"n_resamples": 0}
    second = stats.bootstrap(strata, statistic, method="percentile", bootstrap_result=first, **asked)
    ends = np.stack(first.confidence_interval), np.stack(second.confidence_interval)
    low, high = np.where(np.isfinite(ends[0]).all(0), *ends)
    mean = statistic(*strata, axis=-1)
    always = np.ptp(values, axis=1) == 0
    low[always], high[always] = mean[always], mean[always]
    return mean, low, high


def _counts(places: np.ndarray, prompts: int) -> np.ndarray:
    """[prompts, ...]: how often each prompt stands in the last axis."""
    flat = places.reshape(-1, places.shape[-1])
    at = flat + prompts * np.arange(len(flat))[:, None]
    counts = np.bincount(at.ravel(), minlength=prompts * len(flat)).astype(np.float64)
    return np.moveaxis(counts.reshape(*places.shape[:-1], prompts), -1, 0)
