"""Quantization and 8-bit products, one number at a time."""

from __future__ import annotations

import numpy as np


def round_to_nearest_plain(weight: np.ndarray, bits: int, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in] and scales [out, groups] by loops over rows, groups and columns."""
    rows, columns = weight.shape
    size = group_size or columns
    largest_code = 2 ** (bits - 1) - 1
    codes = np.zeros((rows, columns), np.int8)
    scales = np.zeros((rows, columns // size), np.float32)
    for row in range(rows):
        for group in range(columns // size):
            values = weight[row, group * size : (group + 1) * size]
            scale = np.float32(max(abs(float(value)) for value in values)) / np.float32(largest_code)
            scales[row, group] = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
            for column_in_group, value in enumerate(values):
                code = round(float(np.float32(value) / scales[row, group]))
                codes[row, group * size + column_in_group] = max(-largest_code, min(largest_code, code))
    return codes, scales


def tensor_product_plain(x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x @ Wᵀ with activations in uint8, one scale and zero point for all of x (ONNX DynamicQuantizeLinear)."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32((high - low) / 255) or np.float32(1)
    zero = np.clip(np.rint(-low / step), 0, 255)
    quantized = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    return (quantized @ codes.T.astype(np.float64)) * step * scale


def token_product_plain(x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x @ Wᵀ with activations in 8 bits, one scale for each row of x."""
    out = np.zeros((x.shape[0], codes.shape[0]))
    for row, values in enumerate(x):
        step = np.abs(values).max() / np.float32(127) or np.float32(1)
        quantized = np.clip(np.rint(values / step), -128, 127)
        out[row] = (codes.astype(np.float64) @ quantized) * step * scale
    return out


def pack_nibbles_plain(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, by loops."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 2), np.uint8)
    for row in range(codes.shape[0]):
        for pair in range(packed.shape[1]):
            low, high = int(codes[row, 2 * pair]) + 8, int(codes[row, 2 * pair + 1]) + 8
            packed[row, pair] = low + 16 * high
    return packed
