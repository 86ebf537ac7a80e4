"""Quantiles of samples, and intervals for the ratio of two builds' times on a machine that is never quiet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_RESAMPLES = 2000
_QUARTER = 0.25
# Beyond this many pairs the rank sum is as good as normal.
_EXACT_PAIRS = 60


@dataclass(frozen=True)
class Quantiles:
    """Of `n` samples in milliseconds."""

    n: int
    median: float
    p90: float
    p99: float
    smallest: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, above 1 where the second is slower, with the interval that holds it at CONFIDENCE."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Median, 90 and 99 % quantile; the last is the largest sample where there are fewer than a hundred."""
    values = np.asarray(samples, np.float64)
    p90, p99 = np.quantile(values, [0.9, 0.99], method="inverted_cdf")
    return Quantiles(len(values), float(np.median(values)), float(p90), float(p99), float(values.min()))


def paired_ratio(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Ratio second / first from pairs that ran one right after the other, in an order drawn for every second pair and
    turned round for the next.

    Estimate and interval are those of the signed ranks of log ratios (Hodges and Lehmann 1963). As the order within a
    pair is drawn, the sign of each log ratio of equal builds is a fair coin whatever the machine did meanwhile, so the
    interval's confidence needs no normal noise; what the order does cancels. With fewer than six pairs it is unbounded.
    """
    logs = np.log(np.asarray(second, np.float64)) - np.log(np.asarray(first, np.float64))
    rows, columns = np.triu_indices(len(logs))
    averages = np.sort((logs[rows] + logs[columns]) / 2)
    value = float(np.exp(np.median(averages)))
    skipped = _rank_quantile(len(logs), (1 - confidence) / 2)
    if skipped < 0:
        return Ratio(value, 0.0, math.inf, len(logs))
    low, high = averages[skipped], averages[len(averages) - 1 - skipped]
    return Ratio(value, float(np.exp(low)), float(np.exp(high)), len(logs))


def _rank_quantile(pairs: int, tail: float) -> int:
    """The largest k with P(signed-rank sum <= k) <= tail for equal builds; -1 if there is none."""
    total = pairs * (pairs + 1) // 2
    if pairs > _EXACT_PAIRS:
        deviation = math.sqrt(pairs * (pairs + 1) * (2 * pairs + 1) / 24)
        return max(-1, math.floor(total / 2 - _normal_quantile(1 - tail) * deviation) - 1)
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in range(1, pairs + 1):
        shifted = np.zeros_like(ways)
        shifted[rank:] = ways[: total + 1 - rank]
        ways = (ways + shifted) / 2
    return int(np.searchsorted(np.cumsum(ways), tail, side="right")) - 1


def _normal_quantile(probability: float) -> float:
    """By bisection of the error function; devices have no scipy."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < probability else (low, middle)
    return low


def unpaired_ratio(first: Sequence[float], second: Sequence[float], blocks: int = 10, seed: int = 0) -> Ratio:
    """Ratio of lower quartiles of two separate runs, by the bootstrap of blocks of successive samples (Kuensch 1989).

    Other work only ever adds time, so what is below the median says more of the build and less of the machine. Blocks
    keep what the machine did for a while together. What differed for a whole run is not in the interval.
    """
    generator = np.random.default_rng(seed)
    one, other = (_block_quartiles(np.asarray(each, np.float64), blocks, generator) for each in (first, second))
    low, high = np.quantile(other / one, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.quantile(second, _QUARTER) / np.quantile(first, _QUARTER))
    return Ratio(value, float(low), float(high), min(len(first), len(second)))


def _block_quartiles(samples: Floats, blocks: int, generator: np.random.Generator) -> Floats:
    length = max(1, len(samples) // blocks)
    count = -(-len(samples) // length)
    starts = generator.integers(0, len(samples) - length + 1, (_RESAMPLES, count))
    picked = samples[(starts[:, :, None] + np.arange(length)).reshape(_RESAMPLES, -1)[:, : len(samples)]]
    quartiles: Floats = np.quantile(picked, _QUARTER, axis=1)
    return quartiles


def difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    """Median of paired differences second - first in their own unit, and its interval from order statistics.

    Valid for the same reason as `paired_ratio`: the number of positive differences of equal builds is binomial.
    """
    differences = np.sort(np.asarray(second, np.float64) - np.asarray(first, np.float64))
    count = len(differences)
    chances = np.cumsum([math.comb(count, k) for k in range(count + 1)]) / 2.0**count if count < 1000 else None
    if chances is None:
        skipped = math.floor(count / 2 - _normal_quantile((1 + confidence) / 2) * math.sqrt(count) / 2) - 1
    else:
        skipped = int(np.searchsorted(chances, (1 - confidence) / 2, side="right")) - 1
    if skipped < 0:
        return float(np.median(differences)), -math.inf, math.inf
    return float(np.median(differences)), float(differences[skipped]), float(differences[count - 1 - skipped])
