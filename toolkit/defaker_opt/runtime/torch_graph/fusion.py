"""Patterns of attention, norms and activations, as the exporter spells them."""

from __future__ import annotations

from typing import Any

import torch

from defaker_opt.runtime.torch_graph.graph import DTYPES, Graph, Node, Rewrite
from defaker_opt.runtime.torch_graph.linear import Match

_CODES = (torch.int8, torch.float8_e4m3fn)


def attention(compute: torch.dtype) -> Match:
    """MatMul → Mul → (Add of a mask) → Softmax → MatMul, with or without narrow products → attention.

    Where the graph says float16 it is float16, else `compute`.
    """

    def match(graph: Graph, node: Node) -> Rewrite | None:
        last, kind = _product(graph, node)
        if last is None:
            return None
        softmax = graph.producer(_through_cast(graph, last.inputs[0]), "Softmax")
        if softmax is None or softmax.attributes.get("axis", -1) != -1:
            return None
        mask, scaled = "", softmax.inputs[0]
        if (masked := graph.producer(scaled, "Add")) is not None:
            scaled, mask = masked.inputs
        scaling = graph.producer(scaled, "Mul")
        scale = graph.constants.get(scaling.inputs[1]) if scaling is not None else None
        if scaling is None or scale is None or scale.ndim:
            return None
        inner = graph.producers.get(scaling.inputs[0])
        first, _ = _product(graph, inner) if inner is not None and graph.uses[inner.output] == 1 else (None, None)
        if first is None:
            return None
        query, key = (_through_cast(graph, name) for name in first.inputs)
        value = _through_cast(graph, last.inputs[1])
        attributes = {"scale": float(scale), "type": kind or compute, "mask": "given"}
        return Rewrite(Node("Attention", last.name, (query, key, value, mask), node.output, attributes))

    return match


def _product(graph: Graph, node: Node) -> tuple[Node | None, torch.dtype | None]:
    """The MatMul that a node is, or is the widening of, and the narrow type it is made in."""
    if node.operator == "MatMul":
        return node, None
    inner = graph.producer(node.inputs[0], "MatMul") if node.operator == "Cast" else None
    if inner is None or node.attributes["to"] != _FLOAT:
        return None, None
    narrow = graph.producer(inner.inputs[0], "Cast")
    return (inner, DTYPES[narrow.attributes["to"]]) if narrow is not None else (None, None)


_FLOAT = next(number for number, kind in DTYPES.items() if kind == torch.float32)


def _through_cast(graph: Graph, name: str) -> str:
    """What a value was before it was narrowed, if it was."""
    cast = graph.producer(name, "Cast")
    return cast.inputs[0] if cast is not None and DTYPES[cast.attributes["to"]] == torch.float16 else name


def rms_norm(graph: Graph, node: Node) -> Rewrite | None:
    """Pow → ReduceMean → Add → Sqrt → Reciprocal → Mul → Mul → one norm."""
    if node.operator != "Mul" or node.inputs[0] not in graph.constants:
        return None
    weight, scaled = node.inputs
    scaling = graph.producer(scaled, "Mul")
    if scaling is None or graph.constants[weight].ndim != 1:
        return None
    at: Node | None = graph.producer(scaling.inputs[1], "Reciprocal")
    for operator in ("Sqrt", "Add", "ReduceMean", "Pow"):
        if at is None:
            return None
        if at.operator == "Add":
            epsilon = graph.constants.get(at.inputs[1])
        if at.operator == "ReduceMean" and graph.constants[at.inputs[1]].tolist() != [-1]:
            return None
        at = graph.producer(at.inputs[0], operator)
    if at is None or at.inputs[0] != scaling.inputs[0] or epsilon is None:
        return None
    power = graph.constants.get(at.inputs[1])
    if power is None or float(power) != 2:
        return None
    return Rewrite(Node("RmsNorm", node.name, (at.inputs[0], weight), node.output, {"epsilon": float(epsilon)}))


def norm_quantize(graph: Graph, node: Node) -> Rewrite | None:
    """QuantizeLinear of a norm over the last axis, which nothing else reads."""
    step, kind = _quantization(graph, node)
    if kind is None:
        return None
    layer, rms = (graph.producer(node.inputs[0], name) for name in ("LayerNormalization", "RmsNorm"))
    norm = layer or rms
    if norm is None or norm.attributes.get("axis", -1) != -1:
        return None
    attributes = {"epsilon": norm.attributes["epsilon"], "centred": layer is not None, "codes": kind}
    x, weight, *bias = norm.inputs
    return Rewrite(Node("NormQuantize", norm.name, (x, weight, step, *bias), node.output, attributes))


def gelu_quantize(graph: Graph, node: Node) -> Rewrite | None:
    """QuantizeLinear of the exact GELU of a product of codes."""
    step, kind = _quantization(graph, node)
    gelu = graph.producer(node.inputs[0], "Gelu") if kind is not None else None
    if gelu is None or gelu.attributes.get("approximate", b"none") != b"none":
        return None
    layer = graph.producer(gelu.inputs[0], "QuantizedLinear")
    if layer is None:
        return None
    attributes = {"codes": kind, "compute": layer.attributes["compute"]}
    codes, weight, scale, *bias = layer.inputs
    inputs = (codes, weight, scale, step, *bias)
    return Rewrite(Node("LinearGeluQuantize", layer.name, inputs, node.output, attributes))


def gate_quantize(graph: Graph, node: Node) -> Rewrite | None:
    """QuantizeLinear of gate · Sigmoid(gate) · up."""
    step, kind = _quantization(graph, node)
    product = graph.producer(node.inputs[0], "Mul") if kind is not None else None
    silu = graph.producer(product.inputs[0], "Mul") if product is not None else None
    sigmoid = graph.producer(silu.inputs[1], "Sigmoid") if silu is not None else None
    if product is None or silu is None or sigmoid is None or sigmoid.inputs[0] != silu.inputs[0]:
        return None
    inputs = (silu.inputs[0], product.inputs[1], step)
    return Rewrite(Node("GateQuantize", product.name, inputs, node.output, {"codes": kind}))


def _quantization(graph: Graph, node: Node) -> tuple[str, Any]:
    """The scale's name and the type of codes of a QuantizeLinear around zero with one scale; else None for a type."""
    if node.operator != "QuantizeLinear" or len(node.inputs) < len(("x", "scale", "zero")):
        return "", None
    step, zero = (graph.constants.get(name) for name in node.inputs[1:3])
    fits = step is not None and step.ndim == 0 and zero is not None and zero.dtype in _CODES
    return (node.inputs[1], zero.dtype) if fits and zero is not None and not bool(zero.float().any()) else ("", None)
