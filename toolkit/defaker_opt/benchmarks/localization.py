"""How good masks are, from histograms of mask logits and from figures of single pictures.

A histogram is [2, bins]: authentic and forged pixels of one picture by rising mask logit. Figures of masks are of
forged pictures only, because an authentic picture has nothing to find.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]


def pixel_auc(histogram: Counts) -> float | None:
    """Chance that a forged pixel has the higher logit, two of one bin half; None without pixels of both kinds."""
    authentic, forged = histogram.astype(np.float64)
    pairs = float(authentic.sum() * forged.sum())
    below = np.cumsum(authentic) - authentic / 2
    return float(forged @ below) / pairs if pairs else None


def best_f1(histogram: Counts) -> float | None:
    """The highest F1 over thresholds at the edges of the bins, all pixels found included; None if nothing is forged.

    The threshold is fitted to the truth, so this shows what masks could be worth, not what they are.
    """
    authentic, forged = histogram
    hits, alarms = (np.cumsum(counts[::-1]) for counts in (forged, authentic))
    return float((2 * hits / (hits + alarms + hits[-1])).max()) if hits[-1] else None


def mean_over_forged(values: Floats, forged: Bools, weights: Floats) -> Floats:
    """Mean of pictures' figures [N] (F1, IoU …) over the forged ones, under weights [B, N]; NaN without any, [B].

    Values of authentic pictures are not looked at, so they may be NaN.
    """
    used = weights * forged
    total = used.sum(axis=1)
    mean: Floats = np.full(len(weights), np.nan)
    np.divide(used @ np.where(forged, values, 0.0), total, out=mean, where=total > 0)
    return mean
