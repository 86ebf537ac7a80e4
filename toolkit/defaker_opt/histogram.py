"""How large the numbers of an activation are, and which of them 8 bits should reach.

Bins are fixed, 64 of equal size for each power of two, so pictures are counted one after another, no range need be
known before, and a number's bin is the first bits of its float32.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# How the largest magnitude that is still represented, the clip, is chosen.
Clip = Literal["largest", "percentile", "mse", "entropy"]

# Magnitudes from 2^-30 to 2^20; activations of float16 models are within.
_LOWEST, _HIGHEST, _PER_OCTAVE = -30, 20, 64
_OCTAVES = 2.0 ** np.arange(_LOWEST, _HIGHEST)
_WITHIN = 1 + np.arange(_PER_OCTAVE) / _PER_OCTAVE
EDGES: Doubles = np.append((_OCTAVES[:, None] * _WITHIN).reshape(-1), 2.0**_HIGHEST)
CENTRES: Doubles = (EDGES[:-1] + EDGES[1:]) / 2
BINS = len(CENTRES)

# A float32, shifted so that the exponent and 6 bits of the fraction remain, and without its sign, counts bins from 0.
FRACTION_SHIFT = 23 - 6
WITHOUT_SIGN = (1 << (31 - FRACTION_SHIFT)) - 1
FIRST_BIN = (_LOWEST + 127) << 6

# What `mse` and `entropy` are about: whole numbers of 8 bits.
_LARGEST_CODE = 127
_SHARE_KEPT = 0.9999
# Of `entropy`: bins of the histogram that is compared, and the levels that they are reduced to.
_LINEAR_BINS, _LEVELS = 2048, 128
# Clips tried by `mse`: down to a 1/256 of the largest magnitude, below which 8 bits would not even reach 1 code of it.
_OCTAVES_TRIED = 8


def input_scale(counts: Doubles, clip: Clip, largest_code: int = _LARGEST_CODE) -> float:
    """The step of symmetric codes for an activation. counts: of the bins of EDGES; not all 0."""
    assert counts.sum() > 0, "no number was counted"
    if counts[1:].any():
        # Zeros are kept by every clip; counted, they would hide all else from rules about shares.
        counts = np.concatenate([[0.0], counts[1:]])
    choose = {"largest": _largest, "percentile": _percentile, "mse": _least_squares, "entropy": _least_divergence}
    return float(choose[clip](counts)) / largest_code


def _largest(counts: Doubles) -> float:
    return float(EDGES[int(np.flatnonzero(counts)[-1]) + 1])


def _percentile(counts: Doubles) -> float:
    """The magnitude that 99.99 % of the numbers do not exceed."""
    return float(EDGES[int(np.searchsorted(np.cumsum(counts), _SHARE_KEPT * counts.sum())) + 1])


def _least_squares(counts: Doubles) -> float:
    """The clip with the least squared error: what is larger is cut, what is smaller rounded.

    Rounding costs step² / 12 on average, and what becomes 0 costs its own square (clips are chosen by squared error in
    Sung, Shin and Hwang 2015, "Resiliency of deep neural networks under quantization").
    """
    last = int(np.flatnonzero(counts)[-1]) + 1
    clips = EDGES[max(1, last - _OCTAVES_TRIED * _PER_OCTAVE) : last + 1]
    step = clips / _LARGEST_CODE
    # Numbers, their sum and the sum of their squares in the bins before each one.
    below = np.concatenate([np.zeros((3, 1)), np.cumsum(counts * CENTRES ** np.arange(3)[:, None], axis=1)], axis=1)
    first_rounded = np.searchsorted(CENTRES, step / 2, side="left")
    first_cut = np.searchsorted(CENTRES, clips, side="right")
    zeroed = below[2, first_rounded]
    rounded = step**2 / 12 * (below[0, first_cut] - below[0, first_rounded])
    number, total, squares = below[:, -1:] - below[:, first_cut]
    error = zeroed + rounded + squares - 2 * clips * total + clips**2 * number
    return float(clips[int(np.argmin(error))])


def _least_divergence(counts: Doubles) -> float:
    """The clip whose 128 levels lose the least information: the Kullback-Leibler divergence of Migacz 2017, "8-bit
    inference with TensorRT", on 2,048 bins up to the largest magnitude.
    """
    top = _largest(counts)
    linear = _as_linear(counts, top)
    best, chosen = math.inf, _LINEAR_BINS
    for kept in range(_LEVELS, _LINEAR_BINS + 1, 8):
        divergence = _divergence(linear, kept)
        if divergence < best:
            best, chosen = divergence, kept
    return top * chosen / _LINEAR_BINS


def _as_linear(counts: Doubles, top: float) -> Doubles:
    """Counts of equal bins from 0 to `top`; within an old bin numbers are taken to be spread evenly."""
    below = np.concatenate([[0.0], np.cumsum(counts)])
    edges = np.linspace(0, top, _LINEAR_BINS + 1)
    return np.diff(np.interp(edges, np.concatenate([[0.0], EDGES[1:]]), below))


def _divergence(linear: Doubles, kept: int) -> float:
    """Of the first `kept` bins, the rest being added to the last, from what 128 levels leave of them."""
    original = linear[:kept].copy()
    level = np.arange(kept) * _LEVELS // kept
    used = original > 0
    mass, filled = np.bincount(level, original, _LEVELS), np.bincount(level, used, _LEVELS)
    coarse = np.where(used, (mass / np.maximum(filled, 1))[level], 0.0)
    original[-1] += linear[kept:].sum()
    # A last bin that only holds what was cut has nothing to be compared with, which is infinitely far.
    if original[-1] > 0 and coarse[-1] == 0:
        return math.inf
    p, q = original[original > 0] / original.sum(), coarse[original > 0] / coarse.sum()
    return float(p @ np.log(p / q))
