"""Triton kernels: norm, activation and quantization in one pass over memory, and products with weights of 4 bits.

Each is tested against a plain twin by Triton's interpreter, on a CPU. Block sizes are guesses until they are measured.
Codes are rounded in float32 before they are stored, halves to the even one, so that no device's or interpreter's own
conversion decides a code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from defaker_opt.runtime.torch_graph.graph import Attributes

_ELEMENTS = 1024  # of one program of an elementwise kernel

# Adding and taking away 1.5 · 2²³ leaves the nearest whole number, halves going to the even one.
_ROUND = tl.constexpr(12582912.0)
_FP8_LARGEST = tl.constexpr(448.0)
_FP8_SMALLEST_NORMAL = tl.constexpr(0.015625)  # 2⁻⁶
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_ROOT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _round_codes(values, step, fp8: tl.constexpr):
    """values / step to the nearest number that codes have, saturating, as float32."""
    steps = tl.div_rn(values, step)
    if fp8:
        steps = tl.minimum(tl.maximum(steps, -_FP8_LARGEST), _FP8_LARGEST)
        # The power of two below a number, of which E4M3 has steps of an eighth.
        bits = steps.to(tl.int32, bitcast=True) & _EXPONENT_BITS
        power = tl.maximum(bits.to(tl.float32, bitcast=True), _FP8_SMALLEST_NORMAL)
        shift = power * (0.125 * _ROUND)
        return (steps + shift) - shift
    steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
    return (steps + _ROUND) - _ROUND


@triton.jit
def _round_bfloat16(values):
    """Numbers of float32 to the nearest that bfloat16 has, halves to the even one, as float32."""
    bits = values.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _quantize_kernel(x, step, codes, count, fp8: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rounded = _round_codes(values, tl.load(step), fp8)
    tl.store(codes + at, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _norm_quantize_kernel(
    x, weight, bias, step, codes, columns, epsilon,
    centred: tl.constexpr, biased: tl.constexpr, fp8: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, block)
    inside = at < columns
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if centred:
        values = tl.where(inside, values - tl.sum(values, 0) / columns, 0.0)
    variance = tl.sum(values * values, 0) / columns
    normed = values * tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon)) * tl.load(weight + at, mask=inside, other=0.0)
    if biased:
        normed += tl.load(bias + at, mask=inside, other=0.0)
    rounded = _round_codes(normed, tl.load(step), fp8)
    tl.store(codes + row + at, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _shifted(product, scale, bias, at, inside, columns, scaled: tl.constexpr, biased: tl.constexpr):
    """product · scale + bias of the places `at` in a matrix of so many columns, in float32."""
    values = tl.load(product + at, mask=inside, other=0).to(tl.float32)
    if scaled:
        values = values * tl.load(scale + at % columns, mask=inside, other=0.0)
    if biased:
        values = values + tl.load(bias + at % columns, mask=inside, other=0.0)
    return values


@triton.jit
def _scale_and_shift_kernel(
    product, scale, bias, result, count, columns, biased: tl.constexpr, narrow: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    values = _shifted(product, scale, bias, at, inside, columns, True, biased)
    if narrow:
        values = _round_bfloat16(values)
    tl.store(result + at, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_quantize_kernel(
    product, scale, bias, step, codes, count, columns,
    scaled: tl.constexpr, biased: tl.constexpr, narrow: tl.constexpr, fp8: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    values = _shifted(product, scale, bias, at, inside, columns, scaled, biased)
    if narrow:
        values = _round_bfloat16(values)
    active = 0.5 * values * (1.0 + tl.erf(values * _ROOT_HALF))
    rounded = _round_codes(active, tl.load(step), fp8)
    tl.store(codes + at, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _gate_quantize_kernel(gate, up, step, codes, count, fp8: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    gated = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    # Of the larger of two exponentials, so that none overflows.
    small = tl.exp(-tl.abs(gated))
    share = tl.div_rn(tl.where(gated < 0, small, 1.0), 1.0 + small)
    active = gated * share * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    rounded = _round_codes(active, tl.load(step), fp8)
    tl.store(codes + at, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _weights(codes, steps, fp4: tl.constexpr):
    """Half bytes times steps as float16."""
    if fp4:
        # The bits of FP4 lie within float16's, whose exponents are 14 higher.
        bits = ((codes & 8) << 12) | ((codes & 7) << 9)
        weights = (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0 * steps).to(tl.float16)
    else:
        weights = (codes - 16 * (codes > 7).to(tl.int32)).to(tl.float16) * steps
    return weights


@triton.jit
def _block_product_kernel(
    x, packed, scale, whole, result, rows, columns, out, group,
    fp4: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr, block_pairs: tl.constexpr,
):  # fmt: skip
    """Even and odd rows of the weights are two products, so that halves of a byte need not be interleaved."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_out + tl.arange(0, block_out)
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    for start in range(0, columns // 2, block_pairs):
        pair = start + tl.arange(0, block_pairs)
        read = (row[:, None] < rows) & (pair[None, :] < columns // 2)
        stored = (pair[:, None] < columns // 2) & (column[None, :] < out)
        even = tl.load(x + row[:, None] * columns + 2 * pair[None, :], mask=read, other=0.0)
        odd = tl.load(x + row[:, None] * columns + 2 * pair[None, :] + 1, mask=read, other=0.0)
        both = tl.load(packed + pair[:, None] * out + column[None, :], mask=stored, other=0).to(tl.int32)
        # Both halves of a byte are in one block of rows, as blocks have an even number of them.
        steps = tl.load(scale + (2 * pair[:, None] // group) * out + column[None, :], mask=stored, other=0)
        if fp4:
            # So do those of a positive FP8, with exponents that are 8 higher.
            positive = (steps.to(tl.int32) << 7).to(tl.int16).to(tl.float16, bitcast=True)
            steps = positive.to(tl.float32) * 256.0 * tl.load(whole)
        total = tl.dot(even, _weights(both & 15, steps, fp4), total)
        total = tl.dot(odd, _weights(both >> 4, steps, fp4), total)
    inside = (row[:, None] < rows) & (column[None, :] < out)
    tl.store(result + row[:, None] * out + column[None, :], total, mask=inside)


def quantize(x: Tensor, step: Tensor, kind: torch.dtype) -> Tensor:
    """Codes of x with scale step []: int8 or FP8, to the nearest, halves to the even one, saturating."""
    given = x.contiguous()
    codes = torch.empty_like(given, dtype=kind)
    _quantize_kernel[_grid(codes)](given, step, codes, codes.numel(), fp8=_is_fp8(kind), block=_ELEMENTS)
    return codes


def norm_quantize(x: Tensor, weight: Tensor, bias: Tensor | None, step: Tensor, attributes: Attributes) -> Tensor:
    """See `fused.norm_quantize`; a row is one program."""
    given = x.contiguous()
    columns = given.shape[-1]
    codes = torch.empty_like(given, dtype=attributes["codes"])
    _norm_quantize_kernel[(given.numel() // columns,)](
        given, weight, _or(bias, weight), step, codes, columns, attributes["epsilon"],
        centred=attributes["centred"], biased=bias is not None, fp8=_is_fp8(codes.dtype),
        block=triton.next_power_of_2(columns),
    )  # fmt: skip
    return codes


def scale_and_shift(product: Tensor, scale: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """product [..., out] of codes · scale [out] + bias [out] as a type of floats."""
    given = product.contiguous()
    result = torch.empty_like(given, dtype=kind)
    _scale_and_shift_kernel[_grid(result)](
        given, scale, _or(bias, scale), result, result.numel(), given.shape[-1],
        biased=bias is not None, narrow=kind == torch.bfloat16, block=_ELEMENTS,
    )  # fmt: skip
    return result


def gelu_quantize(
    product: Tensor, scale: Tensor | None, bias: Tensor | None, step: Tensor, attributes: Attributes
) -> Tensor:
    """Codes of GELU of product · scale + bias, where None is done already; by the exact formula, with erf."""
    given = product.contiguous()
    codes = torch.empty_like(given, dtype=attributes["codes"])
    _gelu_quantize_kernel[_grid(codes)](
        given, _or(scale, step), _or(bias, step), step, codes, codes.numel(), given.shape[-1],
        scaled=scale is not None, biased=bias is not None, narrow=attributes["compute"] == torch.bfloat16,
        fp8=_is_fp8(codes.dtype), block=_ELEMENTS,
    )  # fmt: skip
    return codes


def gate_quantize(gate: Tensor, up: Tensor, step: Tensor, attributes: Attributes) -> Tensor:
    """See `fused.gate_quantize`."""
    left, right = gate.contiguous(), up.contiguous()
    codes = torch.empty_like(left, dtype=attributes["codes"])
    _gate_quantize_kernel[_grid(codes)](
        left, right, step, codes, codes.numel(), fp8=_is_fp8(codes.dtype), block=_ELEMENTS
    )
    return codes


def int4_product(rows: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """rows float16 [n, in] · codes packed [in / 2, out] with scale float16 [blocks, out] → float32 [n, out]."""
    return _block_product(rows, packed, scale, None)


def fp4_product(rows: Tensor, packed: Tensor, steps: Tensor, whole: Tensor) -> Tensor:
    """The same with codes of FP4, steps [blocks, out] bytes of positive FP8, and whole [] float32 that they are of."""
    return _block_product(rows, packed, steps, whole)


def _block_product(rows: Tensor, packed: Tensor, scale: Tensor, whole: Tensor | None) -> Tensor:
    given = rows.contiguous()
    count, columns = given.shape
    out = packed.shape[1]
    result = torch.empty(count, out, dtype=torch.float32, device=given.device)
    block_rows, block_out, block_pairs = 16, 64, 32
    _block_product_kernel[(triton.cdiv(count, block_rows), triton.cdiv(out, block_out))](
        given, packed, scale, _or(whole, scale), result, count, columns, out, columns // len(scale),
        fp4=whole is not None, block_rows=block_rows, block_out=block_out, block_pairs=block_pairs,
    )  # fmt: skip
    return result


def _grid(result: Tensor) -> tuple[int]:
    return (triton.cdiv(result.numel(), _ELEMENTS),)


def _is_fp8(kind: torch.dtype) -> bool:
    return kind == torch.float8_e4m3fn


def _or(tensor: Tensor | None, other: Any) -> Any:
    """A kernel wants a pointer also where it reads none."""
    return other if tensor is None else tensor
