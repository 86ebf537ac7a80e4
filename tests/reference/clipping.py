"""Slow, obvious versions of what chooses the range of an activation."""

from __future__ import annotations

import math

import numpy as np


def squared_error_plain(x: np.ndarray, step: float) -> float:
    """Sum of squared errors of rounding x to -127…127 times step."""
    return float(((np.clip(np.rint(x / step), -127, 127) * step - x) ** 2).sum())


def entropy_clip_plain(counts: np.ndarray, edges: np.ndarray) -> float:
    """The clip of least divergence over 2,048 equal bins and 128 levels, bin by bin."""
    counts = [0.0, *counts[1:]]
    top = edges[max(i for i, count in enumerate(counts) if count) + 1]
    bins = [0.0] * 2048
    for low, high, count in zip([0.0, *edges[1:-1]], edges[1:], counts):
        # Spread evenly over the equal bins that the old one overlaps.
        first, last = int(low / top * 2048), min(2047, math.ceil(high / top * 2048))
        for index in range(first, last + 1):
            overlap = min(high, top * (index + 1) / 2048) - max(low, top * index / 2048)
            if count and overlap > 0:
                bins[index] += count * overlap / (high - low)
    best, chosen = math.inf, 2048
    for kept in range(128, 2049, 8):
        p = bins[:kept]
        q = [0.0] * kept
        for level in range(128):
            members = range(math.ceil(level * kept / 128), math.ceil((level + 1) * kept / 128))
            used = [i for i in members if p[i] > 0]
            for i in used:
                q[i] = sum(p[j] for j in members) / len(used)
        p[-1] += sum(bins[kept:])
        if p[-1] > 0 and q[-1] == 0:
            continue
        total_p, total_q = sum(p), sum(q)
        divergence = sum(a / total_p * math.log(a / total_p * total_q / b) for a, b in zip(p, q) if a > 0)
        if divergence < best - 1e-12:
            best, chosen = divergence, kept
    return float(top * chosen / 2048)
