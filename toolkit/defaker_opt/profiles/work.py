"""Operations and bytes of one call of a stage, counted from its graph with the sizes of that call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import shape_inference

Shape = tuple[int, ...]

# Products of few-bit weights in blocks, and the number format that runs them: NF4 is widened first.
_BLOCKED = {"MatMulNBits": "int4", "MatMulBnb4": "fp32"}
_FORMATS = {"MatMulInteger": "int8", **_BLOCKED}
_WIDENED = ".widened.codes"
_HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1)


@dataclass(frozen=True)
class Work:
    """operations: multiplications and additions of products by number format, twice their number of pairs.

    attention: the part of operations whose both sides are activations. weight_bytes: by format, as stored, each read
    once. activation_bytes: of inputs and outputs, which must pass memory even if all between stays in cache.
    traffic_bytes: of every tensor that any operator reads or writes, were nothing fused or cached.
    """

    operations: Mapping[str, float] = field(default_factory=dict)
    attention: float = 0.0
    weight_bytes: Mapping[str, float] = field(default_factory=dict)
    activation_bytes: float = 0.0
    traffic_bytes: float = 0.0

    @property
    def total(self) -> float:
        """Operations of all formats."""
        return sum(self.operations.values())

    @property
    def least_bytes(self) -> float:
        """What must pass memory at least."""
        return sum(self.weight_bytes.values()) + self.activation_bytes


def add_work(parts: Iterable[Work]) -> Work:
    """The sum of several calls."""
    operations: dict[str, float] = {}
    weights: dict[str, float] = {}
    attention = activations = traffic = 0.0
    for part in parts:
        for total, given in ((operations, part.operations), (weights, part.weight_bytes)):
            for name, value in given.items():
                total[name] = total.get(name, 0.0) + value
        attention += part.attention
        activations += part.activation_bytes
        traffic += part.traffic_bytes
    return Work(operations, attention, weights, activations, traffic)


def count_work(model: onnx.ModelProto, inputs: Mapping[str, Shape], outputs: Sequence[str]) -> Work:
    """Count what computing `outputs` takes; `inputs` are the sizes of the graph's inputs. Weights may be absent.

    Whatever else the graph takes in is a weight, too.

    A tensor whose size depends on values (none of those that products read) counts as empty.
    """
    graph = _sized(model, inputs)
    sizes = _sizes(graph)
    initial = {each.name: each.data_type for each in graph.initializer}
    for value in graph.input:
        if value.name not in inputs and not value.name.endswith(_WIDENED):
            initial[value.name] = value.type.tensor_type.elem_type
    operations: dict[str, float] = {}
    weights: dict[str, float] = {}
    attention = traffic = 0.0
    seen: set[str] = set()
    decoded: set[str] = set()
    for node in graph.node:
        if node.input and (
            (node.op_type == "DequantizeLinear" and node.input[0] in initial)
            or (node.op_type == "Cast" and node.input[0] in decoded)
        ):
            decoded.add(node.output[0])
    for node in _needed(graph, outputs):
        traffic += sum(sizes[name][1] for name in (*node.input, *node.output) if name in sizes)
        count = _operations(node, sizes)
        if count:
            kind = _FORMATS.get(node.doc_string or node.op_type, "fp32")
            operations[kind] = operations.get(kind, 0.0) + count
            weighted = any(name in initial or name in decoded or name.endswith(".codes") for name in node.input[:2])
            attention += 0 if weighted else count
        for name in node.input:
            if name in initial and name not in seen:
                seen.add(name)
                kind = "fp32" if initial[name] == onnx.TensorProto.FLOAT else _weight_format(node, initial[name])
                weights[kind] = weights.get(kind, 0.0) + sizes[name][1]
    activations = sum(sizes[name][1] for name in (*inputs, *outputs) if name in sizes)
    return Work(operations, attention, weights, activations, traffic)


def count_file(path: Path, inputs: Mapping[str, Shape], outputs: Sequence[str]) -> Work:
    """Count a written stage; its weights are not read."""
    return count_work(onnx.load(str(path), load_external_data=False), inputs, outputs)


def _weight_format(node: onnx.NodeProto, kind: int) -> str:
    return "int4" if node.doc_string in _BLOCKED or kind in _HALF_BYTES else "int8"


def _sized(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> onnx.GraphProto:
    """A copy of the graph with every size known, as far as the inputs' sizes decide it."""
    # An operator of ours is counted as what it means.
    copy = onnx.inliner.inline_local_functions(model)
    assert not copy.functions, "functions of another opset than their model's stay as they are"
    for value in copy.graph.input:
        for size, known in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ())):
            size.Clear()
            size.dim_value = known
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    _widen_blocked_products_(copy.graph)
    return shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph


def _widen_blocked_products_(graph: onnx.GraphProto) -> None:
    """Shape inference knows none; here each becomes a MatMul that remembers what it was in its `doc_string`."""
    for node in graph.node:
        if node.op_type not in _BLOCKED:
            continue
        attributes = {each.name: each.i for each in node.attribute}
        name = f"{node.input[1]}{_WIDENED}"
        dims = [attributes["K"], attributes["N"]]
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
        codes, scales = node.input[1], node.input[2]
        node.op_type, node.domain, node.doc_string = "MatMul", "", node.op_type
        del node.attribute[:]
        del node.input[1:]
        node.input.append(name)
        # Reads of the codes themselves, which is what the weight costs.
        reader = graph.node.add()
        reader.CopyFrom(onnx.helper.make_node("Identity", [codes], [f"{codes}.read"], doc_string=node.doc_string))
        reader = graph.node.add()
        reader.CopyFrom(onnx.helper.make_node("Identity", [scales], [f"{scales}.read"]))


def _sizes(graph: onnx.GraphProto) -> dict[str, tuple[Shape, float]]:
    """Shape and bytes of every tensor whose size is known."""
    sizes = {each.name: _with_bytes(tuple(each.dims), each.data_type) for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        if kind.HasField("shape") and None not in dims and value.name not in sizes:
            sizes[value.name] = _with_bytes(tuple(size for size in dims if size is not None), kind.elem_type)
    return sizes


def _with_bytes(shape: Shape, kind: int) -> tuple[Shape, float]:
    width = 0.5 if kind in _HALF_BYTES else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
    return shape, float(math.prod(shape) * width)


def _needed(graph: onnx.GraphProto, outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that compute `outputs`, as a runtime that skips what nobody reads runs them."""
    wanted = set(outputs)
    needed = []
    readers = {
        name: node for node in graph.node if node.op_type == "Identity" for name in node.output if ".read" in name
    }
    for node in reversed(graph.node):
        blocked = node.output[0] in readers
        if not blocked and wanted & set(node.output):
            needed.append(node)
            wanted.update(node.input)
            if node.doc_string in _BLOCKED:
                codes = node.input[1].removesuffix(_WIDENED)
                scale = f"{codes.removesuffix('.codes')}.scale"
                needed += [readers[f"{name}.read"] for name in (codes, scale) if f"{name}.read" in readers]
    return needed


def _operations(node: onnx.NodeProto, sizes: Mapping[str, tuple[Shape, float]]) -> float:
    """2 x multiplications of a product; 0 for everything else."""
    kind = node.op_type
    if kind not in ("MatMul", "MatMulInteger", "Gemm", "Conv", "ConvTranspose"):
        return 0.0
    left, right, out = (sizes.get(name, ((), 0.0))[0] for name in (node.input[0], node.input[1], node.output[0]))
    if not left or not right or not out:
        return 0.0
    if kind == "Conv":  # each output cell: the channels of its group times the kernel
        return 2.0 * math.prod(out) * math.prod(right[1:])
    if kind == "ConvTranspose":  # each input cell is spread over the kernel of each output channel of its group
        return 2.0 * math.prod(left) * math.prod(right[1:])
    inner = left[-1]
    if kind == "Gemm":
        attributes: dict[str, Any] = {each.name: each.i for each in node.attribute}
        inner = left[0] if attributes.get("transA") else left[1]
    return 2.0 * math.prod(out) * inner
