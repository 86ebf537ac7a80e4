"""Stages that several threads call, what a captured graph reads, and when values are let go of; all without a GPU."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from defaker_opt.runtime.backends import tensor_rt
from defaker_opt.runtime.backends.torch_cuda import Stage
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.runtime.torch_graph import products, program
from defaker_opt.runtime.torch_graph.capture import Captured
from defaker_opt.runtime.torch_graph.graph import Graph, Node
from defaker_opt.runtime.torch_graph.operators import OPERATORS, Operator
from defaker_opt.runtime.torch_graph.program import Program

CPU = torch.device("cpu")
SPEC = StageSpec("stage", (TensorSpec("x", "float32", (3,)),), (TensorSpec("y", "float32", (3,)),))
NEGATED = Graph((Node("Neg", "neg", ("x",), "y"),), {}, ("x",), ("y",))


def _all_right(call: Callable[..., Any], threads: int = 4) -> bool:
    """Whether every thread gets its own result."""

    def one(number: int) -> bool:
        result = call({"x": np.full(3, number, np.float32)}, ("y",))["y"]
        return bool((np.asarray(result) == -number).all())

    with ThreadPoolExecutor(threads) as workers:
        return all(workers.map(one, range(10 * threads)))


class _Static:
    """As a captured graph: one buffer that each call writes to, and copies out of."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(3)

    def run(self, inputs: Any) -> dict[str, torch.Tensor]:
        self.buffer.copy_(inputs["x"])
        time.sleep(1e-3)
        return {"y": -self.buffer}


def test_threads_that_call_one_torch_stage_take_turns() -> None:
    plain, static = Stage(SPEC, NEGATED, CPU), Stage(SPEC, NEGATED, CPU)
    static._seen[(("y",), (3,))] = (_Static(), {})  # type: ignore[assignment]
    assert _all_right(plain) and _all_right(static)
    assert not _all_right(lambda tensors, outputs: static._finish(*static._run(tensors, outputs)))


class _Buffer:
    """A buffer of a GPU that is its own address."""

    array = np.zeros(0, np.float32)

    def write(self, array: Any, stream: Any) -> _Buffer:
        self.array = array.copy()
        return self

    def reserve(self, size: int) -> _Buffer:
        return self

    def read(self, shape: Any, dtype: Any, stream: Any) -> Any:
        return self.array.copy()


class _Context:
    def __init__(self) -> None:
        self.at: dict[str, _Buffer] = {}

    def set_input_shape(self, name: str, shape: Any) -> None:
        self.shape = shape

    def get_tensor_shape(self, name: str) -> Any:
        return self.shape

    def set_tensor_address(self, name: str, address: _Buffer) -> None:
        self.at[name] = address

    def execute_async_v3(self, handle: Any) -> bool:
        time.sleep(1e-3)
        self.at["y"].array = -self.at["x"].array
        return True


def test_threads_that_call_one_engine_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_rt, "Buffer", _Buffer)
    monkeypatch.setattr(tensor_rt, "Stream", mock.MagicMock())
    opened = SimpleNamespace(
        num_optimization_profiles=1,
        create_execution_context=_Context,
        get_tensor_profile_shape=lambda name, index: ((3,), (3,), (3,)),
    )
    library: Any = mock.MagicMock()
    library.Runtime().deserialize_cuda_engine.return_value = opened
    engine = tensor_rt.Engine(library, b"", SPEC, "stage.engine")
    assert _all_right(engine)
    assert not _all_right(engine._run)


def test_a_captured_graph_holds_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of sizes live in the steps alone: without them the graph would read memory that is somebody else's."""
    nodes = (Node("Shape", "shape", ("x",), "n"), Node("Mul", "mul", ("x", "n"), "y"))
    specialized, _ = Program(Graph(nodes, {}, ("x",), ("y",)), CPU).specialize({"x": torch.ones(3)}, ("y",))
    for name in ("Stream", "stream", "graph", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    table = weakref.ref(specialized.steps[0].arguments[1])  # type: ignore[arg-type]
    captured = Captured(specialized, {"x": torch.ones(3)}, pool=None)
    del specialized
    assert table() is not None
    del captured
    assert table() is None


def test_ones_stay_where_they_are_for_however_many_sizes() -> None:
    first = products._ones(33, CPU)
    assert first.shape == (33, 1) and first.is_contiguous() and bool((first == 1).all())
    address = first.data_ptr()
    del first
    rows = range(1, 300)
    assert all(products._ones(each, CPU).shape == (each, 1) for each in rows)
    assert products._ones(33, CPU).data_ptr() == address
    assert len({products._ones(each, CPU).data_ptr() for each in rows}) == 10


def test_values_are_let_go_of_in_the_first_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watched(attributes: Any, x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        made.append(weakref.ref(result := -x))
        return result

    monkeypatch.setattr(program, "TABLE", {**program.TABLE, "Neg": Operator(watched)})
    names = ("x", "a", "b", "c", "d", "y")
    nodes = tuple(Node("Neg", name, (given,), name) for given, name in itertools.pairwise(names))
    # The size of one that nothing else reads any more is still known.
    sized = (*nodes[:2], Node("Shape", "shape", ("a",), "n"), *nodes[2:])
    graph = Graph(sized, {}, ("x",), ("b", "n", "y"))
    specialized, first = Program(graph, CPU).specialize({"x": torch.ones(3)}, graph.outputs)
    # Before each: its own input, and the output b from when it is there.
    assert alive == [0, 1, 1, 2, 2]
    assert {name: tensor.tolist() for name, tensor in first.items()} == {"b": [1.0] * 3, "y": [-1.0] * 3}
    assert specialized.known["n"].tolist() == [3]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_integers_divide_towards_zero(kind: torch.dtype) -> None:
    left, right = torch.tensor([7, -7, 7, -7], dtype=kind), torch.tensor([2, 2, -2, -2], dtype=kind)
    got = OPERATORS["Div"].run({}, left, right)
    assert got.dtype == kind and got.tolist() == [3, -3, -3, 3]
    assert OPERATORS["Div"].run({}, left.float(), right.float()).tolist() == [3.5, -3.5, -3.5, 3.5]
