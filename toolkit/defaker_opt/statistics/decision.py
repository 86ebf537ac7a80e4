"""From a test against a limit to ACCEPT, REJECT or UNDECIDED, for one figure, for all benchmarks, and for slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from defaker_opt.statistics import Floats, Interval, check_share
from defaker_opt.statistics.crossing import LimitTest

Decision = Literal["ACCEPT", "REJECT", "UNDECIDED"]


def decide(test: LimitTest, confidence: float = 0.95) -> Decision:
    """ACCEPT if "the drop is the limit or more" is refuted at the confidence, REJECT if "the limit or less" is.

    At a drop equal to the limit, each of the two wrong answers has a chance of at most 1 − confidence.
    """
    check_share("confidence", confidence)
    if test.p_accept <= 1 - confidence:
        return "ACCEPT"
    return "REJECT" if test.p_reject <= 1 - confidence else "UNDECIDED"


def decide_interval(one_sided: Interval, limit: float) -> Decision:
    """The same from an interval of the drop whose ends are one-sided bounds: `two_sided(confidence)` makes them."""
    if one_sided.high < limit:
        return "ACCEPT"
    return "REJECT" if one_sided.low > limit else "UNDECIDED"


def two_sided(confidence: float) -> float:
    """Confidence of the two-sided interval whose ends are one-sided bounds at `confidence`: 0.95 → 0.90."""
    check_share("confidence", confidence)
    assert confidence > 0.5, f"one-sided confidence must be above a half, got {confidence}"
    return 2 * confidence - 1


def decide_all(required: Sequence[Decision]) -> Decision:
    """Over all required benchmarks: ACCEPT needs every one, one REJECT is enough, nothing required is UNDECIDED.

    An intersection-union test: a false ACCEPT needs one on the worst benchmark, so no correction is needed for it
    (Berger 1982). A false REJECT has more chances the more benchmarks there are; `holm` on their p_reject bounds it.
    """
    if "REJECT" in required:
        return "REJECT"
    return "ACCEPT" if required and all(decision == "ACCEPT" for decision in required) else "UNDECIDED"


def holm(p_values: Sequence[float]) -> Floats:
    """Adjusted p of many tests [M]: calling those at most α significant errs anywhere with a chance of at most α.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def is_implausible_gain(interval: Interval, limit: float) -> bool:
    """Whether the build is surely better than the reference by more than a loss may be.

    Compression does not teach, so such a gain points to leaked test images, a threshold that was fitted on them, or a
    reference that ran differently. interval: of the drop; limit ≥ 0.
    """
    assert limit >= 0, f"a limit of a drop is 0 or more, got {limit}"
    return interval.high < -limit
