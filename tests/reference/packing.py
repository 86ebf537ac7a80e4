"""GPTQ's packed tensors, bit by bit and number by number."""

from __future__ import annotations

import numpy as np


def pack_plain(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words [n * bits / 32, columns] of codes [n, columns]: the bits of a column in a row, cut every 32."""
    columns = []
    for column in codes.T:
        stream = [int(code) >> bit & 1 for code in column for bit in range(bits)]
        words = [stream[start : start + 32] for start in range(0, len(stream), 32)]
        columns.append([sum(bit << place for place, bit in enumerate(word)) for word in words])
    return np.array(columns, np.uint64).T.astype(np.uint32).view(np.int32)


def dequantize_plain(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int, offset: int
) -> np.ndarray:
    """The float32 weight [out, in]; `offset` is added to zero points as they are stored."""
    columns, rows = len(g_idx), scales.shape[1]
    zeros = [_numbers(qzeros[group], bits) for group in range(len(qzeros))]
    weight = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        codes = _numbers(qweight[:, row], bits)
        for column in range(columns):
            group = int(g_idx[column])
            zero = zeros[group][row] + offset
            weight[row, column] = np.float32(codes[column] - zero) * np.float32(scales[group, row])
    return weight


def _numbers(words: np.ndarray, bits: int) -> list[int]:
    stream = [int(word) >> bit & 1 for word in np.ascontiguousarray(words).view(np.uint32) for bit in range(32)]
    return [
        sum(bit << place for place, bit in enumerate(stream[start : start + bits]))
        for start in range(0, len(stream), bits)
    ]
