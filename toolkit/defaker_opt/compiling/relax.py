"""The same stage without codes: weights decoded, activations as they come, products in float16 or float32.

float32 also widens attention's own products. What a stage becomes where its codes are refused, wrong or slower; weights
are those that the codes stand for.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from defaker_opt.graph.layers import replace_node_

Wide = Literal["float16", "float32"]

_DECODE = "DequantizeLinear"


def relax_graph(graph: Path, folder: Path, wide: Wide) -> Path:
    """Write a stage's graph anew into a folder, without codes; the new file."""
    model = ir.load(graph)
    inner = model.graph
    for node in [node for node in inner if node.op_type == "MatMul"]:
        decoder = node.inputs[1].producer() if node.inputs[1] is not None else None
        if decoder is not None and decoder.op_type == _DECODE:
            _relax_product_(inner, node, decoder, wide)
        elif wide == "float32" and _is_narrowed(node):
            _widen_product_(inner, node)
    while dead := [
        node for node in inner if not any(list(value.uses()) for value in node.outputs) and not _is_result(node)
    ]:
        for node in dead:
            inner.remove(node, safe=True)
    for name in [name for name, value in inner.initializers.items() if not list(value.uses())]:
        inner.initializers.pop(name)
    path = folder / graph.name
    ir.save(model, path, external_data=f"{graph.name}.data", size_threshold_bytes=256)
    return path


def _relax_product_(graph: ir.Graph, node: ir.Node, decoder: ir.Node, wide: Wide) -> None:
    weight = _add_weight(graph, decoder, wide)
    given = _before_codes(node.inputs[0])
    nodes = []
    if wide == "float16":
        nodes.append(ir.node("Cast", [given], {"to": int(ir.DataType.FLOAT16)}, name=f"{node.name}.narrow"))
        given = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [given, weight], name=node.name))
    if wide == "float16":
        nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}.widen"))
    _replace_(graph, node, nodes)


def _is_narrowed(node: ir.Node) -> bool:
    return _widened(node) is not node.outputs[0]


def _widen_product_(graph: ir.Graph, node: ir.Node) -> None:
    """A product between casts, without them."""
    casts = [value.producer() for value in node.inputs if value is not None]
    assert all(cast is not None and cast.op_type == "Cast" for cast in casts), node.name
    product = ir.node("MatMul", [cast.inputs[0] for cast in casts if cast is not None], name=node.name)
    _replace_(graph, node, [product])


def _replace_(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of a product, or of the cast that widens it; what nobody reads then goes later."""
    last = _widened(node).producer()
    assert last is not None
    replace_node_(graph, last, nodes, nodes[-1].outputs[0])


def _add_weight(graph: ir.Graph, decoder: ir.Node, wide: Wide) -> ir.Value:
    """The weight [in, out] that codes stand for, decoded when it is written."""
    codes, scale = decoder.inputs[:2]
    assert codes is not None and scale is not None and codes.name and codes.shape is not None
    name = f"{codes.name.removesuffix('.codes')}.decoded"
    if name not in graph.initializers:
        kind = ir.DataType.FLOAT16 if wide == "float16" else ir.DataType.FLOAT
        read = functools.partial(_decoded, codes, scale, kind)
        tensor = ir.LazyTensor(lambda: ir.Tensor(read(), name=name), dtype=kind, shape=ir.Shape(codes.shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(kind), const_value=tensor)
        graph.initializers.add(value)
    return graph.initializers[name]


def _decoded(codes: ir.Value, scale: ir.Value, kind: ir.DataType) -> NDArray[Any]:
    """scale: [out], or [groups, out] of blocks of rows."""
    assert codes.const_value is not None and scale.const_value is not None
    steps = scale.const_value.numpy().astype(np.float32)
    numbers = codes.const_value.numpy().astype(np.float32)
    if steps.ndim == 2:
        steps = np.repeat(steps, len(numbers) // len(steps), axis=0)
    decoded: NDArray[Any] = (numbers * steps).astype(kind.numpy())
    return decoded


def _before_codes(value: ir.Value | None) -> ir.Value:
    """What an activation was before it was rounded or narrowed."""
    assert value is not None
    producer = value.producer()
    while producer is not None and (
        producer.op_type in (_DECODE, "QuantizeLinear") or (producer.name or "").endswith(".narrow")
    ):
        value = producer.inputs[0]
        assert value is not None
        producer = value.producer()
    return value


def _widened(node: ir.Node) -> ir.Value:
    """What the graph goes on with: the product, or the product widened."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if len(readers) == 1 and (readers[0].name or "").endswith(".widen"):
        return readers[0].outputs[0]
    return node.outputs[0]


def _is_result(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def product_kinds(graph: Path) -> tuple[str, ...]:
    """The types of the codes in a written stage, such as "INT8"; none if it has none."""
    codes = [node.inputs[0] for node in ir.load(graph).graph if node.op_type == _DECODE]
    stored = [value.dtype for value in codes if value is not None and value.const_value is not None]
    return tuple(sorted({dtype.name for dtype in stored if dtype is not None}))
