"""Attention that looks at positions only: what a tower's drawn heads begin with, and a cheap twin to teach it by.

Every patch has the cosine and sine of its column and row at a few wavelengths in channels of its own. Where queries and
keys read those alone, patch p weighs patch q by exp(gain · Σ cos(2π Δx / λ) + cos(2π Δy / λ)): a smooth window around
p, wide or narrow by its gain, and the whole tile for gain 0. Such weights are a product of a column's and a row's, so
they cost two products with [n, n] where attention among n² patches has two with [n², n²].
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AttentionInterface

BY_POSITION = "by_position"

# Of each head in turn: the mean of the tile, a wide window, and a narrow one.
_GAINS = (0.0, 1.2, 3.5)

# Each needs four channels: cosine and sine, of columns and of rows.
_MOST_WAVELENGTHS = 4


def gain_of(head: int) -> float:
    """How narrow a head's window is; 0: as wide as the tile."""
    return _GAINS[head % len(_GAINS)]


def wavelengths(width: int, side: int) -> list[float]:
    """Wavelengths in patches, from twice the side of the tile down; wider towers have room for more of them."""
    return [2 * side / 2**step for step in range(max(1, min(_MOST_WAVELENGTHS, width // 48)))]


def position_waves(width: int, side: int) -> torch.Tensor:
    """Cosine and sine of columns and rows, wavelength by wavelength [side * side, 4 * wavelengths], in -1…1."""
    steps = torch.arange(side, dtype=torch.float32)
    channels = []
    for length in wavelengths(width, side):
        for wave in (torch.cos, torch.sin):
            along = wave(2 * math.pi * steps / length)
            channels += [along[None].expand(side, side), along[:, None].expand(side, side)]
    return torch.stack(channels, dim=-1).reshape(side * side, -1)


def window(width: int, side: int, gain: float) -> tuple[torch.Tensor, float]:
    """Weights of one axis [side, side], at most 1, and what the class token, which has no position, weighs beside them.

    The softmax over all tokens is their product, divided by its sum; a scale that is common to all cancels.
    """
    steps = torch.arange(side, dtype=torch.float32)
    apart = steps[:, None] - steps[None]
    lengths = wavelengths(width, side)
    likeness = torch.stack([torch.cos(2 * math.pi * apart / length) for length in lengths]).sum(0)
    return torch.exp(gain * (likeness - len(lengths))), math.exp(-2 * gain * len(lengths))


def attend_by_position(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None = None, **_: object
) -> tuple[torch.Tensor, None]:
    """As transformers calls attention; query and key are not read.

    value [B, heads, 1 + n², d] → [B, 1 + n², heads, d].
    """
    heads, tokens, channels = value.shape[1:]
    side = math.isqrt(tokens - 1)
    axes, class_weights = zip(*(window(heads * channels, side, gain_of(head)) for head in range(heads)))
    axis = torch.stack(axes).to(value)  # [heads, n, n]
    beside = value.new_tensor(class_weights)[:, None, None]
    patches = value[:, :, 1:].reshape(*value.shape[:2], side, side, channels)
    seen = torch.einsum("hkl,bhild->bhikd", axis, torch.einsum("hij,bhjkd->bhikd", axis, patches)).flatten(2, 3)
    reach = axis.float().sum(-1)  # [heads, n]
    total = (reach[:, :, None] * reach[:, None]).flatten(1)[..., None] + beside.float()
    near = (seen + beside * value[:, :, :1]) / total.to(value.dtype)
    # The class token has no position either: to it all are alike.
    whole = value.mean(dim=2, keepdim=True)
    return torch.cat((whole, near), dim=2).transpose(1, 2), None


AttentionInterface.register(BY_POSITION, attend_by_position)
