"""One linear layer as a graph of its own, written as it would be inside a stage; for timing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from defaker_opt.graph.codes import WRITERS, declare_domains_
from defaker_opt.graph.layers import layers_of
from defaker_opt.methods import Array, QuantizedWeight
from defaker_opt.runtime.spec import StageSpec, TensorSpec

_WEIGHT = "product.weight"
_OPSET = 20


def write_product(path: Path, weight: Array, codes: QuantizedWeight | None, encodings: Mapping[str, str]) -> StageSpec:
    """Write x [rows, in] → y [rows, out] of a weight [out, in] to `path`; its contract.

    codes: those of the weight, None for a float product. encodings: of the target, by kind of code.
    """
    rows, columns = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["rows", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = ir.Value(
        name=_WEIGHT,
        shape=ir.Shape([rows, columns]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(np.ascontiguousarray(weight), name=_WEIGHT),
    )
    transpose = ir.node("Transpose", [stored], {"perm": [1, 0]}, name="transpose")
    product = ir.node("MatMul", [x, transpose.outputs[0]], name="product")
    y = product.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["rows", rows]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [y], nodes=[transpose, product], initializers=[stored], opset_imports={"": _OPSET}, name="product"
    )
    if codes is not None:
        chosen = codes
        [layer] = layers_of(graph, _WEIGHT)
        WRITERS[encodings[chosen.scheme.kind]](graph, layer, lambda: chosen, {})
        graph.sort()
    model = ir.Model(graph, ir_version=10)
    declare_domains_(model)
    ir.save(model, path)
    return StageSpec(
        "product",
        (TensorSpec("x", "float32", ("rows", columns)),),
        (TensorSpec("y", "float32", ("rows", rows)),),
    )
