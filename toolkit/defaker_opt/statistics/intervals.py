"""Intervals of one proportion: `successes` of `trials` independent pictures; `confidence` is 0…1, such as 0.95."""

from __future__ import annotations

import math

from scipy import stats

from defaker_opt.statistics import Interval, check_share


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Two-sided exact interval, never below its confidence; 0…1 without trials. Clopper and Pearson 1934."""
    tail = (1 - confidence) / 2
    return Interval(
        clopper_pearson_lower(successes, trials, 1 - tail),
        clopper_pearson_upper(successes, trials, 1 - tail),
    )


def clopper_pearson_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound, such as of a flip rate; with 0 of n about 3/n at 95 %."""
    _check(successes, trials, confidence)
    if successes == trials:
        return 1.0
    return float(stats.beta.ppf(confidence, successes + 1, trials - successes))


def clopper_pearson_lower(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided exact lower bound."""
    _check(successes, trials, confidence)
    if successes == 0:
        return 0.0
    return float(stats.beta.ppf(1 - confidence, successes, trials - successes + 1))


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Two-sided score interval: right on average, so shorter than the exact one; 0…1 without trials. Wilson 1927."""
    _check(successes, trials, confidence)
    if trials == 0:
        return Interval(0.0, 1.0)
    z = float(stats.norm.isf((1 - confidence) / 2))
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At 0 and n of n the formula ends at 0 and 1, up to rounding.
    return Interval(
        0.0 if successes == 0 else max(0.0, middle - half), 1.0 if successes == trials else min(1.0, middle + half)
    )


def unseen_change(clusters: int, confidence: float) -> float:
    """How far a mean of changes in −1…1 can be from 0 where none of so many clusters changed.

    With n clusters, more than a share 1 − tail^(1/n) of them would have shown at least one change.
    """
    return float(1 - ((1 - confidence) / 2) ** (1 / max(clusters, 1)))


def _check(successes: int, trials: int, confidence: float) -> None:
    check_share("confidence", confidence)
    assert 0 <= successes <= trials, f"{successes} of {trials}"
