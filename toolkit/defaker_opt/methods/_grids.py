"""Scales and zero points of groups of weights: from their range, or searched for the least error.

Everything works on float32 groups [..., size] at once; a grid has one scale and zero point for each.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from defaker_opt.machine import available_cores
from defaker_opt.methods import FP8, FP8_LARGEST, NF4, Array, Doubles, QuantizedWeight, Scheme

# Ranges that are tried, as shares of the whole one.
_SHARES = np.linspace(1.0, 0.4, 25, dtype=np.float32)

# Numbers that a thread searches at once, so that they stay within its cache; grids are the same for any number.
_AT_ONCE = 1 << 16

_TINY = np.finfo(np.float32).tiny

# Halfway between neighbours of NF4; what is on such a place belongs to the lower one, as in bitsandbytes.
_NF4_BORDERS = (NF4[1:] + NF4[:-1]) / 2

# Positive numbers that float16 has.
_HALF_TINY, _HALF_LARGEST = 2.0**-24, 65504.0

# The smallest number of FP8, and its positive numbers from there on as bytes, which are in their order.
_FP8_TINY, _FP8_BYTES = 2.0**-9, (1, 126)

# Scales of NVFP4 that are tried, in numbers of FP8 from the one that cuts nothing off: half of it to nearly twice.
# Larger ones are worth it, as numbers of FP4 lie closer together below 4; a wider range gained nothing on drawn ones.
_NEIGHBOURS = range(-8, 8)


@dataclass(frozen=True)
class Grid:
    """scale and zero [...], float32; zero is a whole number, 0 in schemes whose zero point is fixed. unit: what scales
    of NVFP4 are numbers of FP8 times of, see `unit_of`.
    """

    scale: Array
    zero: Array
    unit: float = 1.0

    def column(self, group: int) -> Grid:
        """Of grids [out, groups], those of one group [out]."""
        return Grid(self.scale[:, group], self.zero[:, group], self.unit)


def grouped(weight: Array, scheme: Scheme) -> Array:
    """Weight [out, in] as groups [out, groups, size]."""
    rows, columns = weight.shape
    size = scheme.group_size or columns
    assert columns % size == 0, f"{columns} columns in groups of {size}"
    return np.asarray(weight, np.float32).reshape(rows, -1, size)


def unit_of(weight: Array, scheme: Scheme) -> float:
    """What scales of a weight are numbers of FP8 times of: the largest number gets the largest scale (NVIDIA 2025,
    "Pretraining large language models with NVFP4", appendix B). 1 for weights so small that scales would be no normal
    numbers, which then are zeros; 1 in schemes other than NVFP4.
    """
    if scheme.number != "nvfp":
        return 1.0
    unit = float(np.abs(weight).max() / np.float32(scheme.largest_code * FP8_LARGEST))
    return unit if unit >= float(_TINY) / _FP8_TINY else 1.0


def range_grid(values: Array, scheme: Scheme, unit: float | None = None) -> Grid:
    """The grid on which no value [..., size] is cut off; zeros get scale 1, so that they decode to zeros.

    Scales of NVFP4 are the nearest there are, on which a sixteenth may be cut off, and the smallest for zeros. unit: of
    the weight that values are of; None if they are all of it.
    """
    if scheme.zero_point == "fixed":
        unit = unit_of(values, scheme) if unit is None else unit
        scale = usable(np.abs(values).max(axis=-1) / np.float32(scheme.largest_code), scheme, unit)
        return Grid(scale, np.zeros_like(scale), unit)
    return _between(np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0), scheme)


def searched_grid(values: Array, scheme: Scheme, importance: Doubles | None = None, unit: float | None = None) -> Grid:
    """The grid with the least squared error among those that cut off more and more of the range.

    importance: weight of each error, broadcast against values[0]; None weighs all alike. unit: see `range_grid`.
    """
    unit = unit_of(values, scheme) if unit is None else unit
    rows = max(1, _AT_ONCE // values[0].size)
    parts = [values[start : start + rows] for start in range(0, len(values), rows)]
    if len(parts) == 1:
        return _searched(values, scheme, importance, unit)
    with ThreadPoolExecutor(available_cores()) as pool:
        grids = list(pool.map(lambda part: _searched(part, scheme, importance, unit), parts))
    return Grid(np.concatenate([grid.scale for grid in grids]), np.concatenate([grid.zero for grid in grids]), unit)


def _searched(values: Array, scheme: Scheme, importance: Doubles | None, unit: float) -> Grid:
    # Errors are relative to the largest value, so that no square overflows.
    largest = np.maximum(np.abs(values).max(axis=-1, keepdims=True), _TINY)
    best = range_grid(values, scheme, unit)
    least = _error(values, largest, best, scheme, importance)
    for candidate in _neighbours(best) if scheme.number == "nvfp" else _candidates(values, scheme):
        error = _error(values, largest, candidate, scheme, importance)
        better = error < least
        least = np.where(better, error, least)
        best = Grid(np.where(better, candidate.scale, best.scale), np.where(better, candidate.zero, best.zero), unit)
    return best


def _neighbours(grid: Grid) -> list[Grid]:
    """Grids of NVFP4 with scales a few numbers of FP8 below and above."""
    place = (grid.scale / grid.unit).astype(FP8).view(np.uint8).astype(np.int16)
    near = [np.clip(place + step, *_FP8_BYTES).astype(np.uint8).view(FP8) for step in _NEIGHBOURS]
    return [Grid(scale.astype(np.float32) * grid.unit, grid.zero, grid.unit) for scale in near]


def _candidates(values: Array, scheme: Scheme) -> list[Grid]:
    if scheme.zero_point == "group":
        low, high = np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0)
        return [_between(low * share, high * share, scheme) for share in _SHARES]
    place = np.abs(values).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(values, place, axis=-1)[..., 0]
    zero = np.zeros_like(largest)
    symmetric = [Grid(usable(np.abs(largest) * share / scheme.largest_code, scheme), zero) for share in _SHARES]
    if scheme.smallest_code == -scheme.largest_code:
        return symmetric
    # The negative side has one code more; a scale of the right sign gives it to the largest weight.
    return symmetric + [Grid(usable(largest * share / scheme.smallest_code, scheme), zero) for share in _SHARES]


def _between(low: Array, high: Array, scheme: Scheme) -> Grid:
    steps = scheme.largest_code - scheme.smallest_code
    # Halves, because the whole range of large weights is no float32.
    scale = usable((high / steps - low / steps).astype(np.float32), scheme)
    zero = np.clip(scheme.smallest_code - np.rint(low / scale), scheme.smallest_code, scheme.largest_code)
    return Grid(scale, zero.astype(np.float32))


def usable(scale: Array, scheme: Scheme, unit: float = 1.0) -> Array:
    """The nearest scale that codes can be multiplied by. unit: of NVFP4, see `unit_of`.

    Below the smallest normal number a scale loses bits or becomes zero, and codes would overflow.
    """
    if scheme.number == "nvfp":
        near: Array = np.clip(scale / unit, _FP8_TINY, FP8_LARGEST).astype(FP8).astype(np.float32)
        return near * unit
    kept: Array = np.where(np.abs(scale) < _TINY, np.float32(1), scale).astype(np.float32)
    if not scheme.symmetric:
        return kept
    half: Array = np.clip(kept, _HALF_TINY, _HALF_LARGEST).astype(np.float16).astype(np.float32)
    return half


def _error(values: Array, largest: Array, grid: Grid, scheme: Scheme, importance: Doubles | None) -> Doubles:
    off = codes_on(values, grid, scheme)
    off -= grid.zero[..., None]
    off *= grid.scale[..., None]
    off -= values
    off /= largest
    squared = off.astype(np.float64)
    np.square(squared, out=squared)
    if importance is not None:
        squared *= importance
    total: Doubles = squared.sum(axis=-1)
    return total


def codes_on(values: Array, grid: Grid, scheme: Scheme) -> Array:
    """What the nearest codes of values [..., size] stand for, float32: whole numbers, or numbers of FP8, FP4 or
    NF4.
    """
    codes: Array = values / grid.scale[..., None]
    if scheme.number == "int":
        np.rint(codes, out=codes)
        codes += grid.zero[..., None]
    np.clip(codes, scheme.smallest_code, scheme.largest_code, out=codes)
    if scheme.number == "nf":
        nearest: Array = NF4[_nf4_places(codes)]
        return nearest
    return codes if scheme.number == "int" else codes.astype(scheme.dtype).astype(np.float32)


def _nf4_places(values: Array) -> NDArray[np.int64]:
    """Where in NF4 the number next to each value, -1 … 1, is."""
    return np.searchsorted(_NF4_BORDERS, values, side="left")


def decoded(codes: Array, grid: Grid) -> Array:
    """What codes [..., size] stand for."""
    values: Array = (codes - grid.zero[..., None]) * grid.scale[..., None]
    return values


def as_weight(codes: Array, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """What `codes_on` found [out, groups, size] and their grids [out, groups] as one weight."""
    zero = None if scheme.zero_point == "fixed" else grid.zero.astype(np.int8)
    stored = _nf4_places(codes) if scheme.number == "nf" else codes
    whole = stored.reshape(len(codes), -1).astype(scheme.dtype)
    scale = np.ascontiguousarray(grid.scale, np.float32)
    return QuantizedWeight(whole, scale, scheme, zero, tensor_scale=grid.unit if scheme.number == "nvfp" else None)
