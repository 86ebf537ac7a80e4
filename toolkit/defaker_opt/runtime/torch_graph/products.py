"""Products of codes, of floats and attention: library calls on CUDA, the same numbers by plain ones on the CPU.

Weights lie as [out, in], what is multiplied by them as [..., in]. `compute` of the attributes is the type that a
product of a linear layer is handed on in. On a GPU:

int8    torch._int_mm: exact sums in int32; scale and bias follow in float32
fp8     torch._scaled_mm: sums in float32 without fast accumulation; with scale and bias inside if `compute` is bfloat16
int4    Triton kernel for few rows; for many rows the weights are widened to float16 first, then one float16 product
fp4     the same; tensor cores with products of FP4 itself (Blackwell's) want activations in FP4 too, and are not used
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from defaker_opt.runtime.torch_graph.graph import Attributes

# Of torch._int_mm on CUDA: more than 16 rows, sizes in eights; torch._scaled_mm wants sizes in sixteens.
_LEAST_ROWS = 17
_SIZES_IN = 16

# Up to so many rows reading the weights is the cost, and 4 bits of them are a quarter of 16. Not measured.
_FEW_ROWS = 64


def scale_and_shift(product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """product [..., out] · scale [out] + bias [out], summed in float32; what is None is done already or not wanted."""
    result = product.float() if scale is None else product.float() * scale
    return result if bias is None else result + bias


def multiply_codes(
    attributes: Attributes, codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes [..., in] times codes [out, in], both int8 or both FP8: the product, and the scale and bias still due."""
    rows = codes.reshape(-1, codes.shape[-1])
    if codes.dtype == torch.int8:
        product = _multiply_int8(rows, weight)
    elif not rows.is_cuda:
        product = rows.float() @ weight.float().t()
    elif attributes["compute"] == torch.bfloat16:
        product, due = _multiply_fp8_scaled(rows, weight, scale, bias), (None, None)
        return product.reshape(*codes.shape[:-1], -1), *due
    else:
        product = _multiply_fp8(rows, weight)
    return product.reshape(*codes.shape[:-1], -1), scale, bias


def quantized_linear(
    attributes: Attributes, codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Codes [..., in] and weight [out, in]; scale [out] is that of both together. Returns [..., out] of `compute`."""
    product, scale_due, bias_due = multiply_codes(attributes, codes, weight, scale, bias)
    if product.is_cuda and scale_due is not None:
        from defaker_opt.runtime.torch_graph import kernels

        return kernels.scale_and_shift(product, scale_due, bias_due, attributes["compute"])
    return scale_and_shift(product, scale_due, bias_due).to(attributes["compute"])


def _multiply_int8(rows: Tensor, weight: Tensor) -> Tensor:
    """[rows, in] · [out, in]ᵀ as int32, exact."""
    if not rows.is_cuda:
        return torch._int_mm(rows, weight.t())
    count, out = rows.shape[0], weight.shape[0]
    padded = _padded(rows, max(_LEAST_ROWS, count))
    return torch._int_mm(padded, _padded(weight, _whole(out)).t()).narrow(0, 0, count).narrow(1, 0, out)


def _multiply_fp8(rows: Tensor, weight: Tensor) -> Tensor:
    """[rows, in] · [out, in]ᵀ as float32, without scales."""
    one = _ones(1, rows.device).reshape(())
    wide = _padded(weight, _whole(weight.shape[0]))
    product: Tensor = torch._scaled_mm(
        _padded(rows, rows.shape[0]), wide.t(), one, one, out_dtype=torch.float32, use_fast_accum=False
    )
    return product.narrow(1, 0, weight.shape[0])


def _multiply_fp8_scaled(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """([rows, in] · [out, in]ᵀ) · scale [out] + bias [out] as bfloat16, in one call."""
    out = _whole(weight.shape[0])
    product: Tensor = torch._scaled_mm(
        _padded(rows, rows.shape[0]),
        _padded(weight, out).t(),
        _ones(rows.shape[0], rows.device),
        _lengthened(scale, out).reshape(1, -1),
        bias=None if bias is None else _lengthened(bias, out).to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return product.narrow(1, 0, weight.shape[0])


def _ones(rows: int, device: torch.device) -> Tensor:
    """[rows, 1]. A captured CUDA graph reads it at its address, so its memory is never given back."""
    return _kept_ones(1 << (rows - 1).bit_length(), device).narrow(0, 0, rows)


# Of powers of two alone, so all of them together are no more than twice the largest.
@functools.cache
def _kept_ones(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, 1, device=device)


def _lengthened(vector: Tensor, size: int) -> Tensor:
    return vector if len(vector) == size else functional.pad(vector, (0, size - len(vector)))


def _whole(size: int) -> int:
    return -(-size // _SIZES_IN) * _SIZES_IN


def _padded(codes: Tensor, rows: int) -> Tensor:
    """[rows, in] with zeros up to that many rows and up to whole sixteens of columns; itself if it has them."""
    down, right = rows - codes.shape[0], _whole(codes.shape[1]) - codes.shape[1]
    if not down and not right:
        return codes.contiguous()
    # Padding knows no FP8; its bytes of 0 are its number 0.
    return functional.pad(codes.view(torch.int8), (0, right, 0, down)).view(codes.dtype)


def linear(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias [out] in `compute`, in which weight and bias lie."""
    return functional.linear(x.to(weight.dtype), weight, bias)


def unpack_int4(packed: Tensor) -> Tensor:
    """packed uint8 [in / 2, out], the lower half of a byte first → codes int8 [in, out], -8 … 7."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).to(torch.int8)
    return (halves - 16 * (halves > 7).to(torch.int8)).reshape(-1, packed.shape[1])


def pack_int4(codes: Tensor) -> Tensor:
    """The inverse of `unpack_int4`; `in` is even."""
    pairs = (codes & 15).to(torch.uint8).reshape(-1, 2, codes.shape[1])
    return pairs[:, 0] | (pairs[:, 1] << 4)


def widen_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """packed [in / 2, out] and scale float16 [blocks, out] → float16 [in, out]."""
    codes = unpack_int4(packed)
    return codes.to(scale.dtype) * scale.repeat_interleave(len(codes) // len(scale), dim=0)


def block_linear(
    attributes: Attributes, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [..., in] times codes of 4 bits in blocks of rows. Returns [..., out] of `compute`.

    On CUDA x is float16, as the graph says; on the CPU the weights are, and the product is float32, as ONNX Runtime's.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.is_cuda:
        product = rows.float() @ widen_int4(packed, scale).float()
    elif len(rows) <= _FEW_ROWS:
        from defaker_opt.runtime.torch_graph import kernels

        product = kernels.int4_product(rows.to(scale.dtype), packed, scale)
    else:
        product = (rows.to(scale.dtype) @ widen_int4(packed, scale)).float()
    shifted = scale_and_shift(product, None, bias).to(attributes["compute"])
    return shifted.reshape(*x.shape[:-1], -1)


# FP4's sign, exponent and fraction in the places that float16 has them in, whose exponents are 14 higher.
_FP4_SIGN, _FP4_REST, _FP4_SHIFT, _FP4_TIMES = -0x8000, 7, 9, 2.0**14


def pack_fp4(numbers: Tensor) -> Tensor:
    """Numbers of FP4 [in, out], as any floats → packed uint8 [in / 2, out], the lower half of a byte first."""
    bits = (numbers.float() / _FP4_TIMES).half().view(torch.int16)
    return pack_int4(((bits >> _FP4_SHIFT) & _FP4_REST) | (8 * (bits < 0)))


def widen_fp4(packed: Tensor, steps: Tensor, whole: Tensor) -> Tensor:
    """packed [in / 2, out], steps [groups, out] bytes of FP8, whole [] float32 → float32 [in, out]."""
    codes = unpack_int4(packed).to(torch.int16)  # negative with the sign's bit
    bits = (codes & _FP4_SIGN) | ((codes & _FP4_REST) << _FP4_SHIFT)
    scale = steps.view(torch.float8_e4m3fn).float() * whole
    numbers = bits.view(torch.float16).float() * _FP4_TIMES
    return numbers * scale.repeat_interleave(len(codes) // len(scale), dim=0)


def fp4_linear(
    attributes: Attributes, x: Tensor, packed: Tensor, steps: Tensor, whole: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [..., in] times codes of FP4 in blocks of rows, see `widen_fp4`. Returns [..., out] of `compute`.

    On CUDA x and the weights are float16, as the graph says; on the CPU, as `block_linear`'s, both are float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.is_cuda:
        product = rows.float() @ widen_fp4(packed, steps, whole)
    elif len(rows) <= _FEW_ROWS:
        from defaker_opt.runtime.torch_graph import kernels

        product = kernels.fp4_product(rows.half(), packed, steps, whole)
    else:
        product = (rows.half() @ widen_fp4(packed, steps, whole).half()).float()
    shifted = scale_and_shift(product, None, bias).to(attributes["compute"])
    return shifted.reshape(*x.shape[:-1], -1)


def settle_mask(attributes: Attributes, mask: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
    """Choose the form of a mask that depends on sizes alone: "none", "causal" (each row sees all that is not after it,
    and the last row everything), or "given". A mask of zeros is none; one that is not known beforehand is given.
    """
    if mask is None or not bool(mask.any()):
        return {**attributes, "mask": "none"}, None
    rows, columns = mask.shape[-2:]
    causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    floor = torch.finfo(torch.float16).min
    if (
        rows <= columns
        and bool(((mask == 0) == causal).all())
        and bool((mask[~causal.expand(mask.shape)] < floor).all())
    ):
        return {**attributes, "mask": "causal"}, None
    return {**attributes, "mask": "given"}, mask


def attention(attributes: Attributes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query · key · scale + mask) · value.

    query [..., S, d], key [..., d, P] as the graph's product has it, value [..., P, d], mask [..., S, P] is added. On
    CUDA in the attribute `type`; on the CPU in float32, as ONNX Runtime, too, has no narrower products there.
    """
    if query.is_cuda:
        return fused_attention(attributes, query, key, value, mask)
    scores = (query.float() @ key.float()) * attributes["scale"]
    if attributes["mask"] == "causal":
        rows, columns = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    attended: Tensor = scores.softmax(-1) @ value.float()
    return attended


def fused_attention(
    attributes: Attributes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The same by torch's fused attention in the attribute `type`; flash attention where there is no mask to read."""
    kind = attributes["type"]
    narrow_query, narrow_key, narrow_value = (each.to(kind) for each in (query, key.transpose(-1, -2), value))
    form: Any = None
    if attributes["mask"] == "causal":
        form = causal_lower_right(query.shape[-2], key.shape[-1])
    elif mask is not None:
        form = mask.to(kind)
    attended: Tensor = functional.scaled_dot_product_attention(
        narrow_query, narrow_key, narrow_value, attn_mask=form, scale=attributes["scale"]
    )
    return attended
