"""A specialized program as a CUDA graph: one launch for all of its calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from defaker_opt.runtime.torch_graph.program import Specialized

# Beginning a capture waits for the whole device, which another thread's capture forbids.
_ONE_AT_A_TIME = threading.Lock()


class Captured:
    """A CUDA graph with buffers for its inputs. Not measured on a GPU yet."""

    def __init__(self, program: Specialized, inputs: Mapping[str, Tensor], pool: Any) -> None:
        """pool: of memory, shared by graphs that never run at once and whose outputs are copied before the next."""
        # Its steps hold masks and tables of these sizes, which the graph reads at their addresses.
        self._program = program
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        device = next(iter(self._inputs.values())).device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        # Libraries choose kernels and take workspaces in the first run, which a capture forbids.
        with torch.cuda.stream(beside):
            program.run(self._inputs)
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on with their own stages while this one captures.
        capturing = torch.cuda.graph(self._graph, pool=pool, stream=beside, capture_error_mode="thread_local")
        with _ONE_AT_A_TIME, capturing:
            self._outputs = program.run(self._inputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the sizes that were captured → outputs in memory of their own."""
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
