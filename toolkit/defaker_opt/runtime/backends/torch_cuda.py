"""Torch on an NVIDIA GPU, for datacenters: the build's graphs as products of codes, fused kernels and CUDA graphs.

Convolutions are float32, or TF32 where torch's own switch allows it (`torch.backends.cudnn.allow_tf32`, on by default).
What is fast about it has not been measured on a GPU; that its numbers are those of ONNX Runtime has, on a CPU.
`profiling/gpu.py` measures.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defaker_opt.errors import BuildError, one_of
from defaker_opt.runtime.backends import OpenStage, Tensors, check_input
from defaker_opt.runtime.spec import StageSpec
from defaker_opt.runtime.torch_graph.array import DeviceArray, to_tensor
from defaker_opt.runtime.torch_graph.bitsandbytes import require_library
from defaker_opt.runtime.torch_graph.capture import Captured
from defaker_opt.runtime.torch_graph.graph import Graph, read_graph
from defaker_opt.runtime.torch_graph.program import Program, Specialized, lower

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# FP8 products need tensor cores of Ada or Hopper.
_FP8_CAPABILITY = (8, 9)

# Sizes are captured when they come back, and the graphs of so many are kept.
_GRAPHS = 64

# Independent of what the other stages compute, so it may run beside them.
_BESIDE = "mask_encoder"


def open_stage(file: Path, spec: StageSpec, options: Mapping[str, Any]) -> OpenStage:
    """Open an ONNX file. `options`: `compute`, the type that linear layers hand on; `device`: "cuda", "cuda:1" …, or
    "cpu", where the same steps run without kernels and graphs of ours, to check numbers.

    Raises BuildError if there is no such device, if it cannot run the build's codes, or for unknown operators.
    """
    device = find_device(str(options.get("device", "cuda")))
    compute = str(options.get("compute", "float32"))
    if compute not in COMPUTE:
        raise BuildError(f"target: session.compute: {one_of(compute, COMPUTE)}")
    graph = read_graph(file)
    require_library(graph)
    lowered = lower(graph, COMPUTE[compute])
    if device.type == "cuda":
        check_codes(file, lowered, torch.cuda.get_device_capability(device))
        _require_kernels()
    return Stage(spec, lowered, device)


def find_device(name: str) -> torch.device:
    """The device of that name. Raises BuildError if torch has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BuildError(f"torch_cuda: device {name!r} is not a name of torch's; use cuda, cuda:1 … or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise BuildError(f"torch_cuda: device {name!r} is not supported; use cuda, cuda:1 … or cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BuildError(
            f"torch_cuda: device {name!r} is not here: torch {torch.__version__} sees {count} CUDA devices; install "
            "the GPU's driver and a torch for CUDA, or run the build with: --backend onnx_runtime"
        )
    return device


def check_codes(file: Path, graph: Graph, capability: tuple[int, int]) -> None:
    """Raise BuildError if a lowered stage multiplies FP8 and the GPU's compute capability has no products of it.

    Scales of NVFP4 are no reason: once lowered they are bytes, which any GPU decodes.
    """
    stored = {name for name, tensor in graph.constants.items() if tensor.dtype == torch.float8_e4m3fn}
    fp8 = next((node.name for node in graph.nodes if stored.intersection(node.inputs)), None)
    if fp8 is not None and capability < _FP8_CAPABILITY:
        have, want = (".".join(map(str, each)) for each in (capability, _FP8_CAPABILITY))
        raise BuildError(
            f"{file}: {fp8} multiplies FP8, which needs a GPU from SM {want} on, and this one is SM {have}; "
            "make an INT8 build for it: defaker-opt quantize --recipe datacenter-int8"
        )


def _require_kernels() -> None:
    try:
        importlib.import_module("defaker_opt.runtime.torch_graph.kernels")
    except ModuleNotFoundError as error:
        raise BuildError(
            f"backend torch_cuda needs the package {error.name!r}; install it: pip install 'defaker-opt[cuda]'"
        ) from error


class Stage:
    """A stage ready to run: specialized for sizes when it meets them, captured as a CUDA graph when they come back."""

    def __init__(self, spec: StageSpec, graph: Graph, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._program = Program(graph, device)
        self._seen: OrderedDict[Any, tuple[Specialized | Captured, Mapping[str, Tensor]]] = OrderedDict()
        # Graphs write to buffers of their own and share memory, so calls of several threads take turns.
        self._turn = threading.Lock()
        on_gpu = device.type == "cuda"
        beside = on_gpu and spec.name == _BESIDE
        self._stream = torch.cuda.Stream(device) if beside else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def __call__(self, tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, Any]:
        """See `OpenStage`. On a GPU results are arrays that lie there, and nothing waits until one is read.

        Any thread may call: a result is a copy of a graph's buffer, so later calls leave it alone.
        """
        check_input(self._spec, tensors)
        with self._turn, torch.inference_mode():
            if self._stream is None:
                return self._finish(*self._run(tensors, outputs))
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                results = self._finish(*self._run(tensors, outputs))
                ready = self._stream.record_event()
            return {name: _ready(array, ready) for name, array in results.items()}

    def _run(self, tensors: Tensors, outputs: tuple[str, ...]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Outputs that depend on the picture, on the device, and those that depend on sizes alone, on the host."""
        inputs = {tensor.name: to_tensor(tensors[tensor.name], self._device) for tensor in self._spec.inputs}
        key = (outputs, *(tuple(tensor.shape) for tensor in inputs.values()))
        found = self._seen.pop(key, None)
        if found is None:
            program, results = self._program.specialize(inputs, outputs)
            self._seen[key] = (program, program.known)
            if len(self._seen) > _GRAPHS:
                self._seen.popitem(last=False)
            return results, program.known
        runs, known = found
        if isinstance(runs, Specialized) and runs.capturable and self._device.type == "cuda":
            runs = Captured(runs, inputs, self._pool)
        self._seen[key] = (runs, known)
        return runs.run(inputs), known

    def _finish(self, results: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Any]:
        dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in self._spec.outputs}
        computed = {name: DeviceArray(tensor.to(dtypes[name]).contiguous()) for name, tensor in results.items()}
        return {**computed, **{name: tensor.to(dtypes[name]).contiguous().numpy() for name, tensor in known.items()}}


def _ready(array: Any, ready: torch.cuda.Event) -> Any:
    """An array of a stream of its own."""
    return DeviceArray(array.tensor, ready) if isinstance(array, DeviceArray) else array
