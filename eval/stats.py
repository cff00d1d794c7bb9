"""Estimates with 95 % intervals from per-image scores; the unit is the prompt, not the image.

The images of a prompt are averaged first, then prompts are resampled (scipy's bootstrap: BCa, or
percentile where BCa is undefined). Two rows are compared on the same prompts and noise, so their
prompts are resampled together. With `strata` (a subject for each score) a mean is the mean of the
strata's means, each counting once, and prompts are resampled within them. No torch.
"""

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from pso.provenance import UserError

LEVEL = 0.95
NUM_FLIPS = 9_999  # sign flips of the permutation test: enough for Holm over 249 claims (smallest_p)
BATCH = 500  # resamples held in memory at once


class Undefined(UserError):
    """These scores have no such estimate."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. n_images: images on each side (pairs, in a comparison)."""

    value: float
    low: float
    high: float
    n_images: int
    n_prompts: int
    p_value: float | None = None  # two-sided


def prompt_means(clusters: ArrayLike, *sides: ArrayLike) -> np.ndarray:
    """[sides, prompts]: mean over the images of each prompt, prompts in sorted order."""
    columns = [np.asarray(side, dtype=np.float64) for side in sides]
    clusters = np.asarray(clusters)
    lengths = [len(column) for column in columns]
    if set(lengths) != {len(clusters)}:
        raise UserError(f"scores and prompts do not pair up: {lengths} scores for {len(clusters)} prompt ids.")
    num_bad = int(sum((~np.isfinite(column)).sum() for column in columns))
    if num_bad:
        raise UserError(f"{num_bad} of {sum(lengths)} scores are not finite; score those images again.")
    means = pd.DataFrame(np.stack(columns, axis=1)).groupby(clusters).mean().to_numpy().T
    if means.shape[1] < 2:
        raise Undefined(f"an interval needs at least 2 prompts; these scores have {means.shape[1]}.")
    return means


def strata_of(clusters: ArrayLike, strata: ArrayLike | None) -> list[np.ndarray] | None:
    """Places of each stratum's prompts in the order of `prompt_means`."""
    if strata is None:
        return None
    of_prompt = pd.Series(np.asarray(strata)).groupby(np.asarray(clusters)).agg(["first", "nunique"])
    if (of_prompt["nunique"] > 1).any():
        raise UserError(f"prompt {of_prompt['nunique'].idxmax()} lies in several strata; expected one.")
    found = [np.flatnonzero(of_prompt["first"] == stratum) for stratum in of_prompt["first"].unique()]
    if min(map(len, found)) < 2:
        raise Undefined("an interval within strata needs at least 2 prompts in each of them.")
    return found


def _means(samples: tuple[np.ndarray, ...], strata: list[np.ndarray] | None) -> list[np.ndarray]:
    """The mean of each sample, or the mean of its strata's means; `strata` may hold one more axis of resamples."""
    if strata is None:
        return [sample.mean(-1) for sample in samples]
    return [sum(sample[places].mean(-1) for places in strata) / len(strata) for sample in samples]


def _identity(mean: np.ndarray) -> np.ndarray:
    return mean


def _interval(
    samples: tuple[np.ndarray, ...], of_means: Callable, resamples: int, seed: int, strata: list[np.ndarray] | None
) -> tuple[float, float, float]:
    """of_means(mean of each sample) and its bootstrap over prompts; `samples` are resampled together."""
    value = float(of_means(*_means(samples, strata)))

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:  # values, or places in each stratum
        if strata is None:
            return of_means(*_means(drawn, None))
        return of_means(*_means(samples, [places.astype(int) for places in drawn]))

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():  # undefined BCa is the case that the second method is for
            warnings.simplefilter("ignore", (stats.DegenerateDataWarning, RuntimeWarning))
            result = stats.bootstrap(
                samples if strata is None else strata,
                statistic,
                paired=strata is None,
                vectorized=True,
                n_resamples=resamples,
                batch=BATCH,
                confidence_level=LEVEL,
                method=method,
                rng=np.random.default_rng(seed),
            )
        # resamples of one constant differ from it in the last bit
        if np.ptp(result.bootstrap_distribution) <= 1e-12 * max(1.0, abs(value)):
            return value, value, value
        if np.isfinite(result.confidence_interval).all():
            break
    return value, float(result.confidence_interval.low), float(result.confidence_interval.high)


def _sign_flip_p(differences: np.ndarray, seed: int, strata: list[np.ndarray] | None) -> float:
    """Two-sided p of `the mean difference is 0`: exact for few prompts, else from random sign flips."""
    if strata is not None:  # so that their mean is that of the strata's means
        weights = np.empty_like(differences)
        for places in strata:
            weights[places] = len(differences) / (len(strata) * len(places))
        differences = weights * differences
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_FLIPS,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def smallest_p(n_prompts: int) -> float:
    """The smallest p-value that the sign-flip test can give for so many prompts."""
    return 2.0 / min(2.0 ** min(n_prompts, 64), NUM_FLIPS + 1)


def mean(scores: ArrayLike, clusters: ArrayLike, strata: ArrayLike | None = None) -> float:
    """The mean over prompts of one row, as `mean_interval` has it, without an interval."""
    means, within = prompt_means(clusters, scores), strata_of(clusters, strata)
    return float(_means((means[0],), within)[0])


def mean_interval(
    scores: ArrayLike, clusters: ArrayLike, resamples: int, seed: int, strata: ArrayLike | None = None
) -> Estimate:
    """The mean over prompts of one row."""
    means, within = prompt_means(clusters, scores), strata_of(clusters, strata)
    found = _interval((means[0],), _identity, resamples, seed, within)
    return Estimate(*found, len(np.asarray(scores)), means.shape[1])


def paired_difference(
    left: ArrayLike,
    right: ArrayLike,
    clusters: ArrayLike,
    resamples: int,
    seed: int,
    bound: float = 0.0,
    strata: ArrayLike | None = None,
) -> Estimate:
    """Mean of left - right over prompts; the p-value is that of `the mean difference is bound`."""
    means, within = prompt_means(clusters, left, right), strata_of(clusters, strata)
    differences = means[0] - means[1]
    found = _interval((differences,), _identity, resamples, seed, within)
    p_value = _sign_flip_p(differences - bound, seed, within)
    return Estimate(*found, len(np.asarray(left)), means.shape[1], p_value)


def paired_ratio(
    left: ArrayLike,
    right: ArrayLike,
    clusters: ArrayLike,
    resamples: int,
    seed: int,
    bound: float = 1.0,
    strata: ArrayLike | None = None,
) -> Estimate:
    """Mean of left over mean of right; the p-value is that of `the ratio is bound`."""
    means, within = prompt_means(clusters, left, right), strata_of(clusters, strata)
    if means[1].min() <= 0:
        raise Undefined("a ratio needs scores above 0 on its right side; use a difference.")
    found = _interval((means[0], means[1]), operator.truediv, resamples, seed, within)
    p_value = _sign_flip_p(means[0] - bound * means[1], seed, within)
    return Estimate(*found, len(np.asarray(left)), means.shape[1], p_value)


def win_rate(
    left: ArrayLike,
    right: ArrayLike,
    clusters: ArrayLike,
    resamples: int,
    seed: int,
    tie_margin: float = 0.0,
    strata: ArrayLike | None = None,
) -> Estimate:
    """Share of prompts on which left is above right; a difference of up to tie_margin counts half."""
    means, within = prompt_means(clusters, left, right), strata_of(clusters, strata)
    differences = means[0] - means[1]
    wins = np.where(np.abs(differences) <= tie_margin, 0.5, differences > 0)
    found = _interval((wins,), _identity, resamples, seed, within)
    return Estimate(*found, len(np.asarray(left)), means.shape[1])


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, in the order given."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted
