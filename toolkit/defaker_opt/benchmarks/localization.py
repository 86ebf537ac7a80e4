"""How good masks are: counts of pixels per picture, figures per picture, and figures over all pixels of a benchmark.

A picture leaves one small row; maps are not kept. Conventions, as most papers have them: F1, IoU and best F1 are of
forged pictures only, because an authentic picture has nothing to find; a found pixel there counts in the pooled
figures, and in the share of authentic pictures whose mask is empty. A pixel AUC needs both kinds of pixels, so a wholly
forged picture has none. Pixels outside `valid` (padding, unsure borders) count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

# Histograms of mask logits: bins of 1/64 from −16 to 16, where the sigmoid is within 1.2e-7 of 0 and 1. Edges are
# exact in binary, and one of them is 0, the usual threshold.
_BINS_PER_UNIT = 64
_REACH = 16
BINS = 2 * _REACH * _BINS_PER_UNIT


@dataclass(frozen=True)
class PixelCounts:
    """Pixels found and forged (hits), found and authentic (alarms), and missed; rest: neither found nor forged."""

    hits: int
    alarms: int
    misses: int
    rest: int

    @property
    def is_forged(self) -> bool:
        """Whether the truth has any forged pixel."""
        return self.hits + self.misses > 0

    @property
    def f1(self) -> float | None:
        """None for an authentic picture."""
        return 2 * self.hits / (2 * self.hits + self.alarms + self.misses) if self.is_forged else None

    @property
    def iou(self) -> float | None:
        """None for an authentic picture."""
        return self.hits / (self.hits + self.alarms + self.misses) if self.is_forged else None

    @property
    def area_bias(self) -> float:
        """Share of the picture that is found − share that is forged, −1…1."""
        return (self.alarms - self.misses) / max(self.hits + self.alarms + self.misses + self.rest, 1)


def count_pixels(found: Bools, truth: Bools, valid: Bools | None = None) -> PixelCounts:
    """Compare two masks [height, width]; a mask that a gate held back is an empty one."""
    assert found.shape == truth.shape, f"{found.shape} and {truth.shape}"
    if valid is not None:
        found, truth = found[valid], truth[valid]
    both, found_area, forged_area = (int(np.count_nonzero(mask)) for mask in (found & truth, found, truth))
    return PixelCounts(both, found_area - both, forged_area - both, truth.size - found_area - forged_area + both)


def overlap(first: Bools, second: Bools) -> float:
    """IoU of two masks, such as the reference's and the build's; 1 where both are empty."""
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else 1.0


def logit_histogram(logits: NDArray[np.floating], truth: Bools, valid: Bools | None = None) -> Counts:
    """Pixels by class and logit, int64 [2, BINS], authentic first; sums over pictures are the histogram of them all.

    Bin i holds edge i < logit ≤ edge i + 1, as a pixel is found where its logit is above the threshold; ends take what
    lies beyond. 16 KB a row of counts: keep the sum, not the rows. Logits must be finite.
    """
    assert logits.shape == truth.shape, f"{logits.shape} and {truth.shape}"
    if valid is not None:
        logits, truth = logits[valid], truth[valid]
    place = np.ceil(logits.astype(np.float64) * _BINS_PER_UNIT) + _REACH * _BINS_PER_UNIT - 1
    bins = np.clip(place, 0, BINS - 1).astype(np.int64) + BINS * truth
    return np.bincount(bins.ravel(), minlength=2 * BINS).reshape(2, BINS).astype(np.int64)


def edges() -> Floats:
    """The thresholds that a histogram can be cut at exactly, [BINS − 1]; edge 1 is the first."""
    return (np.arange(1, BINS) - _REACH * _BINS_PER_UNIT) / _BINS_PER_UNIT


@dataclass(frozen=True)
class PixelAuc:
    """value: 0…1, pixels of one bin half. error_bound: how far the exact AUC of the logits can be from it."""

    value: float
    error_bound: float


def pixel_auc(histogram: Counts) -> PixelAuc | None:
    """Chance that a forged pixel has the higher logit; None without pixels of both kinds. histogram [2, BINS].

    Only pairs within one bin are out of order at most, and they were counted half: hence the bound.
    """
    authentic, forged = histogram.astype(np.float64)
    pairs = float(authentic.sum() * forged.sum())
    if pairs == 0:
        return None
    below = np.cumsum(authentic) - authentic
    apart, together = float((forged * below).sum()), float((authentic * forged).sum())
    return PixelAuc((apart + together / 2) / pairs, together / 2 / pairs)


@dataclass(frozen=True)
class BestF1:
    """The highest F1 over all edges, and the lowest threshold that reaches it."""

    f1: float
    threshold: float


def best_f1(histogram: Counts) -> BestF1 | None:
    """F1 at the best of the thresholds `edges()`; None for an authentic picture. histogram [2, BINS].

    The threshold is fitted to the truth, so this shows what masks could be worth, not what they are.
    """
    authentic, forged = histogram
    total = int(forged.sum())
    if total == 0:
        return None
    alarms, hits = (np.cumsum(counts[::-1])[::-1][1:] for counts in (authentic, forged))
    scores = 2 * hits / (hits + alarms + total)
    # Everything found is a threshold below the first edge.
    everything = 2 * total / (total + histogram.sum())
    best = int(np.argmax(scores))
    if everything >= scores[best]:
        return BestF1(float(everything), -np.inf)
    return BestF1(float(scores[best]), float(edges()[best]))


def counts_at(histogram: Counts, threshold: float) -> PixelCounts:
    """Counts with another threshold, which must be one of `edges()`: 0 is one."""
    place = round((threshold + _REACH) * _BINS_PER_UNIT)
    assert 0 < place < BINS, f"threshold {threshold} is outside ±{_REACH}"
    assert place == (threshold + _REACH) * _BINS_PER_UNIT, f"{threshold} is no edge"
    (rest, misses), (alarms, hits) = histogram[:, :place].sum(axis=1), histogram[:, place:].sum(axis=1)
    return PixelCounts(int(hits), int(alarms), int(misses), int(rest))


def mean_over_forged(values: Floats, forged: Bools, weights: Floats) -> Floats:
    """Mean of per-picture figures [N] (F1, IoU …) over forged pictures, under weights [B, N]; NaN without any, [B].

    Values of authentic pictures are not looked at, so they may be NaN.
    """
    used = weights * forged
    return _ratio(used @ np.where(forged, values, 0.0), used.sum(axis=1))


def pooled_f1(counts: Floats, weights: Floats) -> Floats:
    """F1 of all pixels together, under weights [B, N]; counts [N, 3] are hits, alarms and misses of each picture."""
    hits, alarms, misses = (weights @ counts).T
    return _ratio(2 * hits, 2 * hits + alarms + misses)


def pooled_iou(counts: Floats, weights: Floats) -> Floats:
    """IoU of all pixels together, as `pooled_f1`."""
    hits, alarms, misses = (weights @ counts).T
    return _ratio(hits, hits + alarms + misses)


def _ratio(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    ratio: Floats = np.full(above.shape, np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio
