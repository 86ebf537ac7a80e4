"""A graph on a device: rewritten once, specialized for sizes when they are first seen, then run step by step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from defaker_opt.errors import BuildError
from defaker_opt.runtime.torch_graph import bitsandbytes, fused, fusion, linear, products
from defaker_opt.runtime.torch_graph.graph import Graph, Node, rewritten
from defaker_opt.runtime.torch_graph.operators import OPERATORS, Operator

TABLE = MappingProxyType(
    {
        **OPERATORS,
        "Attention": Operator(products.attention),
        "BlockLinear": Operator(products.block_linear),
        "Fp4Linear": Operator(products.fp4_linear),
        "GateQuantize": Operator(fused.gate_quantize),
        "Linear": Operator(products.linear),
        "LinearGeluQuantize": Operator(fused.linear_gelu_quantize),
        "Nf4Linear": Operator(bitsandbytes.nf4_linear),
        "NormQuantize": Operator(fused.norm_quantize),
        bitsandbytes.OUTLIER_LINEAR: Operator(bitsandbytes.outlier_linear),
        "QuantizeLinear": Operator(fused.quantize_codes),
        "QuantizedLinear": Operator(products.quantized_linear),
        "RmsNorm": Operator(fused.rms_norm),
    }
)

# Constants up to so many numbers stay on the host too, where shapes, masks and position tables are computed.
_SMALL = 4096

# Known in a file, and replaced before anything runs.
_WRITTEN = (bitsandbytes.NF4_PRODUCT, bitsandbytes.LLM_INT8)

_MASK = 3  # of attention's inputs


def lower(graph: Graph, compute: torch.dtype) -> Graph:
    """Put larger operators in the place of what they are written as. Raises BuildError for an operator nobody knows.

    compute: the type of what linear layers hand on, and of attention where the graph does not narrow it. Norms, sums,
    softmax and convolutions stay float32, and so do linear layers whose result leaves the stage and is read by nothing
    in it but an ArgMax. Attention's values, which are read in it too, leave the stage rounded to `compute`.
    """
    for node in graph.nodes:
        if node.operator not in TABLE and node.operator not in _WRITTEN:
            raise BuildError(
                f"{node.name}: the backend torch_cuda does not run {node.operator}; it runs "
                f"{', '.join(sorted((*OPERATORS, *_WRITTEN)))}; "
                "make the build for a target with this backend, or run it with the backend that it is made for"
            )
    coded: tuple[linear.Match, ...] = (
        linear.quantized_linear,
        linear.block_linear,
        linear.fp4_linear,
        linear.nf4_linear,
        linear.outlier_linear,
    )
    layers: tuple[linear.Match, ...] = (linear.float_linear, linear.bias, linear.settle_type(compute))
    for match in coded:
        graph = rewritten(graph, match)
    graph = fold(graph)
    for match in (*layers, fusion.attention(compute), fusion.rms_norm):
        graph = rewritten(graph, match)
    for match in (fusion.norm_quantize, fusion.gelu_quantize, fusion.gate_quantize):
        graph = rewritten(graph, match)
    return graph


def fold(graph: Graph) -> Graph:
    """Compute what depends on constants alone."""
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        if all(not name or name in constants for name in node.inputs):
            given = [constants[name] if name else None for name in node.inputs]
            constants[node.output] = TABLE[node.operator].run(node.attributes, *given)
        else:
            nodes.append(node)
    needed = {*graph.outputs, *(name for node in nodes for name in node.inputs)}
    kept = {name: tensor for name, tensor in constants.items() if name in needed}
    return dataclasses.replace(graph, nodes=tuple(nodes), constants=kept)


def count_operators(graph: Graph) -> Counter[str]:
    """How often each operator is there."""
    return Counter(node.operator for node in graph.nodes)


@dataclass(frozen=True)
class Step:
    """One call: arguments are tensors, names of values, or None; `done` are values that nobody reads afterwards."""

    node: Node
    operator: Operator
    arguments: tuple[Tensor | str | None, ...]
    done: tuple[str, ...] = ()

    def run_(self, values: dict[str, Tensor]) -> None:
        """Put the step's output into `values`, and take out what is done with."""
        given = [values[each] if isinstance(each, str) else each for each in self.arguments]
        values[self.node.output] = self.operator.run(self.node.attributes, *given)
        for name in self.done:
            del values[name]


@dataclass(frozen=True)
class Specialized:
    """A program for inputs of certain sizes. known: outputs that depend on sizes alone, on the host."""

    steps: tuple[Step, ...]
    known: Mapping[str, Tensor]
    outputs: tuple[str, ...]

    @property
    def capturable(self) -> bool:
        """Whether sizes within it are those of any picture, as a CUDA graph wants them."""
        return all(step.node.operator != bitsandbytes.OUTLIER_LINEAR for step in self.steps)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name → the wanted outputs that depend on them."""
        values = dict(inputs)
        for step in self.steps:
            step.run_(values)
        return {name: values[name] for name in self.outputs if name not in self.known}


class Program:
    """A lowered graph whose weights lie on a device."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        weights = [name for name, tensor in graph.constants.items() if tensor.numel() > _SMALL]
        self._resident = {name: graph.constants[name].to(device) for name in weights}
        small = {name: tensor for name, tensor in graph.constants.items() if name not in self._resident}
        self.graph = dataclasses.replace(graph, constants=small)

    @cached_property
    def _small(self) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in self.graph.constants.items()}

    def specialize(
        self, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]
    ) -> tuple[Specialized, dict[str, Tensor]]:
        """Run once, op by op: the steps that have to be run for inputs of these sizes, and this run's outputs.

        What depends on sizes alone is computed on the host, here and never again.
        """
        known, values = dict(self.graph.constants), {**self._resident, **inputs}
        nodes = _needed(self.graph, outputs)
        steps = []
        for node, done in zip(nodes, _ends([node.inputs for node in nodes], outputs)):
            operator = TABLE[node.operator]
            if node.operator == "Shape":
                known[node.output] = operator.run(node.attributes, _either(known, values, node.inputs[0]))
            elif all(not name or name in known for name in node.inputs):
                given = [known[name] if name else None for name in node.inputs]
                known[node.output] = operator.run(node.attributes, *given)
            else:
                step = self._step(node, operator, known)
                step.run_(values)
                steps.append(step)
            for name in done:
                values.pop(name, None)
        finished = Specialized(
            _with_ends(steps, outputs), {name: known[name] for name in outputs if name in known}, outputs
        )
        return finished, {name: values[name] for name in outputs if name not in known}

    def _step(self, node: Node, operator: Operator, known: Mapping[str, Tensor]) -> Step:
        if node.operator == "Attention" and (not node.inputs[_MASK] or node.inputs[_MASK] in known):
            attributes, mask = products.settle_mask(node.attributes, known.get(node.inputs[_MASK]))
            node = dataclasses.replace(node, attributes=attributes)
            shown = None if mask is None else mask.to(self._device)
            return Step(node, operator, (*node.inputs[:_MASK], shown))
        return Step(
            node, operator, tuple(self._argument(operator, node, place, known) for place in range(len(node.inputs)))
        )

    def _argument(self, operator: Operator, node: Node, place: int, known: Mapping[str, Tensor]) -> Tensor | str | None:
        name = node.inputs[place]
        if not name:
            return None
        if place in operator.host:
            if name not in known:
                raise BuildError(
                    f"{node.name}: {name} depends on the picture, and {node.operator} needs it before it runs; the "
                    "backend torch_cuda runs graphs whose sizes depend on sizes of inputs alone"
                )
            return known[name]
        if name in self._resident:
            return self._resident[name]
        if name in self.graph.constants:
            return self._small[name]
        return known[name].to(self._device) if name in known else name


def _either(known: Mapping[str, Tensor], values: Mapping[str, Tensor], name: str) -> Tensor:
    return known[name] if name in known else values[name]


def _needed(graph: Graph, outputs: tuple[str, ...]) -> list[Node]:
    """The nodes that some of the outputs depend on."""
    needed, nodes = set(outputs), []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _with_ends(steps: Sequence[Step], outputs: tuple[str, ...]) -> tuple[Step, ...]:
    """Say of each step which values it is the last to read, so that their memory is free for what follows."""
    reads = [[each for each in step.arguments if isinstance(each, str)] for step in steps]
    return tuple(dataclasses.replace(step, done=done) for step, done in zip(steps, _ends(reads, outputs)))


def _ends(reads: Sequence[Sequence[str]], outputs: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Of what is read one after another: which of the names nobody reads again, and which are no outputs."""
    seen, ends = set(outputs), []
    for names in reversed(reads):
        ends.append(tuple(name for name in dict.fromkeys(names) if name not in seen))
        seen.update(names)
    return ends[::-1]
