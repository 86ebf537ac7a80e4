"""Write a detector's weights into its graphs: linear layers in the target's encodings, everything else as float32.

matmul                 float32 product; stored transposed, [in, out]
matmul_integer         activations to uint8 with one scale a call, integer product, back to float;
                       stored as codes [in, out] int8 and scale [out]
matmul_integer_token   the same with one scale a token, which outliers in other tokens cannot spoil
qdq_uint8              activations through QuantizeLinear and DequantizeLinear with one scale for good, and a float
                       product with what DequantizeLinear makes of codes [in, out] int8 and scale [out]
matmul_nbits           onnxruntime's blocked product of few bits; codes packed [out, groups, group * bits / 8],
                       scale [out * groups], zero points packed [out * ceil(groups * bits / 8)]
An input factor [in] of a layer's codes becomes a Mul before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.graph import Graph
from defaker_opt.graph.layers import Layer, layers_of, replace_layer_
from defaker_opt.graph.packing import pack_codes
from defaker_opt.methods import QuantizedWeight

# MatMulNBits: let the kernel round activations to 8 bits by block, which is what makes it faster than float.
_NBITS_INT8_COMPUTE = 4

# Activations of one token become `round(x / scale) + 128`, an unsigned byte, which VNNI multiplies fastest.
_TOKEN_ZERO = 128
_TOKEN_LARGEST = 127

# A token of zeros gets this scale instead of 0, and stays zero.
_SMALLEST_SCALE = 1e-30

# Codes of an activation: the uint8 tensor, its scale, its zero point.
_Quantized = tuple[ir.Value, ir.Value, ir.Value]
_MakeCodes = Callable[[ir.Graph, "Layer"], tuple[list[ir.Node], _Quantized]]
_QuantizedInputs = dict[tuple[_MakeCodes, ir.Value], _Quantized]
_Codes = Callable[[], QuantizedWeight]


def fill_weights_(graph: Graph, detector: Detector, encodings: dict[str, str]) -> None:
    """Give every parameter its values, lazily: a tensor is read, encoded and written one at a time when saving."""
    stage, inner = graph.spec.name, graph.model.graph
    quantized: _QuantizedInputs = {}
    for name in linear_weights(detector.config, stage):
        for layer in list(layers_of(inner, name)):
            if name not in detector.codes:
                _float_(inner, layer, detector)
            else:
                # Looked up anew whenever needed: kept, the codes of all layers would be in memory at once.
                codes = functools.partial(detector.codes.__getitem__, name)
                _scale_input_(inner, layer, codes)
                WRITERS[encodings[codes().scheme.kind]](inner, layer, codes, quantized)
    for name, shape in parameter_shapes(detector.config, stage).items():
        if name in inner.initializers:
            read = functools.partial(_read_array, detector, name)
            inner.initializers[name].const_value = _lazy(name, shape, ir.DataType.FLOAT, read)
    if any(node.domain == "com.microsoft" for node in inner):
        graph.model.opset_imports["com.microsoft"] = 1
    inner.sort()


def _read_array(detector: Detector, name: str) -> NDArray[Any]:
    array: NDArray[Any] = detector.read(name).numpy()
    return array


def _add_tensor_(
    graph: ir.Graph, name: str, shape: tuple[int, ...], kind: ir.DataType, read: Callable[[], NDArray[Any]]
) -> ir.Value:
    if name in graph.initializers:  # a layer that is run twice
        return graph.initializers[name]
    value = ir.Value(
        name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=_lazy(name, shape, kind, read)
    )
    graph.initializers.add(value)
    return value


def _lazy(name: str, shape: tuple[int, ...], kind: ir.DataType, read: Callable[[], NDArray[Any]]) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(read()), name=name), dtype=kind, shape=ir.Shape(shape), name=name
    )


def _float_(graph: ir.Graph, layer: Layer, detector: Detector) -> None:
    rows, columns = linear_weights(detector.config, layer.name.partition(".")[0])[layer.name]
    weight = _add_tensor_(
        graph,
        f"{layer.name}.transposed",
        (columns, rows),
        ir.DataType.FLOAT,
        lambda: _read_array(detector, layer.name).T,
    )
    product = ir.node("MatMul", [layer.x, weight], name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def _matmul_integer_(graph: ir.Graph, layer: Layer, codes: _Codes, quantized: _QuantizedInputs) -> None:
    nodes, (activation, activation_scale, zero) = _quantized_input(graph, layer, _codes_by_tensor, quantized)
    product, scale = _integer_product(graph, layer, codes, activation, zero)
    cast = ir.node("Cast", product.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{layer.name}.cast")
    # In this order onnxruntime makes one operator of the four.
    both = ir.node("Mul", [activation_scale, scale], name=f"{layer.name}.scales")
    result = ir.node("Mul", [cast.outputs[0], both.outputs[0]], name=f"{layer.name}.rescale")
    replace_layer_(graph, layer, [*nodes, product, cast, both, result], result.outputs[0])


def _matmul_integer_token_(graph: ir.Graph, layer: Layer, codes: _Codes, quantized: _QuantizedInputs) -> None:
    nodes, (activation, activation_scale, zero) = _quantized_input(graph, layer, _codes_by_token, quantized)
    product, scale = _integer_product(graph, layer, codes, activation, zero)
    cast = ir.node("Cast", product.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{layer.name}.cast")
    by_row = ir.node("Mul", [cast.outputs[0], scale], name=f"{layer.name}.rescale_rows")
    result = ir.node("Mul", [by_row.outputs[0], activation_scale], name=f"{layer.name}.rescale")
    replace_layer_(graph, layer, [*nodes, product, cast, by_row, result], result.outputs[0])


def _quantized_input(
    graph: ir.Graph, layer: Layer, make: _MakeCodes, quantized: _QuantizedInputs
) -> tuple[list[ir.Node], _Quantized]:
    """Layers that read the same activations share their codes: nodes to add, none for the second of them."""
    if (make, layer.x) in quantized:
        return [], quantized[make, layer.x]
    nodes, quantized[make, layer.x] = make(graph, layer)
    return nodes, quantized[make, layer.x]


def _integer_product(
    graph: ir.Graph, layer: Layer, codes: _Codes, activation: ir.Value, zero: ir.Value
) -> tuple[ir.Node, ir.Value]:
    weight, scale = _codes_and_scale(graph, layer, codes)
    return ir.node("MatMulInteger", [activation, weight, zero], name=layer.name), scale


def _codes_and_scale(graph: ir.Graph, layer: Layer, codes: _Codes) -> tuple[ir.Value, ir.Value]:
    """Codes [in, out] int8 and scale [out] as tensors of the graph."""
    rows, columns = codes().codes.shape
    weight = _add_tensor_(graph, f"{layer.name}.codes", (columns, rows), ir.DataType.INT8, lambda: codes().codes.T)
    scale = _add_tensor_(graph, f"{layer.name}.scale", (rows,), ir.DataType.FLOAT, lambda: codes().scale[:, 0])
    return weight, scale


def _codes_by_tensor(graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], _Quantized]:
    node = ir.node("DynamicQuantizeLinear", [layer.x], num_outputs=3, name=f"{layer.name}.quantize")
    activation, scale, zero = node.outputs
    return [node], (activation, scale, zero)


def _codes_by_token(graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], _Quantized]:
    zero = _constant_(graph, "token_zero", np.uint8(_TOKEN_ZERO))
    absolute = ir.node("Abs", [layer.x], name=f"{layer.name}.abs")
    axis = _constant_(graph, "token_axis", np.array([-1]))
    largest = ir.node("ReduceMax", [absolute.outputs[0], axis], {"keepdims": 1}, name=f"{layer.name}.largest")
    step = _constant_(graph, "token_step", np.float32(1 / _TOKEN_LARGEST))
    scale = ir.node("Mul", [largest.outputs[0], step], name=f"{layer.name}.token_scale")
    smallest = _constant_(graph, "token_smallest", np.float32(_SMALLEST_SCALE))
    safe = ir.node("Max", [scale.outputs[0], smallest], name=f"{layer.name}.safe_scale")
    ratio = ir.node("Div", [layer.x, safe.outputs[0]], name=f"{layer.name}.ratio")
    one = _constant_(graph, "token_one", np.float32(1))
    codes = ir.node("QuantizeLinear", [ratio.outputs[0], one, zero], name=f"{layer.name}.quantize")
    return [absolute, largest, scale, safe, ratio, codes], (codes.outputs[0], safe.outputs[0], zero)


def _constant_(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.Tensor(np.asarray(value), name=name)
        kind = ir.TensorType(tensor.dtype)
        graph.initializers.add(ir.Value(name=name, shape=ir.Shape(np.shape(value)), type=kind, const_value=tensor))
    return graph.initializers[name]


def _qdq_uint8_(graph: ir.Graph, layer: Layer, codes: _Codes, quantized: _QuantizedInputs) -> None:
    step = codes().input_scale
    assert step is not None, f"{layer.name}: static activations without a scale"
    nodes, (activation, input_scale, zero) = _quantized_input(graph, layer, _StaticCodes(step), quantized)
    given = ir.node("DequantizeLinear", [activation, input_scale, zero], name=f"{layer.name}.dequantize")
    weight, scale = _codes_and_scale(graph, layer, codes)
    decoded = ir.node("DequantizeLinear", [weight, scale], {"axis": 1}, name=f"{layer.name}.dequantize_weight")
    product = ir.node("MatMul", [given.outputs[0], decoded.outputs[0]], name=layer.name)
    replace_layer_(graph, layer, [*nodes, given, decoded, product], product.outputs[0])


@dataclass(frozen=True)
class _StaticCodes:
    """Makes codes with one step for good; equal where the step is, so that layers share them."""

    step: float

    def __call__(self, graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], _Quantized]:
        scale = _constant_(graph, f"{layer.name}.input_scale", np.float32(self.step))
        zero = _constant_(graph, "token_zero", np.uint8(_TOKEN_ZERO))
        node = ir.node("QuantizeLinear", [layer.x, scale, zero], name=f"{layer.name}.quantize")
        return [node], (node.outputs[0], scale, zero)


def _scale_input_(graph: ir.Graph, layer: Layer, codes: _Codes) -> None:
    """Multiply what a layer reads by its codes' input factor, if they have one."""
    if codes().input_factor is None:
        return
    columns = codes().codes.shape[1]
    factor = _add_tensor_(
        graph, f"{layer.name}.factor", (columns,), ir.DataType.FLOAT, lambda: np.asarray(codes().input_factor)
    )
    product = ir.node("Mul", [layer.x, factor], name=f"{layer.name}.scale_input")
    graph.insert_before(layer.node, product)
    layer.x = product.outputs[0]


def _matmul_nbits_(graph: ir.Graph, layer: Layer, codes: _Codes, quantized: _QuantizedInputs) -> None:
    rows, columns = codes().codes.shape
    scheme = codes().scheme
    assert scheme.group_size is not None
    groups = columns // scheme.group_size
    shape = (rows, groups, scheme.group_size * scheme.bits // 8)
    weight = _add_tensor_(
        graph,
        f"{layer.name}.codes",
        shape,
        ir.DataType.UINT8,
        lambda: pack_codes(codes().codes, scheme.bits).reshape(shape),
    )
    scale = _add_tensor_(
        graph, f"{layer.name}.scale", (rows * groups,), ir.DataType.FLOAT, lambda: codes().scale.reshape(-1)
    )
    inputs = [layer.x, weight, scale]
    if codes().zero is not None:
        packed = (rows * -(-groups * scheme.bits // 8),)
        read = functools.partial(_packed_zero, codes)
        inputs.append(_add_tensor_(graph, f"{layer.name}.zero", packed, ir.DataType.UINT8, read))
    attributes = {
        "K": columns,
        "N": rows,
        "bits": scheme.bits,
        "block_size": scheme.group_size,
        "accuracy_level": _NBITS_INT8_COMPUTE,
    }
    product = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def _packed_zero(codes: _Codes) -> NDArray[np.uint8]:
    zero = codes().zero
    assert zero is not None
    return pack_codes(zero, codes().scheme.bits).reshape(-1)


# How codes of each encoding that a target may name are written. Weights that stay float have no codes.
WRITERS: dict[str, Callable[[ir.Graph, Layer, _Codes, _QuantizedInputs], None]] = {
    "matmul_integer": _matmul_integer_,
    "matmul_integer_token": _matmul_integer_token_,
    "qdq_uint8": _qdq_uint8_,
    "matmul_nbits": _matmul_nbits_,
}
