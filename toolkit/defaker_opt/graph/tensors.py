"""What writers of codes put into graphs: tensors that are read when they are written, constants, shared inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from defaker_opt.graph.layers import Layer
from defaker_opt.methods import QuantizedWeight

# Codes of an activation: the uint8 tensor, its scale, its zero point.
Quantized = tuple[ir.Value, ir.Value, ir.Value]
MakeCodes = Callable[[ir.Graph, Layer], tuple[list[ir.Node], Quantized]]
QuantizedInputs = dict[tuple[MakeCodes, ir.Value], Quantized]
Codes = Callable[[], QuantizedWeight]


def add_tensor_(
    graph: ir.Graph, name: str, shape: tuple[int, ...], kind: ir.DataType, read: Callable[[], NDArray[Any]]
) -> ir.Value:
    """A tensor whose values are read when they are written; one of that name that is there already stays."""
    if name in graph.initializers:  # a layer that is run twice
        return graph.initializers[name]
    value = ir.Value(
        name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy(name, shape, kind, read)
    )
    graph.initializers.add(value)
    return value


def lazy(name: str, shape: tuple[int, ...], kind: ir.DataType, read: Callable[[], NDArray[Any]]) -> ir.LazyTensor:
    """Values that are read anew whenever they are needed."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(read()), name=name), dtype=kind, shape=ir.Shape(shape), name=name
    )


def constant_(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """A small tensor of the graph, once for each name."""
    if name not in graph.initializers:
        tensor = ir.Tensor(np.asarray(value), name=name)
        kind = ir.TensorType(tensor.dtype)
        graph.initializers.add(ir.Value(name=name, shape=ir.Shape(np.shape(value)), type=kind, const_value=tensor))
    return graph.initializers[name]


def reader_of(value: ir.Value | None) -> Callable[[], NDArray[Any]] | None:
    """Reads what is stored, or as float32 what stored codes stand for; None if it is computed.

    The nodes that decode may be gone from the graph when it is called.
    """
    if value is not None and value.const_value is not None:
        return value.const_value.numpy
    decoder = value.producer() if value is not None else None
    if decoder is None or decoder.op_type != "DequantizeLinear":
        return None
    codes, scale = (reader_of(each) for each in decoder.inputs[:2])
    return None if codes is None or scale is None else functools.partial(_decoded, codes, scale)


def _decoded(read_codes: Callable[[], NDArray[Any]], read_scale: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """One scale, one for each column of the last axis, or rows of them for blocks of rows."""
    codes, scale = read_codes(), read_scale().astype(np.float32)
    if scale.ndim > 1:
        scale = np.repeat(scale, len(codes) // len(scale), axis=0)
    numbers: NDArray[Any] = codes.astype(np.float32) * scale
    return numbers


def codes_and_scale(graph: ir.Graph, layer: Layer, codes: Codes) -> tuple[ir.Value, ir.Value]:
    """Codes [in, out], int8 or FP8, and scale [out] as tensors of the graph."""
    rows, columns = codes().codes.shape
    kind = ir.DataType.FLOAT8E4M3FN if codes().scheme.floating else ir.DataType.INT8
    weight = add_tensor_(graph, f"{layer.name}.codes", (columns, rows), kind, lambda: codes().codes.T)
    scale = add_tensor_(graph, f"{layer.name}.scale", (rows,), ir.DataType.FLOAT, lambda: codes().scale[:, 0])
    return weight, scale


def quantized_input(
    graph: ir.Graph, layer: Layer, make: MakeCodes, quantized: QuantizedInputs
) -> tuple[list[ir.Node], Quantized]:
    """Layers that read the same activations share their codes: nodes to add, none for the second of them."""
    if (make, layer.x) in quantized:
        return [], quantized[make, layer.x]
    nodes, quantized[make, layer.x] = make(graph, layer)
    return nodes, quantized[make, layer.x]
