"""How good a mask is, whatever its threshold, from the histogram of its logits.

A histogram is [2, bins]: authentic and forged pixels of one picture by rising mask logit. Figures of masks are of
forged pictures only, because an authentic picture has nothing to find.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
