"""Codes between QuantizeLinear and DequantizeLinear: what a runtime fuses into products of codes.

qdq_uint8   activations with one scale for good, around zero point 128; codes [in, out] int8 and scale [out]
qdq_int8    the same numbers around zero point 0, as TensorRT wants them
qdq_fp8     the same in FP8 (E4M3)
dq_int8     weights only: codes [in, out] int8 and scale [out]; how activations are rounded is the runtime's choice
dq_int4     weights only: codes [in, out] int4 and scale [groups, out] float16, and a float16 product; norms, sums and
            softmax around it stay float32
dq_nvfp4    the same with codes [in, out] FP4 and scale [groups, out] FP8, itself codes with one float32 scale; each
            weight is a float32 before it becomes a float16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from defaker_opt.graph.layers import Layer, replace_layer_, replace_node_
from defaker_opt.graph.tensors import (
    Codes,
    Quantized,
    QuantizedInputs,
    add_tensor_,
    codes_and_scale,
    constant_,
    quantized_input,
)
from defaker_opt.methods import FP4, FP8

# Blocks of 4-bit codes need the DequantizeLinear of the first opset, FP4 that of the second, and both this or a later
# version of the file format.
BLOCKS_OPSET, FP4_OPSET = 21, 23
FP4_IR_VERSION = 11

# By encoding, what stands for 0 in the codes of activations.
_ZERO = MappingProxyType({"qdq_uint8": np.uint8(128), "qdq_int8": np.int8(0), "qdq_fp8": np.zeros((), FP8)})


def static_writer(encoding: str) -> Callable[[ir.Graph, Layer, Codes, QuantizedInputs], None]:
    """Writes layers whose activations have one scale for good."""

    def write_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
        step = codes().input_scale
        assert step is not None, f"{layer.name}: static activations without a scale"
        nodes, (activation, input_scale, zero) = quantized_input(graph, layer, _StaticCodes(encoding, step), quantized)
        given = ir.node("DequantizeLinear", [activation, input_scale, zero], name=f"{layer.name}.dequantize")
        weight, scale = codes_and_scale(graph, layer, codes)
        decoded = ir.node("DequantizeLinear", [weight, scale], {"axis": 1}, name=f"{layer.name}.dequantize_weight")
        product = ir.node("MatMul", [given.outputs[0], decoded.outputs[0]], name=layer.name)
        replace_layer_(graph, layer, [*nodes, given, decoded, product], product.outputs[0])

    return write_


@dataclass(frozen=True)
class _StaticCodes:
    """Makes codes with one step for good; equal where the step is, so that layers share them."""

    encoding: str
    step: float

    def __call__(self, graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], Quantized]:
        scale = constant_(graph, f"{layer.name}.input_scale", np.float32(self.step))
        zero = constant_(graph, f"{self.encoding}.zero", _ZERO[self.encoding])
        node = ir.node("QuantizeLinear", [layer.x, scale, zero], name=f"{layer.name}.quantize")
        return [node], (node.outputs[0], scale, zero)


def write_int8_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    """Writes layers with codes of 8 bits, whose activations the runtime rounds."""
    weight, scale = codes_and_scale(graph, layer, codes)
    decoded = ir.node("DequantizeLinear", [weight, scale], {"axis": 1}, name=f"{layer.name}.dequantize_weight")
    product = ir.node("MatMul", [layer.x, decoded.outputs[0]], name=layer.name)
    replace_layer_(graph, layer, [decoded, product], product.outputs[0])


def write_int4_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    """Writes layers with blocks of 4-bit codes, whose scales are numbers of float16."""
    rows, columns = codes().codes.shape
    size = codes().scheme.group_size
    assert size is not None and codes().scheme.symmetric, f"{layer.name}: {codes().scheme} has no such blocks"
    weight = _tensor(graph, f"{layer.name}.codes", (columns, rows), ml_dtypes.int4, lambda: codes().codes.T)
    scale = _tensor(graph, f"{layer.name}.scale", (columns // size, rows), np.float16, lambda: codes().scale.T)
    blocks = {"axis": 0, "block_size": size}
    decoded = ir.node("DequantizeLinear", [weight, scale], blocks, name=f"{layer.name}.dequantize_weight")
    _write_narrow_product_(graph, layer, [decoded])


def write_nvfp4_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    """Writes layers with blocks of FP4 codes, whose scales are codes of FP8."""
    rows, columns = codes().codes.shape
    size = codes().scheme.group_size
    assert size is not None, f"{layer.name}: {codes().scheme} has no such blocks"
    weight = _tensor(graph, f"{layer.name}.codes", (columns, rows), FP4, lambda: codes().codes.T)
    steps = _tensor(graph, f"{layer.name}.block_scale", (columns // size, rows), FP8, lambda: codes().block_scales().T)
    whole = constant_(graph, f"{layer.name}.tensor_scale", np.float32(codes().tensor_scale))
    scale = ir.node("DequantizeLinear", [steps, whole], name=f"{layer.name}.dequantize_scale")
    blocks = {"axis": 0, "block_size": size}
    decoded = ir.node("DequantizeLinear", [weight, scale.outputs[0]], blocks, name=f"{layer.name}.dequantize_weight")
    # What the operator's own `output_dtype` says, which TensorRT for RTX 1.7 does not read.
    half = {"to": int(ir.DataType.FLOAT16)}
    narrowed = ir.node("Cast", decoded.outputs, half, name=f"{layer.name}.narrow_weight")
    _write_narrow_product_(graph, layer, [scale, decoded, narrowed])


def _write_narrow_product_(graph: ir.Graph, layer: Layer, weight: list[ir.Node]) -> None:
    """Put a float16 product in a layer's place. weight: the nodes that decode it to float16, the last one gives it."""
    given = ir.node("Cast", [layer.x], {"to": int(ir.DataType.FLOAT16)}, name=f"{layer.name}.narrow")
    product = ir.node("MatMul", [given.outputs[0], weight[-1].outputs[0]], name=layer.name)
    result = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{layer.name}.widen")
    replace_layer_(graph, layer, [*weight, given, product, result], result.outputs[0])


def _tensor(graph: ir.Graph, name: str, shape: tuple[int, int], kind: Any, read: Callable[[], Any]) -> ir.Value:
    dtype = ir.DataType.from_numpy(np.dtype(kind))
    return add_tensor_(graph, name, shape, dtype, lambda: read().astype(kind))


def code_operands_(graph: ir.Graph, scales: Mapping[str, tuple[float, float]]) -> None:
    """Round what attentions' first products multiply. scales: by attention, of its queries and its keys; int8 around 0.

    Raises AssertionError if one of them has no such product in the graph.
    """
    zero = constant_(graph, "qdq_int8.zero", _ZERO["qdq_int8"])
    found = set()
    for node in [node for node in graph if node.op_type == "MatMul" and all(map(_is_activation, node.inputs))]:
        attention = (node.name or "").partition("/")[0]
        if attention not in scales or any(map(_is_softmax, node.inputs)):
            continue
        found.add(attention)
        for side, scale in enumerate(scales[attention]):
            name = f"{node.name}.operand_{side}"
            step = constant_(graph, f"{name}.scale", np.float32(scale))
            codes = ir.node("QuantizeLinear", [node.inputs[side], step, zero], name=f"{name}.quantize")
            given = ir.node("DequantizeLinear", [codes.outputs[0], step, zero], name=f"{name}.dequantize")
            graph.insert_before(node, [codes, given])
            node.replace_input_with(side, given.outputs[0])
    assert found == set(scales), f"no product of queries and keys in {sorted(set(scales) - found)[:1]}"


def _is_softmax(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "Softmax"


def narrow_attention_(graph: ir.Graph) -> None:
    """Products of two activations become float16, as fused attention wants them; the softmax between stays float32."""
    for node in [node for node in graph if node.op_type == "MatMul" and all(map(_is_activation, node.inputs))]:
        half, whole = ({"to": int(kind)} for kind in (ir.DataType.FLOAT16, ir.DataType.FLOAT))
        given = [ir.node("Cast", [x], half, name=f"{node.name}.narrow_{side}") for side, x in enumerate(node.inputs)]
        product = ir.node("MatMul", [cast.outputs[0] for cast in given], name=node.name)
        result = ir.node("Cast", product.outputs, whole, name=f"{node.name}.widen")
        replace_node_(graph, node, [*given, product, result], result.outputs[0])


def _is_activation(value: ir.Value | None) -> bool:
    """Neither stored nor decoded from what is stored, and perhaps narrowed then."""
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return _is_activation(producer.inputs[0])
    if producer is None:
        return not value.is_initializer()
    decoded = producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None
    return not (decoded and producer.inputs[0].is_initializer())  # type: ignore[union-attr]
