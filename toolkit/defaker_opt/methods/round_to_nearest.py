"""Round to nearest: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from defaker_opt.methods import NOTHING_SEEN, Array, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._grids import as_weight, codes_on, grouped, range_grid


@dataclass(frozen=True)
class RoundToNearest:
    """Scale each group so that its largest weight gets the largest code, then round half to even."""

    NEEDS: ClassVar[tuple[Need, ...]] = ()
    SCALES_INPUTS: ClassVar[bool] = False

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]; a group of zeros gets scale 1, so that it decodes to zeros."""
        values = grouped(weight, scheme)
        grid = range_grid(values, scheme)
        return as_weight(codes_on(values, grid, scheme), grid, scheme)


METHOD = RoundToNearest
