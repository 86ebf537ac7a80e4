"""Areas under two ROC curves of the same pictures, and the interval of their difference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from defaker_opt.statistics import Floats, Interval, check_share
from defaker_opt.statistics.intervals import unseen_change
from defaker_opt.statistics.spread import Spread, deciding_interval, spread_of


@dataclass(frozen=True)
class AucComparison:
    """reference, build: areas, 0…1. drop: reference − build. interval: of the drop, to be shown.

    deciding: to hold a limit against, at least as wide; it allows for one group more (`deciding_interval`), without
    which DeLong's interval accepts too often where pictures are few (profiling/coverage.py).
    spread: of the drop, with the number of groups of the rarer class. clusters: how many groups there are.
    """

    reference: float
    build: float
    drop: float
    interval: Interval
    deciding: Interval
    spread: Spread
    clusters: int


def compare_auc(
    labels: NDArray[np.int64],
    reference: Floats,
    build: Floats,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
) -> AucComparison | None:
    """Paired DeLong comparison; None where a class is missing. labels [N] 0 or 1; scores [N], ties count half.

    DeLong, DeLong and Clarke-Pearson 1988, by ranks (Sun and Xu 2014, "Fast implementation of DeLong's algorithm").
    With clusters [N], the placements of a cluster, of both classes, are summed first: Obuchowski 1997, "Nonparametric
    analysis of clustered ROC curve data". If no picture's rank changed, nothing tells how far it can; the interval is
    then what `unseen_change` allows.
    """
    check_share("confidence", confidence)
    forged, authentic = labels == 1, labels == 0
    if not forged.any() or not authentic.any():
        return None
    areas, influence = auc_influence(labels, np.stack([reference, build]))
    drop, difference = float(areas[0] - areas[1]), influence[0] - influence[1]
    if clusters is not None:
        _, index = np.unique(np.asarray(clusters), return_inverse=True)
        difference = np.bincount(index, difference)
    else:
        index = np.arange(len(labels))
    error = _standard_error(difference, labels if clusters is None else None)
    # Both classes are in each group of twins; otherwise the rarer one says how much is known of the error.
    independent_groups = min(len(np.unique(index[of_class])) for of_class in (forged, authentic))
    if np.abs(difference).max() < 1e-12 or len(difference) < 2:
        half = unseen_change(independent_groups, confidence)
    else:
        half = error * float(stats.t.ppf((1 + confidence) / 2, max(independent_groups - 1, 1)))
    interval = Interval(max(-1.0, drop - half), min(1.0, drop + half))
    whole = spread_of(drop, difference, np.arange(len(difference)))
    spread = replace(whole, standard_error=error if whole.standard_error else 0.0, clusters=independent_groups)
    deciding = deciding_interval(spread, confidence) if spread.standard_error else interval
    deciding = Interval(min(deciding.low, interval.low), max(deciding.high, interval.high))
    return AucComparison(float(areas[0]), float(areas[1]), drop, interval, deciding, spread, len(difference))


def auc_influence(labels: NDArray[np.int64], scores: Floats) -> tuple[Floats, Floats]:
    """Areas [M] of M scorings [M, N], and what each picture adds to their deviation [M, N], whose sums are 0.

    A picture's share is its placement among the other class minus the area, over the size of its class.
    """
    forged, authentic = labels == 1, labels == 0
    positives, negatives = int(forged.sum()), int(authentic.sum())
    among_all = stats.rankdata(scores, axis=1)
    above = (among_all[:, forged] - stats.rankdata(scores[:, forged], axis=1)) / negatives
    below = 1 - (among_all[:, authentic] - stats.rankdata(scores[:, authentic], axis=1)) / positives
    areas = above.mean(axis=1)
    influence = np.zeros(scores.shape)
    influence[:, forged] = (above - areas[:, None]) / positives
    influence[:, authentic] = (below - areas[:, None]) / negatives
    return areas, influence


def _standard_error(influence: Floats, labels: NDArray[np.int64] | None) -> float:
    """Of the sum of independent parts [K]; with labels the two classes are separate samples, as in DeLong's formula."""
    if labels is None:
        count = len(influence)
        return float(np.sqrt((influence**2).sum() * count / max(count - 1, 1)))
    variance = 0.0
    for label in (0, 1):
        part = influence[labels == label]
        variance += float((part**2).sum()) * len(part) / max(len(part) - 1, 1)
    return float(np.sqrt(variance))
