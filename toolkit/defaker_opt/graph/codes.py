"""Write a detector's weights into its graphs: linear layers in the target's encodings, everything else as float32.

matmul                 float32 product; stored transposed, [in, out]
matmul_integer         activations to uint8 with one scale a call, integer product, back to float;
                       stored as codes [in, out] int8 and scale [out]
matmul_integer_token   the same with one scale a token, which outliers in other tokens cannot spoil
matmul_nbits           onnxruntime's blocked product of few bits; codes packed [out, groups, group * bits / 8],
                       scale [out * groups], zero points packed [out * ceil(groups * bits / 8)]
qdq_*, dq_*            see `graph/qdq.py`
matmul_bnb4, llm_int8  see `graph/bitsandbytes.py`
An input factor [in] of a layer's codes becomes a Mul before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.graph import Graph
from defaker_opt.graph import bitsandbytes as bnb
from defaker_opt.graph.layers import Layer, layers_of, replace_layer_
from defaker_opt.graph.packing import pack_codes
from defaker_opt.graph.qdq import (
    BLOCKS_OPSET,
    FP4_IR_VERSION,
    FP4_OPSET,
    static_writer,
    write_int4_,
    write_int8_,
    write_nvfp4_,
)
from defaker_opt.graph.tensors import (
    Codes,
    Quantized,
    QuantizedInputs,
    add_tensor_,
    codes_and_scale,
    constant_,
    lazy,
    quantized_input,
)

# MatMulNBits: let the kernel round activations to 8 bits by block, which is what makes it faster than float.
_NBITS_INT8_COMPUTE = 4

# Activations of one token become `round(x / scale) + 128`, an unsigned byte, which VNNI multiplies fastest.
_TOKEN_ZERO = 128
_TOKEN_LARGEST = 127

# A token of zeros gets this scale instead of 0, and stays zero.
_SMALLEST_SCALE = 1e-30


def fill_weights_(graph: Graph, detector: Detector, encodings: dict[str, str]) -> None:
    """Give every parameter its values, lazily: a tensor is read, encoded and written one at a time when saving."""
    stage, inner = graph.spec.name, graph.model.graph
    quantized: QuantizedInputs = {}
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
            inner.initializers[name].const_value = lazy(name, shape, ir.DataType.FLOAT, read)
    declare_domains_(graph.model)
    inner.sort()


def declare_domains_(model: ir.Model) -> None:
    """Say in a model which opset its codes need, whose operators it has besides ONNX's, and what ours mean."""
    if any("block_size" in node.attributes for node in model.graph if node.op_type == "DequantizeLinear"):
        model.opset_imports[""] = BLOCKS_OPSET
    if any(value.dtype == ir.DataType.FLOAT4E2M1 for value in model.graph.initializers.values()):
        model.opset_imports[""] = FP4_OPSET
        model.ir_version = FP4_IR_VERSION
    domains = {node.domain for node in model.graph}
    if "com.microsoft" in domains:
        model.opset_imports["com.microsoft"] = 1
    if bnb.DOMAIN not in domains:
        return
    # In another opset than its model's, onnx's inliner would leave it as it is.
    function = bnb.llm_int8_function(model.opset_imports[""])
    model.functions[function.identifier()] = function
    model.opset_imports[bnb.DOMAIN] = 1


def _read_array(detector: Detector, name: str) -> NDArray[Any]:
    array: NDArray[Any] = detector.read(name).numpy()
    return array


def _float_(graph: ir.Graph, layer: Layer, detector: Detector) -> None:
    rows, columns = linear_weights(detector.config, layer.name.partition(".")[0])[layer.name]
    weight = add_tensor_(
        graph,
        f"{layer.name}.transposed",
        (columns, rows),
        ir.DataType.FLOAT,
        lambda: _read_array(detector, layer.name).T,
    )
    product = ir.node("MatMul", [layer.x, weight], name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def _matmul_integer_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    nodes, (activation, activation_scale, zero) = quantized_input(graph, layer, _codes_by_tensor, quantized)
    product, scale = _integer_product(graph, layer, codes, activation, zero)
    cast = ir.node("Cast", product.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{layer.name}.cast")
    # In this order onnxruntime makes one operator of the four.
    both = ir.node("Mul", [activation_scale, scale], name=f"{layer.name}.scales")
    result = ir.node("Mul", [cast.outputs[0], both.outputs[0]], name=f"{layer.name}.rescale")
    replace_layer_(graph, layer, [*nodes, product, cast, both, result], result.outputs[0])


def _matmul_integer_token_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    nodes, (activation, activation_scale, zero) = quantized_input(graph, layer, _codes_by_token, quantized)
    product, scale = _integer_product(graph, layer, codes, activation, zero)
    cast = ir.node("Cast", product.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{layer.name}.cast")
    by_row = ir.node("Mul", [cast.outputs[0], scale], name=f"{layer.name}.rescale_rows")
    result = ir.node("Mul", [by_row.outputs[0], activation_scale], name=f"{layer.name}.rescale")
    replace_layer_(graph, layer, [*nodes, product, cast, by_row, result], result.outputs[0])


def _integer_product(
    graph: ir.Graph, layer: Layer, codes: Codes, activation: ir.Value, zero: ir.Value
) -> tuple[ir.Node, ir.Value]:
    weight, scale = codes_and_scale(graph, layer, codes)
    return ir.node("MatMulInteger", [activation, weight, zero], name=layer.name), scale


def _codes_by_tensor(graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], Quantized]:
    node = ir.node("DynamicQuantizeLinear", [layer.x], num_outputs=3, name=f"{layer.name}.quantize")
    activation, scale, zero = node.outputs
    return [node], (activation, scale, zero)


def _codes_by_token(graph: ir.Graph, layer: Layer) -> tuple[list[ir.Node], Quantized]:
    zero = constant_(graph, "token_zero", np.uint8(_TOKEN_ZERO))
    absolute = ir.node("Abs", [layer.x], name=f"{layer.name}.abs")
    axis = constant_(graph, "token_axis", np.array([-1]))
    largest = ir.node("ReduceMax", [absolute.outputs[0], axis], {"keepdims": 1}, name=f"{layer.name}.largest")
    step = constant_(graph, "token_step", np.float32(1 / _TOKEN_LARGEST))
    scale = ir.node("Mul", [largest.outputs[0], step], name=f"{layer.name}.token_scale")
    smallest = constant_(graph, "token_smallest", np.float32(_SMALLEST_SCALE))
    safe = ir.node("Max", [scale.outputs[0], smallest], name=f"{layer.name}.safe_scale")
    ratio = ir.node("Div", [layer.x, safe.outputs[0]], name=f"{layer.name}.ratio")
    one = constant_(graph, "token_one", np.float32(1))
    codes = ir.node("QuantizeLinear", [ratio.outputs[0], one, zero], name=f"{layer.name}.quantize")
    return [absolute, largest, scale, safe, ratio, codes], (codes.outputs[0], safe.outputs[0], zero)


def _scale_input_(graph: ir.Graph, layer: Layer, codes: Codes) -> None:
    """Multiply what a layer reads by its codes' input factor, if they have one."""
    if codes().input_factor is None:
        return
    columns = codes().codes.shape[1]
    factor = add_tensor_(
        graph, f"{layer.name}.factor", (columns,), ir.DataType.FLOAT, lambda: np.asarray(codes().input_factor)
    )
    product = ir.node("Mul", [layer.x, factor], name=f"{layer.name}.scale_input")
    graph.insert_before(layer.node, product)
    layer.x = product.outputs[0]


def _matmul_nbits_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    rows, columns = codes().codes.shape
    scheme = codes().scheme
    assert scheme.group_size is not None
    groups = columns // scheme.group_size
    shape = (rows, groups, scheme.group_size * scheme.bits // 8)
    weight = add_tensor_(
        graph,
        f"{layer.name}.codes",
        shape,
        ir.DataType.UINT8,
        lambda: pack_codes(codes().codes, scheme.bits).reshape(shape),
    )
    scale = add_tensor_(
        graph, f"{layer.name}.scale", (rows * groups,), ir.DataType.FLOAT, lambda: codes().scale.reshape(-1)
    )
    inputs = [layer.x, weight, scale]
    if codes().zero is not None:
        packed = (rows * -(-groups * scheme.bits // 8),)
        read = functools.partial(_packed_zero, codes)
        inputs.append(add_tensor_(graph, f"{layer.name}.zero", packed, ir.DataType.UINT8, read))
    attributes = {
        "K": columns,
        "N": rows,
        "bits": scheme.bits,
        "block_size": scheme.group_size,
        "accuracy_level": _NBITS_INT8_COMPUTE,
    }
    product = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def _packed_zero(codes: Codes) -> NDArray[np.uint8]:
    zero = codes().zero
    assert zero is not None
    return pack_codes(zero, codes().scheme.bits).reshape(-1)


# How codes of each encoding that a target may name are written. Weights that stay float have no codes.
WRITERS: dict[str, Callable[[ir.Graph, Layer, Codes, QuantizedInputs], None]] = {
    "matmul_integer": _matmul_integer_,
    "matmul_integer_token": _matmul_integer_token_,
    "qdq_uint8": static_writer("qdq_uint8"),
    "qdq_int8": static_writer("qdq_int8"),
    "qdq_fp8": static_writer("qdq_fp8"),
    "dq_int8": write_int8_,
    "dq_int4": write_int4_,
    "dq_nvfp4": write_nvfp4_,
    "matmul_nbits": _matmul_nbits_,
    "matmul_bnb4": bnb.write_nf4_,
    "llm_int8": bnb.write_llm_int8_,
}
