"""Patterns of linear layers, as `graph/qdq.py` and the exporter write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from defaker_opt.runtime.torch_graph.bitsandbytes import LLM_INT8, NF4_PRODUCT, OUTLIER_LINEAR
from defaker_opt.runtime.torch_graph.graph import Graph, Node, Rewrite
from defaker_opt.runtime.torch_graph.products import pack_fp4, pack_int4

_CODES = (torch.int8, torch.float8_e4m3fn)

_LARGEST_INT8 = 127

# Operators of ours that take a bias as their last input.
_TAKE_BIAS = ("QuantizedLinear", "BlockLinear", "Fp4Linear", "Nf4Linear", OUTLIER_LINEAR, "Linear")

Match = Callable[[Graph, Node], Rewrite | None]


def quantized_linear(graph: Graph, node: Node) -> Rewrite | None:
    """MatMul of decoded activations and decoded weights → one product of codes."""
    if node.operator != "MatMul":
        return None
    # What is decoded may be read by several layers, so uses do not matter.
    given, weight = (graph.producers.get(name) for name in node.inputs)
    if not (_decodes(given) and _decodes(weight)):
        return None
    assert given is not None and weight is not None
    codes, step = graph.constants.get(weight.inputs[0]), graph.constants.get(given.inputs[1])
    zero = graph.constants.get(given.inputs[2]) if len(given.inputs) > 2 else None
    scale = graph.constants.get(weight.inputs[1])
    if codes is None or step is None or zero is None or scale is None or "block_size" in weight.attributes:
        return None
    if codes.dtype not in _CODES or zero.dtype != codes.dtype or bool(zero.float().any()) or codes.ndim != 2:
        return None
    return _replacement("QuantizedLinear", node, (given.inputs[0],), (codes.t().contiguous(), (step * scale).float()))


def _decodes(node: Node | None) -> bool:
    return node is not None and node.operator == "DequantizeLinear"


def _replacement(operator: str, node: Node, given: tuple[str, ...], stored: tuple[Tensor, ...]) -> Rewrite:
    """A linear layer in float32; `settle_type` may narrow it."""
    names = tuple(f"{node.name}.lowered_{place}" for place in range(len(stored)))
    layer = Node(operator, node.name, (*given, *names), node.output, {"compute": torch.float32})
    return Rewrite(layer, dict(zip(names, stored)))


def block_linear(graph: Graph, node: Node) -> Rewrite | None:
    """Cast(MatMul(Cast(x), decoded blocks of 4 bits)) → one product with weights of 4 bits."""
    product, x = _narrow_product(graph, node)
    weight = graph.producers.get(product.inputs[1]) if product is not None else None
    if product is None or not _decodes(weight):
        return None
    assert weight is not None
    codes, scale = (graph.constants.get(name) for name in weight.inputs[:2])
    if codes is None or scale is None or len(weight.inputs) > 2 or weight.attributes.get("axis") != 0:
        return None
    if not weight.attributes.get("block_size") or scale.dtype != torch.float16 or len(codes) % 2:
        return None
    named = dataclasses.replace(node, name=product.name)
    return _replacement("BlockLinear", named, (x,), (pack_int4(codes), scale))


def _narrow_product(graph: Graph, node: Node) -> tuple[Node | None, str]:
    """The MatMul that a Cast widens and what it multiplies, before a Cast narrows that."""
    product = graph.producer(node.inputs[0], "MatMul") if node.operator == "Cast" else None
    narrow = graph.producers.get(product.inputs[0]) if product is not None else None
    return (product, narrow.inputs[0]) if narrow is not None and narrow.operator == "Cast" else (None, "")


def fp4_linear(graph: Graph, node: Node) -> Rewrite | None:
    """Cast(MatMul(Cast(x), Cast(blocks of FP4 decoded by decoded scales))) → one product with weights of 4 bits."""
    product, x = _narrow_product(graph, node)
    narrowed = graph.producers.get(product.inputs[1]) if product is not None else None
    if product is None or narrowed is None or narrowed.operator != "Cast":
        return None
    weight = graph.producers.get(narrowed.inputs[0])
    scale = graph.producers.get(weight.inputs[1]) if _decodes(weight) and weight is not None else None
    if weight is None or scale is None or not _decodes(scale):
        return None
    stored = (graph.constants.get(name) for name in (weight.inputs[0], *scale.inputs[:2]))
    codes, steps, whole = stored
    if codes is None or steps is None or whole is None or whole.ndim or weight.attributes.get("axis") != 0:
        return None
    if steps.dtype != torch.float8_e4m3fn or len(codes) != weight.attributes["block_size"] * len(steps):
        return None
    named = dataclasses.replace(node, name=product.name)
    return _replacement("Fp4Linear", named, (x,), (pack_fp4(codes), steps.view(torch.uint8), whole))


def nf4_linear(graph: Graph, node: Node) -> Rewrite | None:
    """onnxruntime's product of NF4 codes → bitsandbytes' one."""
    if node.operator != NF4_PRODUCT:
        return None
    x, packed, scale = node.inputs
    rows, block = node.attributes["N"], node.attributes["block_size"]
    stored = (graph.constants[packed].reshape(rows, -1), graph.constants[scale].reshape(rows, -1))
    rewrite = _replacement("Nf4Linear", node, (x,), stored)
    return dataclasses.replace(rewrite, node=_with_attribute(rewrite.node, "block", block))


def outlier_linear(graph: Graph, node: Node) -> Rewrite | None:
    """Our operator for LLM.int8() → bitsandbytes' product."""
    if node.operator != LLM_INT8:
        return None
    x, codes, scale = node.inputs
    stored = (graph.constants[codes].t().contiguous(), graph.constants[scale] * _LARGEST_INT8)
    return _replacement(OUTLIER_LINEAR, node, (x,), stored)


def _with_attribute(node: Node, name: str, value: object) -> Node:
    return dataclasses.replace(node, attributes={**node.attributes, name: value})


def float_linear(graph: Graph, node: Node) -> Rewrite | None:
    """MatMul by a stored matrix → a linear layer."""
    weight = graph.constants.get(node.inputs[1]) if node.operator == "MatMul" else None
    if weight is None or weight.ndim != 2 or weight.dtype != torch.float32 or node.inputs[0] in graph.constants:
        return None
    # `settle_type` copies it, once, into the order and the type that it stays in.
    return _replacement("Linear", node, node.inputs[:1], (weight.t(),))


def bias(graph: Graph, node: Node) -> Rewrite | None:
    """Add of a stored vector after a linear layer → the layer's bias."""
    if node.operator != "Add":
        return None
    for side, other in (node.inputs, reversed(node.inputs)):
        vector = graph.constants.get(other)
        layer = next((found for name in _TAKE_BIAS if (found := graph.producer(side, name))), None)
        if layer is None or vector is None or vector.ndim != 1 or len(layer.inputs) != _WITHOUT_BIAS[layer.operator]:
            continue
        name = f"{layer.name}.lowered_bias"
        fused = dataclasses.replace(layer, inputs=(*layer.inputs, name), output=node.output)
        return Rewrite(fused, {name: vector})
    return None


def settle_type(compute: torch.dtype) -> Match:
    """A linear layer → the same in `compute`, but for one whose result is told or ranked: that stays float32.

    Comes after `bias`, as before it such a layer is not yet what an output comes from.
    """

    def match(graph: Graph, node: Node) -> Rewrite | None:
        if node.operator not in _TAKE_BIAS:
            return None
        kind = torch.float32 if _read_by(graph, node.output) <= _TOLD else compute
        typed = node.inputs[1 if node.operator == "Linear" else _WITHOUT_BIAS[node.operator] :]
        stored = {name: graph.constants[name].to(kind).contiguous() for name in typed}
        return Rewrite(_with_attribute(node, "compute", kind), stored)

    return match


# Operators that hand numbers on, and the ends of such ways where rounding is seen: outputs, and which is largest.
_PASS_ON = ("Concat", "Gather", "GatherND", "Reshape", "Sigmoid", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_TOLD = {"output", "ArgMax"}


def _read_by(graph: Graph, name: str) -> set[str]:
    """The operators that compute with a value, and "output" if it leaves the stage."""
    found = {"output"} if name in graph.outputs else set()
    for reader in (node for node in graph.nodes if name in node.inputs):
        found |= _read_by(graph, reader.output) if reader.operator in _PASS_ON else {reader.operator}
    return found


_WITHOUT_BIAS = {"QuantizedLinear": 3, "BlockLinear": 3, "Fp4Linear": 4, "Nf4Linear": 3, OUTLIER_LINEAR: 3, "Linear": 2}
