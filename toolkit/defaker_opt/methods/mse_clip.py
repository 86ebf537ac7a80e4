"""Round to nearest on the scale with the least squared error of the weights, which may cut off the largest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from defaker_opt.methods import NOTHING_SEEN, Array, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._grids import as_weight, codes_on, grouped, searched_grid


@dataclass(frozen=True)
class MseClip:
    """Needs no pictures. Never a larger squared error of a group than rounding to nearest."""

    NEEDS: ClassVar[tuple[Need, ...]] = ()
    SCALES_INPUTS: ClassVar[bool] = False

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]."""
        values = grouped(weight, scheme)
        grid = searched_grid(values, scheme)
        return as_weight(codes_on(values, grid, scheme), grid, scheme)


METHOD = MseClip
