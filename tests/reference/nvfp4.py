"""NVFP4, one number at a time: numbers from their bits, the nearest of them by search."""

from __future__ import annotations

import itertools

import numpy as np

from tests.reference.quantization import e4m3_numbers

SIZE = 16


def e2m1_numbers() -> list[float]:
    """What the sixteen codes of FP4 stand for, in their order: sign, 2 bits of exponent with bias 1, 1 of fraction."""
    numbers = []
    for bits in range(16):
        sign, exponent, fraction = -1.0 if bits & 8 else 1.0, (bits >> 1) & 3, bits & 1
        numbers.append(sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)))
    return numbers


def round_to_nvfp4_plain(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes [out, in] and scales [out, in / 16] as the numbers they are, and the weight's own scale.

    Of two numbers as near, the one whose last bit is 0; scales are positive, the smallest one for blocks of zeros.
    """
    rows, columns = weight.shape
    largest = np.float32(max(abs(float(value)) for value in weight.reshape(-1)))
    tensor_scale = largest / np.float32(6 * 448) or np.float32(1)
    four = [(number, bits) for bits, number in enumerate(e2m1_numbers()) if bits < 8]
    eight = [(number, place + 1) for place, number in enumerate(each for each in e4m3_numbers() if each > 0)]
    codes, scales = np.zeros(weight.shape), np.zeros((rows, columns // SIZE))
    for row, block in itertools.product(range(rows), range(columns // SIZE)):
        place = slice(block * SIZE, (block + 1) * SIZE)
        wanted = np.abs(weight[row, place]).max() / np.float32(6) / tensor_scale
        scales[row, block] = _nearest(float(wanted), eight)
        scale = np.float32(scales[row, block]) * tensor_scale
        for column, value in enumerate(weight[row, place]):
            ratio = float(np.float32(value) / scale)
            codes[row, block * SIZE + column] = np.copysign(_nearest(abs(ratio), four), ratio)
    return codes, scales, tensor_scale


def _nearest(value: float, numbers: list[tuple[float, int]]) -> float:
    """numbers: each with its bits."""
    return min(numbers, key=lambda each: (abs(each[0] - value), each[1] % 2))[0]
