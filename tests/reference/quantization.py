"""Quantization and 8-bit products, one number at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from defaker_opt.methods import NF4


def round_to_nearest_plain(
    weight: np.ndarray, bits: int, group_size: int | None, half_scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in] and scales [out, groups] by loops over rows, groups and columns; half_scales: of float16."""
    rows, columns = weight.shape
    size = group_size or columns
    largest_code = 2 ** (bits - 1) - 1
    codes = np.zeros((rows, columns), np.int8)
    scales = np.zeros((rows, columns // size), np.float32)
    for row in range(rows):
        for group in range(columns // size):
            values = weight[row, group * size : (group + 1) * size]
            scale = np.float32(max(abs(float(value)) for value in values)) / np.float32(largest_code)
            scale = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
            scales[row, group] = np.float16(scale) if half_scales else scale
            for column_in_group, value in enumerate(values):
                code = round(float(np.float32(value) / scales[row, group]))
                codes[row, group * size + column_in_group] = max(-largest_code, min(largest_code, code))
    return codes, scales


def llm_int8_plain(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, threshold: float) -> np.ndarray:
    """x [tokens, in] by codes [out, in] · scale [out]: columns where any input reaches the threshold as floats, the
    others rounded to 127 steps of each token's largest input below it (Dettmers et al. 2022, section 3.2).
    """
    wide = codes.astype(np.float64) * scale[:, None]
    large = [bool((np.abs(x[:, column]) >= threshold).any()) for column in range(x.shape[1])]
    result = np.zeros((len(x), len(codes)))
    for token, row in enumerate(x):
        step = max((abs(float(value)) for value in row if abs(value) < threshold), default=0.0) / 127
        for column, value in enumerate(row):
            given = float(value) if large[column] else round(float(value) / step) * step if step else 0.0
            result[token] += given * wide[:, column]
    return result


def e4m3_numbers() -> list[float]:
    """Every number of FP8 with 4 bits of exponent, bias 7, and 3 of fraction, from its bits; sorted."""
    numbers = set()
    for bits in range(256):
        sign, exponent, fraction = -1 if bits & 128 else 1, (bits >> 3) & 15, bits & 7
        if (exponent, fraction) == (15, 7):
            continue  # not a number
        numbers.add(sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)))
    return sorted(numbers)


def nf4_numbers() -> list[float]:
    """The sixteen numbers of NF4 as QLoRA defines them (appendix E): quantiles of a normal distribution, eight on the
    positive side and seven on the negative one between its ends, zero exact, and all divided by the largest.
    """
    end = 0.9677083  # keeps the outermost quantiles finite; the published offset
    positive = [NormalDist().inv_cdf(end + (0.5 - end) * place / 8) for place in range(8)]
    negative = [-NormalDist().inv_cdf(end + (0.5 - end) * place / 7) for place in range(7)]
    return sorted(number / positive[0] for number in (*positive, 0.0, *negative))


def round_to_nf4_plain(weight: np.ndarray, size: int) -> np.ndarray:
    """Every weight becomes the nearest number of NF4 times its group's largest; of two the lower one."""
    numbers = [np.float32(number) for number in NF4]
    rounded = np.zeros_like(weight)
    for row, column in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], size)):
        group = weight[row, column : column + size]
        scale = np.abs(group).max() or np.float32(1)
        for place, value in enumerate(group):
            ratio = float(np.float32(value / scale))
            rounded[row, column + place] = min(numbers, key=lambda number: (abs(float(number) - ratio), number)) * scale
    return rounded


def round_to_fp8_plain(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in], as the numbers they are, and scales [out, 1]: each ratio's nearest number, by search."""
    numbers = np.array(e4m3_numbers())
    codes, scales = np.zeros(weight.shape), np.ones((len(weight), 1), np.float32)
    for row, values in enumerate(weight):
        largest = np.abs(values).max()
        scales[row] = largest / np.float32(448) if largest > 0 else 1
        for column, value in enumerate(values):
            distances = np.abs(numbers - float(np.float32(value) / scales[row, 0]))
            nearest = numbers[distances == distances.min()]
            # Of two as near, the one whose last bit of the fraction is 0.
            codes[row, column] = nearest[0] if len(nearest) == 1 else min(nearest, key=_is_odd)
    return codes, scales


def _is_odd(number: float) -> bool:
    step = 2.0**-9 if abs(number) < 2.0**-6 else 2.0 ** (np.floor(np.log2(abs(number))) - 3)
    return bool(round(abs(number) / step) % 2)


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


def pack_codes_plain(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a row one after the other into bytes, by loops."""
    per_byte = 8 // bits
    packed = np.zeros((codes.shape[0], -(-codes.shape[1] // per_byte)), np.uint8)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            unsigned = int(codes[row, column]) + 2 ** (bits - 1)
            packed[row, column // per_byte] += unsigned * 2 ** (bits * (column % per_byte))
    return packed


def range_asymmetric_plain(weight: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Weights after rounding with a zero point of their own for each group, by loops."""
    decoded = np.zeros_like(weight)
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            values = weight[row, start : start + size]
            low, high = min(np.float32(0), values.min()), max(np.float32(0), values.max())
            scale = np.float32(high / (2**bits - 1) - low / (2**bits - 1)) or np.float32(1)
            zero = min(max(low_code - round(float(low / scale)), low_code), high_code)
            for column, value in enumerate(values):
                code = min(max(round(float(value / scale)) + zero, low_code), high_code)
                decoded[row, start + column] = (code - zero) * scale
    return decoded


def optimal_rounding_plain(
    weight: np.ndarray, hessian: np.ndarray, order: list[int], round_column: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Optimal Brain Surgeon, word for word: round a column, then solve for the best change of all that are left.

    round_column: the number of a column, and its values [out] as they now are → what they are rounded to.
    """
    weight = weight.astype(np.float64).copy()
    for step, column in enumerate(order):
        rounded = round_column(column, weight)
        change = rounded - weight[:, column]
        left = order[step + 1 :]
        if left:
            # Of all δ with δ[column] = change, the one that makes δ H δᵀ least.
            weight[:, left] -= np.outer(change, np.linalg.solve(hessian[np.ix_(left, left)], hessian[left, column]))
        weight[:, column] = rounded
    return weight


def output_error_plain(weight: np.ndarray, rounded: np.ndarray, inputs: np.ndarray) -> float:
    """Mean squared change of a layer's outputs on inputs [tokens, in]."""
    return float(np.mean(np.square(inputs @ (rounded.astype(np.float64) - weight).T)))
