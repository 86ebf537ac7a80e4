"""How good verdicts are: figures of probabilities against labels, of all rows or under weights.

Every figure takes labels [N] (1 forged, 0 authentic), probabilities [N] (of forged, 0…1) and weights [B, N], and gives
one value for each of the B weightings, NaN where they leave it undefined, such as an AUC without authentic pictures.
Weights are how often a row counts; how a figure follows them is what `influence` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Labels = NDArray[np.int64]

# The number of bins that nearly all papers use, and the pictures that a bin takes at least: with fewer, chance in a bin
# outweighs the error of calibration.
_MOST_BINS, _BIN_PICTURES = 15, 80


def accuracy(labels: Labels, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Share of right verdicts; forged means probability > threshold, so a tie is authentic."""
    return _share((probabilities > threshold) == (labels == 1), weights)


def true_positive_rate(labels: Labels, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Share of forged pictures that are called forged."""
    return _share((probabilities > threshold), weights * (labels == 1))


def false_positive_rate(labels: Labels, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Share of authentic pictures that are called forged."""
    return _share((probabilities > threshold), weights * (labels == 0))


def balanced_accuracy(labels: Labels, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Mean of the shares of each class that are judged right."""
    hits = true_positive_rate(labels, probabilities, threshold, weights)
    mean: Floats = (hits + 1 - false_positive_rate(labels, probabilities, threshold, weights)) / 2
    return mean


def area_under_curve(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    """Chance that a forged picture scores above an authentic one, ties half."""
    curve = roc(labels, probabilities, weights)
    rise, middle = np.diff(curve.hits, axis=1), (curve.alarms[:, 1:] + curve.alarms[:, :-1]) / 2
    area: Floats = (rise * (1 - middle)).sum(axis=1)
    return area


def average_precision(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    """Precision averaged over the forged pictures, each at the threshold that just finds it; ties together.

    The sum of (recall − recall before) × precision, without interpolation, as scikit-learn computes it.
    """
    forged, authentic = _cumulative(labels, probabilities, weights)
    found = forged + authentic
    precision = np.divide(forged, found, out=np.zeros(found.shape), where=found > 0)
    step = np.diff(forged, axis=1, prepend=0.0)
    return _divide((step * precision).sum(axis=1), forged[:, -1])


def equal_error_rate(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    """The rate of false positives where it equals that of misses, on the straight-line ROC."""
    curve = roc(labels, probabilities, weights)
    # Alarms − misses rises from −1 to 1; the rate is where it is 0.
    excess = curve.alarms + curve.hits - 1
    after = np.argmax(excess >= 0, axis=1)
    return _between(excess, curve.alarms, np.maximum(after, 1), np.zeros(len(excess)))


def hits_at_false_positives(labels: Labels, probabilities: Floats, rate: Floats, weights: Floats) -> Floats:
    """True-positive rate where the false-positive rate is rate [B], on the straight-line ROC.

    At a rate where the ROC is vertical, the top of the step counts: the threshold is as low as the rate allows.
    """
    curve = roc(labels, probabilities, weights)
    beyond = curve.alarms > rate[:, None] + 1e-12
    after = np.where(beyond.any(axis=1), np.argmax(beyond, axis=1), curve.alarms.shape[1] - 1)
    return _between(curve.alarms, curve.hits, np.maximum(after, 1), rate)


def calibration_error(labels: Labels, probabilities: Floats, weights: Floats, bins: int = 0) -> Floats:
    """Expected calibration error of the probability of forged, in bins of equal mass.

    bins: 0 for 15, or as many as leave each 80 pictures. The mean over bins, by weight, of |mean probability − share of
    forged|. Edges are quantiles of the given rows, unweighted, so that every bin has pictures: probabilities crowd at
    0 and 1, where bins of equal width would leave most empty and one with nearly everything. Equal probabilities share
    a bin. A sample's value is too large, as chance in a bin counts as an error, in both builds alike: compare it, and
    do not read it alone.
    """
    member = bin_members(probabilities, bins)
    gap = np.zeros((len(labels), int(member.max()) + 1))
    gap[np.arange(len(labels)), member] = probabilities - labels
    return _divide(np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1))


def bin_members(probabilities: Floats, bins: int = 0) -> NDArray[np.intp]:
    """The bin of each picture, [N]; bins as in `calibration_error`."""
    bins = bins or min(_MOST_BINS, max(2, len(probabilities) // _BIN_PICTURES))
    edges = np.quantile(probabilities, np.arange(1, bins) / bins)
    return np.searchsorted(edges, probabilities, side="left")


@dataclass(frozen=True)
class BinGaps:
    """member [N]: the bin of each picture. mean [bins]: mean probability − share of forged; error: its standard one."""

    member: NDArray[np.intp]
    mean: Floats
    error: Floats


def bin_gaps(labels: Labels, probabilities: Floats) -> BinGaps:
    """The gaps that `calibration_error` is made of."""
    member = bin_members(probabilities)
    count, gap = np.maximum(np.bincount(member), 1), probabilities - labels
    mean = np.bincount(member, gap) / count
    square = np.bincount(member, (gap - mean[member]) ** 2) / np.maximum(count - 1, 1)
    return BinGaps(member, mean, np.sqrt(square / count))


def tied_ranks(probabilities: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Place of each picture's probability among the distinct ones, highest first, [N]; and how many pictures stand
    before the last of each, [distinct].
    """
    order = np.argsort(-probabilities, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    place = np.empty(len(order), np.intp)
    place[order] = np.searchsorted(ends, np.arange(len(order)))
    return place, ends


def brier(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    """Mean squared difference of probability and label."""
    return _share((probabilities - labels) ** 2, weights)


@dataclass(frozen=True)
class Roc:
    """Corners of ROC curves, (0, 0) to (1, 1): alarms and hits [B, corners], both rising; NaN without a class."""

    alarms: Floats
    hits: Floats


def roc(labels: Labels, probabilities: Floats, weights: Floats) -> Roc:
    """ROC of each weighting, one corner for each distinct probability, so equal ones make a slanted line."""
    forged, authentic = _cumulative(labels, probabilities, weights)
    start = np.zeros((len(weights), 1))
    hits, alarms = (_divide(total, total[:, -1:]) for total in (forged, authentic))
    return Roc(np.concatenate([start, alarms], axis=1), np.concatenate([start, hits], axis=1))


def _cumulative(labels: Labels, probabilities: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of forged and of authentic pictures at or above each distinct probability, highest first."""
    order = np.argsort(-probabilities, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    sorted_weights, forged = weights[:, order], labels[order] == 1
    total = np.cumsum(sorted_weights, axis=1)[:, ends]
    positive = np.cumsum(sorted_weights * forged, axis=1)[:, ends]
    return positive, total - positive


def _between(position: Floats, value: Floats, after: NDArray[np.intp], wanted: Floats) -> Floats:
    """value where position is wanted [B], on the straight line between corners after − 1 and after [B]."""
    rows = np.arange(len(after))
    left, right = position[rows, after - 1], position[rows, after]
    share = np.divide(wanted - left, right - left, out=np.ones(len(after)), where=right > left)
    start, end = value[rows, after - 1], value[rows, after]
    return np.where(np.isnan(left + right), np.nan, start + np.clip(share, 0, 1) * (end - start))


def _share(values: NDArray[np.float64] | NDArray[np.bool_], weights: Floats) -> Floats:
    return _divide(weights @ values.astype(np.float64), weights.sum(axis=1))


def _divide(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    ratio: Floats = np.full(np.broadcast(above, below).shape, np.nan)
    np.divide(above, below, out=ratio, where=np.broadcast_to(below > 0, ratio.shape))
    return ratio


@dataclass(frozen=True)
class VerdictRows:
    """The same pictures judged twice: labels [N], and probabilities of forged [N] with the threshold of each build."""

    labels: Labels
    reference: Floats
    build: Floats
    reference_threshold: float = 0.5
    build_threshold: float = 0.5


Compute = Callable[[VerdictRows, Floats], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Metric:
    """better: which way is good. compute: rows, weights [B, N] → the reference's and the build's value, each [B]."""

    better: Literal["higher", "lower"]
    compute: Compute = field(repr=False)

    def drop(self, reference: Floats, build: Floats) -> Floats:
        """How much worse the build is; a loss is positive whichever way is good."""
        return reference - build if self.better == "higher" else build - reference


def _at_threshold(figure: Callable[[Labels, Floats, float, Floats], Floats]) -> Compute:
    def compute(rows: VerdictRows, weights: Floats) -> tuple[Floats, Floats]:
        return (
            figure(rows.labels, rows.reference, rows.reference_threshold, weights),
            figure(rows.labels, rows.build, rows.build_threshold, weights),
        )

    return compute


def _of_probabilities(figure: Callable[[Labels, Floats, Floats], Floats]) -> Compute:
    def compute(rows: VerdictRows, weights: Floats) -> tuple[Floats, Floats]:
        return figure(rows.labels, rows.reference, weights), figure(rows.labels, rows.build, weights)

    return compute


def _hits_at_reference_rate(rows: VerdictRows, weights: Floats) -> tuple[Floats, Floats]:
    """True-positive rates at the false-positive rate that the reference has at its threshold."""
    rate = false_positive_rate(rows.labels, rows.reference, rows.reference_threshold, weights)
    return (
        hits_at_false_positives(rows.labels, rows.reference, rate, weights),
        hits_at_false_positives(rows.labels, rows.build, rate, weights),
    )


VERDICT_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric("higher", _at_threshold(accuracy)),
        "balanced_accuracy": Metric("higher", _at_threshold(balanced_accuracy)),
        "true_positive_rate": Metric("higher", _at_threshold(true_positive_rate)),
        "false_positive_rate": Metric("lower", _at_threshold(false_positive_rate)),
        "auc": Metric("higher", _of_probabilities(area_under_curve)),
        "average_precision": Metric("higher", _of_probabilities(average_precision)),
        "equal_error_rate": Metric("lower", _of_probabilities(equal_error_rate)),
        "tpr_at_reference_fpr": Metric("higher", _hits_at_reference_rate),
        "calibration_error": Metric("lower", _of_probabilities(calibration_error)),
        "brier": Metric("lower", _of_probabilities(brier)),
    }
)
