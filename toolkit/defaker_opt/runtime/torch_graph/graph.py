"""A stage as a list of nodes in the order they run, with its constants."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from defaker_opt.errors import BuildError

Attributes = Mapping[str, Any]

# ONNX's names of types that arrays of numpy have no name for.
_FP8 = TensorProto.FLOAT8E4M3FN
_INT4, _FP4 = TensorProto.INT4, TensorProto.FLOAT4E2M1

DTYPES = MappingProxyType(
    {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.INT64: torch.int64,
        TensorProto.INT32: torch.int32,
        TensorProto.INT8: torch.int8,
        TensorProto.UINT8: torch.uint8,
        TensorProto.BOOL: torch.bool,
        _FP8: torch.float8_e4m3fn,
    }
)


@dataclass(frozen=True)
class Node:
    """One call. inputs: names of values, "" where an optional one is left out; every operator here has one output."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """inputs and outputs: names, in the file's order. constants: tensors on the CPU."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that each value comes from."""
        return {node.output: node for node in self.nodes}

    @cached_property
    def uses(self) -> Mapping[str, int]:
        """How often each value is read; being an output of the graph counts once."""
        counts: dict[str, int] = defaultdict(int)
        for name in (*self.outputs, *(name for node in self.nodes for name in node.inputs)):
            counts[name] += 1
        return counts

    def producer(self, name: str, operator: str) -> Node | None:
        """The node of that operator that a value comes from, if it does and if nothing else reads the value."""
        node = self.producers.get(name)
        return node if node is not None and node.operator == operator and self.uses[name] == 1 else None


@dataclass(frozen=True)
class Rewrite:
    """What stands in a node's place, with the constants it adds."""

    node: Node
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)


def rewritten(graph: Graph, match: Callable[[Graph, Node], Rewrite | None]) -> Graph:
    """Every node in whose place `match` puts another gets it; what is no longer read vanishes."""
    found = {node.output: rewrite for node in graph.nodes if (rewrite := match(graph, node)) is not None}
    nodes = tuple(found[node.output].node if node.output in found else node for node in graph.nodes)
    added = {name: tensor for rewrite in found.values() for name, tensor in rewrite.constants.items()}
    return _pruned(dataclasses.replace(graph, nodes=nodes, constants={**graph.constants, **added}))


def _pruned(graph: Graph) -> Graph:
    needed, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    constants = {name: tensor for name, tensor in graph.constants.items() if name in needed}
    return dataclasses.replace(graph, nodes=tuple(reversed(kept)), constants=constants)


def read_graph(file: Path) -> Graph:
    """Read a stage's ONNX file with its weights. Raises BuildError if it cannot be read."""
    try:
        model = onnx.load(str(file), load_external_data=False)
        constants = {tensor.name: _read_tensor(tensor, file.parent) for tensor in model.graph.initializer}
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise BuildError(f"{file}: onnx {onnx.__version__} cannot read it ({error})") from error
    nodes = tuple(_node(file, node) for node in model.graph.node)
    inputs = tuple(value.name for value in model.graph.input)
    return Graph(nodes, constants, inputs, tuple(value.name for value in model.graph.output))


def _node(file: Path, node: onnx.NodeProto) -> Node:
    outputs = [name for name in node.output if name]
    if len(outputs) != 1:
        raise BuildError(f"{file}: {node.name}: {node.op_type} with {len(outputs)} outputs; this backend runs one")
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return Node(node.op_type, node.name, tuple(node.input), outputs[0], attributes)


def _read_tensor(tensor: onnx.TensorProto, folder: Path) -> torch.Tensor:
    """One tensor; its bytes leave the model again, so that weights are in memory once."""
    if tensor.data_location == TensorProto.EXTERNAL:
        load_external_data_for_tensor(tensor, str(folder))
    array = numpy_helper.to_array(tensor)
    kind = tensor.data_type
    tensor.ClearField("raw_data")
    return _as_torch(array, kind)


def _as_torch(array: NDArray[Any], kind: int) -> torch.Tensor:
    if kind == _FP4:
        # Torch computes with no FP4, but its numbers are among those of FP8.
        array, kind = array.astype(ml_dtypes.float8_e4m3fn), _FP8
    if kind == _FP8:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.astype(np.int8) if kind == _INT4 else array.copy())
