"""Bias-corrected and accelerated bootstrap over clusters, for any figure that can be computed from weighted rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from defaker_opt.errors import DefakerError
from defaker_opt.statistics import Floats, Interval, check_share
from defaker_opt.statistics.intervals import unseen_change

# Weights of rows [B, N] → figures [B, M]; NaN where the weights leave a figure undefined.
Figures = Callable[[Floats], Floats]

# Cells of one block of weights: 32 MB, so memory does not grow with rows times resamples.
_BLOCK_CELLS = 4_000_000
# More clusters than this are left out by groups; the acceleration needs no more.
_JACKKNIFE_GROUPS = 400
# If more resamples than this leave a figure undefined, the rest is no sample of it.
_UNDEFINED_SHARE = 0.05
# With fewer, 95 % intervals were seen to cover 84 … 92 % (profiling/coverage.py).
FEWEST_CARRIERS = 10.0


@dataclass(frozen=True)
class Bootstrap:
    """estimate [M]; replicates [B, M], NaN where undefined; acceleration, carriers [M] from the jackknife.

    carriers: the number of clusters that would spread a figure as much if all spread it alike. A change that rests on
    fewer than `FEWEST_CARRIERS`, such as two collapsed masks, is too rare in the sample for its interval to be right.
    """

    estimate: Floats
    replicates: Floats
    acceleration: Floats
    carriers: Floats
    clusters: int

    @property
    def undefined(self) -> NDArray[np.int64]:
        """How many resamples left each figure undefined [M]."""
        missing: NDArray[np.int64] = np.isnan(self.replicates).sum(axis=0)
        return missing


def bootstrap_clusters(figures: Figures, clusters: ArrayLike, resamples: int = 2000, seed: int = 0) -> Bootstrap:
    """Draw whole clusters with replacement; clusters [N] says which one each row belongs to.

    Drawing is done by weights: a row counts as often as its cluster was drawn. Raises DefakerError if a figure is
    undefined on the rows themselves, or in more than 5 % of the resamples. Efron 1987, "Better bootstrap confidence
    intervals"; clusters as in Field and Welsh 2007, "Bootstrapping clustered data".
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    estimate = figures(np.ones((1, len(index))))[0]
    random = np.random.default_rng(seed)
    chances, step = np.full(count, 1 / count), max(1, _BLOCK_CELLS // len(index))
    replicates = [
        figures(random.multinomial(count, chances, size=min(step, resamples - start))[:, index].astype(np.float64))
        for start in range(0, resamples, step)
    ]
    # Without its only cluster there would be nothing left.
    still = np.zeros(len(estimate))
    acceleration, carriers = _jackknife(figures, index, count, random) if count > 1 else (still, still)
    result = Bootstrap(estimate, np.concatenate(replicates), acceleration, carriers, count)
    _refuse_undefined(result)
    return result


def _refuse_undefined(result: Bootstrap) -> None:
    share = float(result.undefined.max()) / len(result.replicates)
    if np.isnan(result.estimate).any() or share > _UNDEFINED_SHARE:
        raise DefakerError(
            f"a figure is undefined in {share:.0%} of the resamples of {result.clusters} clusters (at most "
            f"{_UNDEFINED_SHARE:.0%} may be): too few images of one class; add images or leave the figure out"
        )


def _jackknife(
    figures: Figures, index: NDArray[np.intp], count: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Acceleration: a sixth of the skewness of the figure without one cluster (Efron 1987, equation 7.3); carriers.

    Both [M], and 0 where nothing changes.
    """
    groups = min(count, _JACKKNIFE_GROUPS)
    # Every cluster is in one group, and groups differ by at most one cluster.
    group_of_row = (random.permutation(count) % groups)[index]
    step = max(1, _BLOCK_CELLS // len(index))
    left_out = np.concatenate(
        [
            figures((group_of_row != np.arange(start, min(start + step, groups))[:, None]).astype(np.float64))
            for start in range(0, groups, step)
        ]
    )
    deviation = np.nan_to_num(np.nanmean(left_out, axis=0) - left_out)
    square = (deviation**2).sum(axis=0)
    # Groups need no correction: they are less skewed than clusters, but just as much fewer.
    acceleration, carriers = np.zeros(len(square)), np.zeros(len(square))
    np.divide((deviation**3).sum(axis=0), 6 * square**1.5, out=acceleration, where=square > 1e-30)
    np.divide(square**2, (deviation**4).sum(axis=0), out=carriers, where=square > 1e-30)
    return acceleration, carriers


def bca_interval(result: Bootstrap, figure: int, confidence: float = 0.95, within: Interval | None = None) -> Interval:
    """Two-sided BCa interval of one figure; within: where the figure can lie, −1…1 unless said.

    Quantiles are those of Student's t over clusters, widened by √(K / (K − 1)), as resampling K clusters
    understates their spread (Hesterberg 2015, section 4.3, "expanded percentile"). If no resample differs from the
    estimate, nothing changed in any cluster, and the interval is what `unseen_change` allows.
    """
    check_share("confidence", confidence)
    within = within or Interval(-1.0, 1.0)
    estimate, values = float(result.estimate[figure]), _defined(result, figure)
    if np.ptp(values) < 1e-12:
        half = unseen_change(result.clusters, confidence)
        return Interval(max(within.low, estimate - half), min(within.high, estimate + half))
    tail = _expanded_tail((1 - confidence) / 2, result.clusters)
    bias, acceleration = _bias(values, estimate), float(result.acceleration[figure])
    shares = [_adjusted(float(stats.norm.ppf(share)), bias, acceleration) for share in (tail, 1 - tail)]
    low, high = np.quantile(values, stats.norm.cdf(shares))
    return Interval(float(low), float(high))


def bca_p(result: Bootstrap, figure: int, value: float) -> float:
    """One-sided p of "the figure is `value` or more", at least 1 / (resamples + 1).

    The confidence at which the upper BCa bound is `value`: DiCiccio and Efron 1996, section 3.
    """
    values, estimate = _defined(result, figure), float(result.estimate[figure])
    if np.ptp(values) < 1e-12:
        return float(min(1.0, max(0.0, 1 - (value - estimate)) ** result.clusters)) if value > estimate else 1.0
    least = 1 / (len(values) + 1)
    equal = np.abs(values - value) < 1e-12
    below = float(np.clip(((values < value) & ~equal).mean() + equal.mean() / 2, least, 1 - least))
    bias, acceleration = _bias(values, estimate), float(result.acceleration[figure])
    shifted = float(stats.norm.ppf(below)) - bias
    z = shifted / max(1 + acceleration * shifted, 1e-6) - bias
    clusters = result.clusters
    return float(np.clip(stats.t.sf(z * np.sqrt((clusters - 1) / clusters), max(clusters - 1, 1)), least, 1.0))


def _defined(result: Bootstrap, figure: int) -> Floats:
    values: Floats = result.replicates[:, figure]
    return values[~np.isnan(values)]


def _bias(values: Floats, estimate: float) -> float:
    """Normal quantile of the share of resamples below the estimate; those equal to it count half."""
    equal = np.abs(values - estimate) < 1e-12
    share = ((values < estimate) & ~equal).mean() + equal.mean() / 2
    least = 1 / (len(values) + 1)
    return float(stats.norm.ppf(np.clip(share, least, 1 - least)))


def _adjusted(z: float, bias: float, acceleration: float) -> float:
    """Efron 1987, equation 6.8. Far in a tail the correction turns back; it is held at the end instead."""
    shifted = bias + z
    scale = 1 - acceleration * shifted
    return bias + (shifted / scale if scale > 1e-3 else np.sign(shifted) * 1e3)


def _expanded_tail(tail: float, clusters: int) -> float:
    return float(stats.norm.sf(np.sqrt(clusters / (clusters - 1)) * stats.t.isf(tail, clusters - 1)))
