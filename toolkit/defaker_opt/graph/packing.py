"""Codes of less than a byte in bytes, as onnxruntime's blocked products read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_codes(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Signed codes [rows, n] of 2 or 4 bits → bytes [rows, ceil(n * bits / 8)], the first code in the lowest bits.

    They become unsigned, which moves zero to 2^(bits - 1); what is left of a last byte is zero.
    """
    per_byte = 8 // bits
    unsigned = (codes + 2 ** (bits - 1)).astype(np.uint8)
    filled = np.pad(unsigned, ((0, 0), (0, -codes.shape[1] % per_byte))).reshape(len(codes), -1, per_byte)
    shifted = np.left_shift(filled, (bits * np.arange(per_byte)).astype(np.uint8))
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=-1)
    return packed


def unpack_codes(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.int8]:
    """The inverse of `pack_codes`, for `columns` codes a row."""
    shifts = (bits * np.arange(8 // bits)).astype(np.uint8)
    unsigned = (packed[:, :, None] >> shifts) & (2**bits - 1)
    signed: NDArray[np.int8] = unsigned.reshape(len(packed), -1)[:, :columns].astype(np.int8) - np.int8(2 ** (bits - 1))
    return signed
