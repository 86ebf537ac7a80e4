"""The two forms of bitsandbytes, as graphs that onnxruntime reads and that torch runs with bitsandbytes itself.

matmul_bnb4   onnxruntime's product of NF4 codes (QLoRA; Dettmers et al. 2023), two in a byte, the first in the upper
              half; scale [out * groups]
llm_int8      LLM.int8() (Dettmers et al. 2022, section 3.2): columns in which any input reaches 6 are multiplied as
              floats, the others as codes with one scale a token; codes [in, out] int8 and scale [out]. An operator of
              ours, which the graph says in ONNX's own operators
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from defaker_opt.graph.layers import Layer, replace_layer_
from defaker_opt.graph.tensors import Codes, QuantizedInputs, add_tensor_, codes_and_scale
from defaker_opt.runtime.torch_graph.bitsandbytes import LLM_INT8, NF4_PRODUCT, THRESHOLD

DOMAIN = "defaker_opt"

# A token of zeros gets this scale instead of 0, and stays zero.
_SMALLEST_SCALE = 1e-30

_NF4_TYPE = 1  # of the operator's attribute quant_type


def write_nf4_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    """Writes layers with blocks of NF4 codes."""
    rows, columns = codes().codes.shape
    size = codes().scheme.group_size
    assert size is not None
    weight = add_tensor_(
        graph, f"{layer.name}.codes", (rows * columns // 2,), ir.DataType.UINT8, lambda: pack_nf4(codes().codes)
    )
    scale = add_tensor_(
        graph, f"{layer.name}.scale", (rows * columns // size,), ir.DataType.FLOAT, lambda: codes().scale.reshape(-1)
    )
    attributes = {"K": columns, "N": rows, "block_size": size, "quant_type": _NF4_TYPE}
    product = ir.node(NF4_PRODUCT, [layer.x, weight, scale], attributes, domain="com.microsoft", name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def pack_nf4(codes: np.ndarray) -> np.ndarray:
    """Places in NF4 [out, in], of an even number of columns → bytes [out * in / 2]."""
    pairs = codes.reshape(-1, 2).astype(np.uint8)
    packed: np.ndarray = (pairs[:, 0] << 4) | pairs[:, 1]
    return packed


def unpack_nf4(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nf4`, without its shape: int8 [out * in]."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1).astype(np.int8)


def write_llm_int8_(graph: ir.Graph, layer: Layer, codes: Codes, quantized: QuantizedInputs) -> None:
    """Writes layers whose columns with large inputs stay float; the graph must also get `llm_int8_function`."""
    weight, scale = codes_and_scale(graph, layer, codes)
    product = ir.node(LLM_INT8, [layer.x, weight, scale], domain=DOMAIN, name=layer.name)
    replace_layer_(graph, layer, [product], product.outputs[0])


def llm_int8_function(opset: int) -> ir.Function:
    """What the operator means: x [..., in], codes [in, out] int8, scale [out] → [..., out]. opset: of the model.

    As in bitsandbytes, a token's scale is that of its inputs below the threshold, in whichever column they are.
    """
    x, codes, scale = (ir.Value(name=name) for name in ("x", "codes", "scale"))
    nodes: list[ir.Node] = []

    def call(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(operator, list(inputs), attributes, name=f"{operator}_{len(nodes)}"))
        return nodes[-1].outputs[0]

    def constant(value: Any) -> ir.Value:
        return call("Constant", value=ir.Tensor(np.asarray(value)))

    zero, threshold = constant(np.float32(0)), constant(np.float32(THRESHOLD))
    size = call("Abs", x)
    outlier = call("GreaterOrEqual", size, threshold)
    columns = call("ReduceMax", call("Flatten", size, axis=-1), constant(np.array([0])), keepdims=0)
    apart = call("GreaterOrEqual", columns, threshold)

    largest = call("ReduceMax", call("Where", outlier, zero, size), constant(np.array([-1])), keepdims=1)
    step = call("Max", call("Mul", largest, constant(np.float32(1 / 127))), constant(np.float32(_SMALLEST_SCALE)))
    ratio = call("Div", call("Where", apart, zero, x), step)
    middle = constant(np.uint8(128))
    given = call("QuantizeLinear", ratio, constant(np.float32(1)), middle)
    product = call("Cast", call("MatMulInteger", given, codes, middle), to=int(ir.DataType.FLOAT))
    coded = call("Mul", call("Mul", product, scale), step)

    weight = call("DequantizeLinear", codes, scale, axis=1)
    whole = call("MatMul", call("Where", apart, x, zero), weight)
    result = call("Add", coded, whole)
    result.name = "y"
    body = ir.Graph([x, codes, scale], [result], nodes=nodes, opset_imports={"": opset}, name=LLM_INT8)
    return ir.Function(DOMAIN, LLM_INT8, graph=body, attributes={})
