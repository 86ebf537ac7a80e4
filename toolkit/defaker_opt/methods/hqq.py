"""HQQ (Badri and Shaji 2023): grids that leave outliers of the weights' error out of account; needs no pictures.

Minimizes φ(W - decoded(codes)) with φ = |.|^p, p < 1, by splitting off a sparse error E: alternately E is the shrunken
residual, and the grid is the closed-form best for W - E. Two things differ from the paper: the scale moves too, because
kernels want whole zero points, which alone hardly ever move; and residuals are measured in steps of their group, so
that beta means the same for every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from defaker_opt.methods import NOTHING_SEEN, Array, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._grids import Grid, as_weight, codes_on, decoded, grouped, range_grid, usable


@dataclass(frozen=True)
class Hqq:
    """p: exponent of the error's norm, 0…1. beta: how strongly E is tied to the residual, times `growth` a step."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20

    NEEDS: ClassVar[tuple[Need, ...]] = ()
    SCALES_INPUTS: ClassVar[bool] = False

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]."""
        values = grouped(weight, scheme)
        grid = range_grid(values, scheme)
        unit, steps = grid.unit, grid.scale[..., None]
        values = values / steps  # in steps of the first grid, which large weights need too: their sums are no float32
        best = grid = Grid(np.ones_like(grid.scale), grid.zero)
        least = self._distance(values, grid, scheme)
        beta = self.beta
        for _ in range(self.steps):
            codes = codes_on(values, grid, scheme)
            aim = values - self._shrunken(values - decoded(codes, grid), beta)
            grid = _fitted(aim, codes, scheme)
            beta *= self.growth
            # Scales of NVFP4 are far apart: the way goes between them, what counts is the error on the nearest one.
            kept = grid
            if scheme.number == "nvfp":
                kept = Grid(usable(grid.scale * steps[..., 0], scheme, unit) / steps[..., 0], grid.zero)
            distance = self._distance(values, kept, scheme)
            better = distance < least
            least = np.where(better, distance, least)
            best = Grid(np.where(better, kept.scale, best.scale), np.where(better, kept.zero, best.zero))
        whole = Grid(usable(best.scale * steps[..., 0], scheme, unit), best.zero, unit)
        return as_weight(codes_on(values, best, scheme), whole, scheme)

    def _shrunken(self, residual: Array, beta: float) -> Array:
        """The minimizer of |E|^p + beta / 2 (E - residual)², to first order (generalized soft threshold)."""
        size = np.maximum(np.abs(residual), np.float32(1e-12))
        shrunken = np.maximum(size - np.power(size, np.float32(self.p - 1)) / np.float32(beta), 0)
        kept: Array = (np.sign(residual) * shrunken).astype(np.float32)
        return kept

    def _distance(self, values: Array, grid: Grid, scheme: Scheme) -> Array:
        residual = np.abs(values - decoded(codes_on(values, grid, scheme), grid))
        total: Array = np.power(residual, np.float32(self.p)).sum(axis=-1)
        return total


def _fitted(aim: Array, codes: Array, scheme: Scheme) -> Grid:
    """The least-squares line from codes to what they should stand for; its zero point is then made whole."""
    middle = codes.mean(axis=-1) if scheme.zero_point == "group" else np.zeros(codes.shape[:-1], np.float32)
    height = aim.mean(axis=-1) if scheme.zero_point == "group" else middle
    apart = codes - middle[..., None]
    squares = np.square(apart).sum(axis=-1)
    scale = (apart * (aim - height[..., None])).sum(axis=-1) / np.maximum(squares, np.float32(1e-6))
    # A group with one code only, or none, keeps the step it had.
    scale = np.where(np.abs(scale) < np.float32(1e-3), np.float32(1), scale).astype(np.float32)
    if scheme.zero_point == "fixed":
        return Grid(scale, np.zeros_like(scale))
    zero = np.clip(np.rint(middle - height / scale), scheme.smallest_code, scheme.largest_code)
    return Grid(scale, zero.astype(np.float32))


METHOD = Hqq
