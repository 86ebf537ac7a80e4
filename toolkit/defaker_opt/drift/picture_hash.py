"""A number that stays nearly the same when a picture is saved again, scaled or slightly retouched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

HASH_BITS = 64
_SIDE, _KEPT = 32, 8


def picture_hash(image: Image.Image) -> int:
    """64-bit pHash: signs of the lowest 8x8 coefficients of a 32x32 grey picture's DCT-II against their median.

    Zauner 2010, section 3.2.1, here with the 8x8 block that includes the lowest row and column.
    """
    lowest = fft.dctn(_sketch(image), type=2, norm="ortho")[:_KEPT, :_KEPT]
    # Rounded, because equal coefficients (flat pictures) must not fall to either side by the last bit.
    values = np.round(lowest.ravel(), 6)
    bits = values > np.median(values)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hash_distances(one: int, others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """In how many of 64 bits a hash differs from each of others [n]."""
    different = (others ^ np.uint64(one)).view(np.uint8).reshape(len(others), 8)
    distances: NDArray[np.int64] = np.unpackbits(different, axis=1).sum(axis=1, dtype=np.int64)
    return distances


def sketch_correlation(one: Image.Image, other: Image.Image) -> float:
    """How alike two pictures are when both are shrunk to 32x32 grey, -1…1; flat ones are alike if both are flat."""
    first, second = (_sketch(image) - _sketch(image).mean() for image in (one, other))
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / norm if norm > 0 else float(not first.any() and not second.any())


def _sketch(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
