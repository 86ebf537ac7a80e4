"""Bounds of one proportion."""

from __future__ import annotations

from scipy import stats

from defaker_opt.statistics import check_share


def clopper_pearson_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound, such as of a flip rate; with 0 of n about 3/n at 95 %. Clopper and Pearson 1934."""
    check_share("confidence", confidence)
    assert 0 <= successes <= trials, f"{successes} of {trials}"
    if successes == trials:
        return 1.0
    return float(stats.beta.ppf(confidence, successes + 1, trials - successes))


def unseen_change(clusters: int, confidence: float) -> float:
    """How far a mean of changes in −1…1 can be from 0 where none of so many clusters changed.

    With n clusters, more than a share 1 − tail^(1/n) of them would have shown at least one change.
    """
    return float(1 - ((1 - confidence) / 2) ** (1 / max(clusters, 1)))
