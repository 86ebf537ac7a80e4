"""Filters of a patch embedding: products of cosines (DCT-II; Ahmed et al. 1974), of light and of colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# (u, v): half periods down and across a patch. (r, g, b): a direction of colour.
Wave = tuple[int, int]
Direction = tuple[float, float, float]

# Orthonormal directions of colour: light, and two differences.
LIGHT: Direction = (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3))
DIFFERENCES: tuple[Direction, Direction] = (
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)


def coarse_to_fine(size: int) -> list[Wave]:
    """Every wave of a patch of size x size px, the constant one first."""
    every = ((u, v) for u in range(size) for v in range(size))
    return sorted(every, key=lambda wave: (sum(wave), abs(wave[0] - wave[1]), wave))


def filters(size: int, chosen: Sequence[tuple[Wave, Direction]]) -> torch.Tensor:
    """Orthonormal filters, one for each of the chosen [len(chosen), 3, size, size], float32."""
    steps = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi * (steps[None] + 0.5) * steps[:, None] / size) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    rows = [
        torch.tensor(direction, dtype=torch.float64)[:, None, None] * torch.outer(cosines[u], cosines[v])
        for (u, v), direction in chosen
    ]
    return torch.stack(rows).float() if rows else torch.zeros(0, 3, size, size)
