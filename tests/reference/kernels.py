"""Slow twins of the Triton kernels: one number after another, in float64, and the nearest of all codes there are."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def codes_of(kind: Any) -> NDArray[np.float64]:
    """Every number that a type of codes has, in order."""
    every = np.arange(256, dtype=np.uint8).view(np.dtype(kind)).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def nearest_code(number: float, codes: NDArray[np.float64]) -> float:
    """The code next to a number; of two that are as near, the even one, which of codes in order is every second."""
    distance = np.abs(codes - number)
    best = np.flatnonzero(distance == distance.min())
    zero = int(np.flatnonzero(codes == 0)[0])
    return float(codes[next(at for at in best if len(best) == 1 or (at - zero) % 2 == 0)])


def quantize(x: NDArray[Any], step: float, kind: Any) -> NDArray[np.float64]:
    """The quotient is that of float32, as ONNX defines it; its nearest code is exact."""
    codes = codes_of(kind)
    quotients = x.astype(np.float32) / np.float32(step)
    return np.array([nearest_code(float(each), codes) for each in quotients.ravel()]).reshape(x.shape)


def norm(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, epsilon: float) -> NDArray[np.float64]:
    """LayerNorm of each row; Ba et al. 2016."""
    rows = []
    for row in x.astype(np.float64):
        mean = sum(row) / len(row)
        variance = sum((each - mean) ** 2 for each in row) / len(row)
        rows.append([(each - mean) / math.sqrt(variance + epsilon) for each in row])
    return np.array(rows) * weight + (0 if bias is None else bias)


def rms_norm(x: NDArray[Any], weight: NDArray[Any], epsilon: float) -> NDArray[np.float64]:
    """Zhang and Sennrich 2019, each row by itself."""
    rows = [row / math.sqrt(sum(each * each for each in row) / len(row) + epsilon) for row in x.astype(np.float64)]
    return np.array(rows) * weight


def gelu(x: NDArray[Any]) -> NDArray[np.float64]:
    """x Φ(x); Hendrycks and Gimpel 2016."""
    flat = [each * 0.5 * (1 + math.erf(each / math.sqrt(2))) for each in x.astype(np.float64).ravel()]
    return np.array(flat).reshape(x.shape)


def gate(left: NDArray[Any], up: NDArray[Any]) -> NDArray[np.float64]:
    """SiLU(left) · up; Shazeer 2020."""
    flat = [each / (1 + math.exp(-each)) for each in left.astype(np.float64).ravel()]
    return np.array(flat).reshape(left.shape) * up


def int4_product(x: NDArray[Any], codes: NDArray[Any], scale: NDArray[Any]) -> NDArray[np.float64]:
    """x [n, in] · (codes [in, out] · scale [blocks, out]), the weights in float16."""
    size = len(codes) // len(scale)
    weight = np.array([codes[row].astype(np.float16) * scale[row // size] for row in range(len(codes))])
    return x.astype(np.float64) @ weight.astype(np.float64)
