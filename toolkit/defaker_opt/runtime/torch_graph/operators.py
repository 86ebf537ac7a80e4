"""ONNX operators as plain functions: (attributes, inputs …) → output.

Inputs that are left out are None. What an operator reads on the host (sizes, axes, bounds) is a tensor on the CPU; the
rest may lie on any device. Meanings are those of opset 20, 21 and 23, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from defaker_opt.runtime.torch_graph.graph import DTYPES, Attributes

FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Operator:
    """run: the function. host: which of its inputs are read on the host, and must not depend on a picture."""

    run: Callable[..., Tensor]
    host: frozenset[int] = frozenset()


def numbers(tensor: Tensor | None) -> list[int]:
    """The integers in a tensor on the CPU, none without one."""
    return [] if tensor is None else [int(number) for number in tensor.reshape(-1).tolist()]


def quantize(attributes: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """QuantizeLinear with one scale: x / scale, to the nearest code, halves to the even one, saturating."""
    kind = zero.dtype if zero is not None else torch.uint8
    steps = x.float() / scale
    if kind == torch.float8_e4m3fn:
        return steps.clamp(-FP8_LARGEST, FP8_LARGEST).to(kind)
    bounds = torch.iinfo(kind)
    shifted = steps.round() if zero is None else steps.round() + zero
    return shifted.clamp(bounds.min, bounds.max).to(kind)


def dequantize(attributes: Attributes, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """DequantizeLinear: one scale, one for each row along `axis`, or one for each block of rows."""
    axis = attributes.get("axis", 1) % max(1, codes.ndim)
    size = attributes.get("block_size", 0)

    def spread(each: Tensor) -> Tensor:
        if size:
            return each.repeat_interleave(size, dim=axis).narrow(axis, 0, codes.shape[axis])
        return each.reshape([-1 if at == axis else 1 for at in range(codes.ndim)]) if each.ndim else each

    wide = codes.to(scale.dtype)
    return (wide if zero is None else wide - spread(zero).to(scale.dtype)) * spread(scale)


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = numbers(shape)
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


def _slice(
    attributes: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Any = None
) -> Tensor:
    for place, (start, end) in enumerate(zip(numbers(starts), numbers(ends))):
        axis = numbers(axes)[place] if axes is not None else place
        step = numbers(steps)[place] if steps is not None else 1
        size = x.shape[axis]
        first, last = (max(0, min(size, at + size if at < 0 else at)) for at in (start, end))
        assert step > 0, "slices run forwards in what is exported"
        x = x[(slice(None),) * (axis % x.ndim) + (slice(first, last, step),)]
    return x


def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(numbers(axes)))


def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    wanted = numbers(axes)
    total = x.ndim + len(wanted)
    for axis in sorted(axis % total for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def _expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(numbers(shape))))  # type: ignore[no-untyped-call]


def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    sizes = list(x.shape)
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _range(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    assert indices.ndim == 0, "rows of tables are not in what is exported"
    return x.select(attributes.get("axis", 0), int(indices))


def _gather_nd(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    assert not attributes.get("batch_dims", 0), "not in what is exported"
    return x[tuple(indices.unbind(-1))]


def _reduce_mean(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(numbers(axes) or list(range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))


def _layer_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return functional.layer_norm(x.float(), x.shape[axis:], weight, bias, attributes.get("epsilon", 1e-5))


def _argmax(attributes: Attributes, x: Tensor) -> Tensor:
    assert not attributes.get("select_last_index", 0), "not in what is exported"
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


def _pad(
    attributes: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    assert _text(attributes.get("mode", b"constant")) == "constant", "not in what is exported"
    counts = numbers(pads)
    half = len(counts) // 2
    places = [axis % x.ndim for axis in numbers(axes)] if axes is not None else list(range(half))
    around = [(0, 0)] * x.ndim
    for place, axis in enumerate(places):
        around[axis] = (counts[place], counts[place + half])
    flat = [count for pair in reversed(around) for count in pair]
    return functional.pad(x, flat, value=0.0 if value is None else float(value))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _padded_for_window(attributes: Attributes, x: Tensor, fill: float) -> Tensor:
    """Pad as `pads` says, begin and end of each axis, as torch knows one number for both ends only."""
    assert _text(attributes.get("auto_pad", b"NOTSET")) == "NOTSET", "not in what is exported"
    pads: Sequence[int] = attributes.get("pads") or [0] * 2 * (x.ndim - 2)
    half = len(pads) // 2
    flat = [count for axis in reversed(range(half)) for count in (pads[axis], pads[axis + half])]
    return functional.pad(x, flat, value=fill) if any(flat) else x


def _convolve(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    ones = [1] * (x.ndim - 2)
    stride, dilation = attributes.get("strides") or ones, attributes.get("dilations") or ones
    padded = _padded_for_window(attributes, x.to(weight.dtype), 0.0)
    return torch.conv2d(padded, weight, bias, stride, 0, dilation, attributes.get("group", 1))


def _convolve_transposed(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert not any(attributes.get("pads") or [0]), "not in what is exported"
    ones = [1] * (x.ndim - 2)
    stride, dilation = attributes.get("strides") or ones, attributes.get("dilations") or ones
    extra = attributes.get("output_padding") or [0] * (x.ndim - 2)
    return torch.conv_transpose2d(
        x.to(weight.dtype), weight, bias, stride, 0, extra, attributes.get("group", 1), dilation
    )


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    padded = _padded_for_window(attributes, x, float("-inf"))
    ones = [1] * len(kernel)
    ceil = bool(attributes.get("ceil_mode", 0))
    return functional.max_pool2d(
        padded, kernel, attributes.get("strides") or ones, 0, attributes.get("dilations") or ones, ceil
    )


def _resize(
    attributes: Attributes, x: Tensor, region: Tensor | None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Nearest, to a whole multiple: what features of SAM2's pyramid are enlarged by."""
    mode = _text(attributes.get("mode", b"nearest"))
    assert mode == "nearest", f"{mode} is not in what is exported"
    target = numbers(sizes) or [int(size * scale) for size, scale in zip(x.shape, scales.tolist())]  # type: ignore[union-attr]
    assert all(size % old == 0 for size, old in zip(target, x.shape)), "not in what is exported"
    return functional.interpolate(x, target[2:], mode="nearest")


def _matmul(attributes: Attributes, left: Tensor, right: Tensor) -> Tensor:
    kind = torch.promote_types(left.dtype, right.dtype)
    return left.to(kind) @ right.to(kind)


def _where(attributes: Attributes, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition, yes, no)


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda attributes, *inputs: function(*inputs)


def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=_text(attributes.get("approximate", b"none")))


def _divide(attributes: Attributes, left: Tensor, right: Tensor) -> Tensor:
    """Of integers the quotient is one too, towards zero."""
    whole = not (left.is_floating_point() or right.is_floating_point())
    return torch.div(left, right, rounding_mode="trunc" if whole else None)


def _power(attributes: Attributes, x: Tensor, exponent: Tensor) -> Tensor:
    return x.pow(exponent.item())


OPERATORS = MappingProxyType(
    {
        "Add": Operator(_plain(torch.add)),
        "ArgMax": Operator(_argmax),
        "Cast": Operator(lambda attributes, x: x.to(DTYPES[attributes["to"]])),
        "Concat": Operator(lambda attributes, *parts: torch.cat(parts, attributes["axis"])),
        "Conv": Operator(_convolve),
        "ConvTranspose": Operator(_convolve_transposed),
        "Cos": Operator(_plain(torch.cos)),
        "DequantizeLinear": Operator(dequantize),
        "Div": Operator(_divide),
        "Expand": Operator(_expand, frozenset({1})),
        "Gather": Operator(_gather, frozenset({1})),
        "GatherND": Operator(_gather_nd),
        "Gelu": Operator(_gelu),
        "LayerNormalization": Operator(_layer_norm),
        "LessOrEqual": Operator(_plain(torch.le)),
        "MatMul": Operator(_matmul),
        "MaxPool": Operator(_max_pool),
        "Mul": Operator(_plain(torch.mul)),
        "Neg": Operator(_plain(torch.neg)),
        "Pad": Operator(_pad, frozenset({1, 2, 3})),
        "Pow": Operator(_power, frozenset({1})),
        "QuantizeLinear": Operator(quantize),
        "Range": Operator(_range, frozenset({0, 1, 2})),
        "Reciprocal": Operator(_plain(torch.reciprocal)),
        "ReduceMean": Operator(_reduce_mean, frozenset({1})),
        "Relu": Operator(_plain(torch.relu)),
        "Reshape": Operator(_reshape, frozenset({1})),
        "Resize": Operator(_resize, frozenset({1, 2, 3})),
        "Shape": Operator(_shape),
        "Sigmoid": Operator(_plain(torch.sigmoid)),
        "Sin": Operator(_plain(torch.sin)),
        "Slice": Operator(_slice, frozenset({1, 2, 3, 4})),
        "Softmax": Operator(lambda attributes, x: x.softmax(attributes.get("axis", -1))),
        "Sqrt": Operator(_plain(torch.sqrt)),
        "Squeeze": Operator(_squeeze, frozenset({1})),
        "Sub": Operator(_plain(torch.sub)),
        "Transpose": Operator(lambda attributes, x: x.permute(attributes["perm"])),
        "Unsqueeze": Operator(_unsqueeze, frozenset({1})),
        "Where": Operator(_where),
    }
)
