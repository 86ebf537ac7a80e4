"""Intervals, tests and decisions on paired results; pure functions of counts and arrays, nothing about pictures.

    rows of two builds ─► estimate and interval (paired_proportions, auc, spread) ─► decision

A drop is always reference − build of something that should be high, so a positive drop is a loss. Pictures of one
photograph, video or pair are one cluster; only clusters are taken to be independent. One value, `Interval`, is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """low ≤ high; both ends belong to it."""

    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.high, f"{self.low} … {self.high}"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """high − low."""
        return self.high - self.low


def check_share(name: str, value: float) -> None:
    """A confidence, a power or an error rate is above 0 and below 1; what users choose is checked by the command."""
    assert 0 < value < 1, f"{name} must be between 0 and 1, got {value}"
