"""What each picture adds to the error of a figure of verdicts: the figure's derivative by the picture's weight, [N].

Influences sum to 0, and those of independent groups of pictures give the figure's standard error (Hampel 1974, "The
influence curve and its role in robust estimation"). Where a figure jumps from picture to picture, as it does at a
threshold that moves, the derivative is that of a smooth figure with the same expectation: densities are counted in a
window, and signs of what may be chance are softened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from scipy import special

from defaker_opt.benchmarks.metrics import Bools, Floats, Labels, VerdictRows, bin_gaps, tied_ranks

# Pictures on either side of a threshold in which densities are counted; fewer of a small benchmark.
_WINDOW_SHARE, _WINDOW_LEAST = 0.1, 10


def of_mean(values: Floats | Bools, used: Bools) -> Floats:
    """Of the mean of values [N] over the pictures used [N]; what is not used may be NaN."""
    kept = np.where(used, values, 0.0).astype(np.float64)
    count = used.sum()
    influence: Floats = np.where(used, kept - kept.sum() / count, 0.0) / count
    return influence


def of_average_precision(labels: Labels, probabilities: Floats) -> Floats:
    """Of `metrics.average_precision`, exact. A picture counts in its own precision and in all at lower thresholds."""
    place, ends = tied_ranks(probabilities)
    forged = np.bincount(place, labels)
    found, seen = np.cumsum(forged), ends + 1.0
    precision = found / seen
    value = float(forged @ precision) / found[-1]
    raised, lowered = (np.cumsum((forged * share / seen)[::-1])[::-1][place] for share in (1 - precision, precision))
    influence: Floats = np.where(labels == 1, precision[place] - value + raised, -lowered) / found[-1]
    return influence


def of_equal_error_rate(labels: Labels, probabilities: Floats) -> Floats:
    """Of `metrics.equal_error_rate`: both rates at the threshold that makes them equal, by how fast either moves."""
    forged, authentic = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    candidates = np.sort(probabilities)
    alarms = 1 - np.searchsorted(authentic, candidates, side="right") / len(authentic)
    misses = np.searchsorted(forged, candidates, side="right") / len(forged)
    threshold = candidates[np.argmin(np.abs(alarms - misses))]
    slope = _slope(labels, probabilities, threshold)
    called = probabilities > threshold
    return (slope * of_mean(called, labels == 0) + of_mean(~called, labels == 1)) / (1 + slope)


def of_hits_at_reference_rate(rows: VerdictRows) -> Floats:
    """Of the drop of the true-positive rate at the false-positive rate that the reference has at its threshold.

    The build's threshold follows the reference's rate, so that a false positive more of either moves it.
    """
    authentic, forged = rows.labels == 0, rows.labels == 1
    reference = rows.reference > rows.reference_threshold
    falling = np.sort(rows.build[authentic])[::-1]
    threshold = falling[min(int(reference[authentic].sum()), len(falling) - 1)]
    change = reference.astype(np.float64) - (rows.build > threshold)
    return of_mean(change, forged) - _slope(rows.labels, rows.build, threshold) * of_mean(change, authentic)


def of_calibration_error(labels: Labels, probabilities: Floats) -> Floats:
    """Of `metrics.calibration_error`, with the sign of a bin's gap as sure as the gap is against chance."""
    gap = bin_gaps(labels, probabilities)
    sure = special.erf(gap.mean / np.maximum(gap.error, 1e-12) / np.sqrt(2))
    return of_mean(sure[gap.member] * (probabilities - labels), np.ones(len(labels), bool))


def _slope(labels: Labels, probabilities: Floats, threshold: float) -> float:
    """Density of forged over density of authentic pictures at a threshold: the slope of the ROC there."""
    order = np.argsort(probabilities, kind="stable")
    middle = int(np.searchsorted(probabilities[order], threshold))
    reach = max(_WINDOW_LEAST, int(_WINDOW_SHARE * len(labels)))
    near = labels[order[max(0, middle - reach) : middle + reach]]
    # Half a picture more of each, so that an empty window is no infinite slope.
    forged, authentic = ((np.sum(near == label) + 0.5) / np.sum(labels == label) for label in (1, 0))
    return float(forged / authentic)


Influence = Callable[[VerdictRows], Floats]


def _of_drop(influence: Callable[[Labels, Floats], Floats], sign: int) -> Influence:
    return lambda rows: sign * (influence(rows.labels, rows.reference) - influence(rows.labels, rows.build))


def _called(rows: VerdictRows) -> Floats:
    """Where only the reference calls a picture forged 1, where only the build does −1."""
    reference, build = rows.reference > rows.reference_threshold, rows.build > rows.build_threshold
    return reference.astype(np.float64) - build


def _of_balanced_accuracy(rows: VerdictRows) -> Floats:
    return (of_mean(_called(rows), rows.labels == 1) - of_mean(_called(rows), rows.labels == 0)) / 2


def _of_brier(rows: VerdictRows) -> Floats:
    change = (rows.build - rows.labels) ** 2 - (rows.reference - rows.labels) ** 2
    return of_mean(change, np.ones(len(change), bool))


# Of the drops of figures in `metrics.VERDICT_METRICS`, but for accuracy and AUC, which have methods of their own.
DROPS: Mapping[str, Influence] = MappingProxyType(
    {
        "balanced_accuracy": _of_balanced_accuracy,
        "true_positive_rate": lambda rows: of_mean(_called(rows), rows.labels == 1),
        "false_positive_rate": lambda rows: -of_mean(_called(rows), rows.labels == 0),
        "average_precision": _of_drop(of_average_precision, 1),
        "equal_error_rate": _of_drop(of_equal_error_rate, -1),
        "tpr_at_reference_fpr": of_hits_at_reference_rate,
        "calibration_error": _of_drop(of_calibration_error, -1),
        "brier": _of_brier,
    }
)
