"""How far a figure can be off, from what each independent group of pictures adds to its error; nothing is resampled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from defaker_opt.statistics import Floats, Interval, check_share
from defaker_opt.statistics.intervals import unseen_change

# The part of one more group, as far out as the farthest seen, that each end allows for: of an interval that is shown,
# and of one that decides. The first keeps the coverage of 95 % intervals near 95 %, the second keeps a drop of the
# limit from being accepted in more than about 5 % (profiling/coverage.py).
_UNSEEN_SHOWN = 0.2
_UNSEEN_DECIDING = 1.0
# With fewer, 95 % intervals were seen to cover too seldom (profiling/coverage.py).
FEWEST_CARRIERS = 5.0
# Halvings of a search for a p: enough for ten digits.
_HALVINGS = 40


@dataclass(frozen=True)
class Spread:
    """standard_error: of the estimate; skew: a sixth of the skewness of its error, −1/6…1/6 (acceleration in BCa).

    highest, lowest: the largest influence of a group to either side, ≥ 0. carriers: the number of groups that would
    spread the figure as much if all spread it alike; 0 where nothing varies.
    """

    estimate: float
    standard_error: float
    skew: float
    highest: float
    lowest: float
    carriers: float
    clusters: int


def spread_of(estimate: float, influence: Floats, clusters: NDArray[np.int64]) -> Spread:
    """influence [N], of each picture; clusters [N], numbers of the groups that are independent, 0 … K − 1."""
    summed = np.bincount(clusters, influence)
    count = len(summed)
    square = float((summed**2).sum())
    if square < 1e-24 or count < 2:
        return Spread(estimate, 0.0, 0.0, 0.0, 0.0, 0.0, count)
    return Spread(
        estimate=estimate,
        # The mean was taken from the same groups (Hesterberg 2015, section 4.3).
        standard_error=float(np.sqrt(square * count / (count - 1))),
        skew=float((summed**3).sum()) / (6 * square**1.5),
        highest=max(0.0, float(summed.max())),
        lowest=max(0.0, -float(summed.min())),
        carriers=square**2 / float((summed**4).sum()),
        clusters=count,
    )


def spread_interval(spread: Spread, confidence: float = 0.95, within: Interval | None = None) -> Interval:
    """Two-sided interval to be shown; within: where the figure can lie, −1…1 unless said.

    Each end is the farther one of two. One is Student's t over groups. The other follows the skew, as BCa would
    (without resampling, as in ABC: DiCiccio and Efron 1992, "More accurate confidence intervals in exponential
    families"), and allows for a fifth of one more group like the farthest seen, an idea from Fay and Feuer 1997,
    "Confidence intervals for directly standardized rates". Where few groups carry a change, neither is far enough
    alone. If nothing varied, the interval is what `unseen_change` allows.
    """
    return _ends(spread, confidence, within or Interval(-1.0, 1.0), _UNSEEN_SHOWN)


def deciding_interval(spread: Spread, confidence: float) -> Interval:
    """Two-sided interval that a limit is held against: as `spread_interval`, but it allows for one whole group more.

    A build that breaks rarely and badly is accepted on groups that happen not to show it; the guard is against that.
    """
    return _ends(spread, confidence, Interval(-1.0, 1.0), _UNSEEN_DECIDING)


def more_needed(spread: Spread, limit: float, confidence: float, power: float) -> float | None:
    """How many times the groups it would take for `deciding_interval` to be on one side of the limit with that power,
    if figure and skew stay what they are: errors shrink as 1/√n, what one more group adds as 1/n. If nothing varied, as
    many as make `unseen_change` smaller than the limit. None if the figure is the limit.
    """
    gap, side = abs(limit - spread.estimate), 1 if spread.estimate < limit else -1
    if gap < 1e-9:
        return None
    if spread.standard_error == 0:
        return float(np.log(1 - confidence) / np.log(1 - gap)) / spread.clusters
    sure, hoped = float(stats.norm.ppf(confidence)), float(stats.norm.ppf(power))

    def reached(times: float) -> bool:
        error = spread.standard_error / np.sqrt(times)
        more = replace(
            spread,
            standard_error=error,
            skew=spread.skew / np.sqrt(times),
            highest=spread.highest / times,
            lowest=spread.lowest / times,
        )
        return bool(_reach(more, sure, side, _UNSEEN_DECIDING) + hoped * error <= gap)

    low, high = 0.0, 1.0
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def spread_p(spread: Spread, value: float) -> float:
    """One-sided p of "the figure is `value` or less": the tail at which `spread_interval` begins at `value`."""
    above = spread.estimate - value
    if spread.standard_error == 0:
        return (1 - min(above, 1.0)) ** spread.clusters if above > 0 else 1.0
    return _tail(spread, above, -1) if above > 0 else 1 - _tail(spread, -above, 1)


def _ends(spread: Spread, confidence: float, within: Interval, unseen: float) -> Interval:
    check_share("confidence", confidence)
    if spread.standard_error == 0:
        half = unseen_change(spread.clusters, confidence)
        return _cut(spread.estimate - half, spread.estimate + half, within)
    z = float(stats.t.isf((1 - confidence) / 2, spread.clusters - 1))
    low, high = (_reach(spread, z, side, unseen) for side in (-1, 1))
    return _cut(spread.estimate - low, spread.estimate + high, within)


def _tail(spread: Spread, distance: float, side: int) -> float:
    """The tail whose end lies so far from the estimate, on side 1 above or −1 below."""
    low, high = 0.0, 50.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _reach(spread, middle, side, _UNSEEN_SHOWN) < distance else (low, middle)
    return float(stats.t.sf(low, spread.clusters - 1))


def _reach(spread: Spread, z: float, side: int, unseen: float) -> float:
    """How far an end at z standard errors is from the estimate; rises with z."""
    farthest = spread.highest if side > 0 else spread.lowest
    error = float(np.sqrt(spread.standard_error**2 + unseen * farthest**2))
    skew = side * spread.skew
    shifted = skew + z
    # Far out the correction for the skew would turn back; it is held there.
    skewed = unseen * farthest + error * shifted / max(1 - skew * shifted, 0.1) ** 2
    return max(z * spread.standard_error, skewed)


def _cut(low: float, high: float, within: Interval) -> Interval:
    return Interval(float(np.clip(low, within.low, within.high)), float(np.clip(high, within.low, within.high)))
