"""The same stage without codes: weights decoded, activations as they come, products in float16 or float32.

float32 also widens attention's own products. What a stage becomes where its codes are refused, wrong or slower; weights
are those that the codes stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray

from defaker_opt.graph.layers import replace_node_
from defaker_opt.graph.tensors import lazy, reader_of

Wide = Literal["float16", "float32"]

_DECODE = "DequantizeLinear"


def relax_graph(graph: Path, folder: Path, wide: Wide) -> Path:
    """Write a stage's graph anew into a folder, without codes; the new file."""
    model = ir.load(graph)
    inner = model.graph
    for node in [node for node in inner if node.op_type == "MatMul"]:
        decoder = _decoder(node.inputs[1])
        if decoder is not None:
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


def _decoder(weight: ir.Value | None) -> ir.Node | None:
    """The node that decodes a product's weight, if one does; it may be narrowed after."""
    node = weight.producer() if weight is not None else None
    if node is not None and (node.name or "").endswith(".narrow_weight"):
        return _decoder(node.inputs[0])
    return node if node is not None and node.op_type == _DECODE else None


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
    codes = decoder.inputs[0]
    assert codes is not None and codes.name and codes.shape is not None
    name = f"{codes.name.removesuffix('.codes')}.decoded"
    if name not in graph.initializers:
        kind = ir.DataType.FLOAT16 if wide == "float16" else ir.DataType.FLOAT
        read = reader_of(decoder.outputs[0])
        assert read is not None, f"{name}: computed, and no codes"
        tensor = lazy(name, tuple(codes.shape.numpy()), kind, functools.partial(_narrowed, read, kind))
        value = ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(kind), const_value=tensor)
        graph.initializers.add(value)
    return graph.initializers[name]


def _narrowed(read: Callable[[], NDArray[Any]], kind: ir.DataType) -> NDArray[Any]:
    numbers: NDArray[Any] = read().astype(kind.numpy())
    return numbers


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
