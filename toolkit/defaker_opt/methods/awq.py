"""AWQ (Lin et al. 2023): scale columns that meet large inputs up before rounding, and their inputs down.

The factor of the inputs is a multiplication in the graph: exact for every layer, also those that no norm precedes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from defaker_opt.methods import NOTHING_SEEN, Array, Doubles, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._grids import as_weight, codes_on, grouped, searched_grid


@dataclass(frozen=True)
class Awq:
    """steps: how many exponents of mean |x| are tried, evenly over 0 … 1."""

    steps: int = 11

    NEEDS: ClassVar[tuple[Need, ...]] = ("hessian", "mean_abs")
    SCALES_INPUTS: ClassVar[bool] = True

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]; the exponent with the least squared error of the products wins, 0 among them."""
        assert seen.hessian is not None
        assert seen.mean_abs is not None
        best, least = None, np.inf
        for exponent in np.linspace(0, 1, self.steps):
            factor = _factor(seen.mean_abs, float(exponent))
            if factor is not None and np.abs(weight).max() > np.finfo(np.float32).max * factor.min():
                continue  # a scaled weight would be no float32
            found = _scaled(weight, scheme, factor, np.diagonal(seen.hessian))
            wrong = found.dequantize().astype(np.float64) - weight
            error = float(np.sum((wrong @ seen.hessian) * wrong))
            if best is None or error < least:
                best, least = found, error
        assert best is not None
        return best


def _factor(mean_abs: Doubles, exponent: float) -> Array | None:
    """What inputs [in] are multiplied by: mean_abs^-exponent, its smallest and largest 1 / each other; None for 1."""
    if exponent == 0.0 or not mean_abs.any():
        return None
    # A column that meets nothing has no scale of its own: it is left as the smallest of the others is.
    smallest = mean_abs[mean_abs > 0].min()
    scale = np.maximum(mean_abs, smallest) ** exponent
    factor: Array = (np.sqrt(scale.max() * scale.min()) / scale).astype(np.float32)
    return factor


def _scaled(weight: Array, scheme: Scheme, factor: Array | None, importance: Doubles) -> QuantizedWeight:
    values = grouped(weight if factor is None else weight / factor, scheme)
    size = values.shape[-1]
    weighted = importance if factor is None else importance * np.square(factor.astype(np.float64))
    grid = searched_grid(values, scheme, weighted.reshape(-1, size))
    return dataclasses.replace(as_weight(codes_on(values, grid, scheme), grid, scheme), input_factor=factor)


METHOD = Awq
