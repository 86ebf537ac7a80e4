"""OpenVINO, on CPUs: INT8 products in fused kernels, and everything around them in bfloat16 where the target says so.

Compared with ONNX Runtime by `profiling/peers.py`.
"""

from __future__ import annotations

import functools
import math
import queue
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.errors import BuildError, one_of
from defaker_opt.runtime.backends import OpenStage, Operator, Tensors, Trace, check_input
from defaker_opt.runtime.spec import StageSpec

# Its import would report itself to an analytics service, if the package that does so could be imported.
_REPORTS = "openvino_telemetry"
_had = sys.modules.get(_REPORTS)
sys.modules[_REPORTS] = None  # type: ignore[assignment]
try:
    import openvino
finally:
    del sys.modules[_REPORTS]
    if _had is not None:
        sys.modules[_REPORTS] = _had

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}

# Activations that meet codes without a scale of their own are rounded in groups of columns; longer ones are not
# rounded at all, as measured with 2026.4.
_LONGEST_GROUP = 1024

# What stands between codes and the product that they are decoded for.
_DECODING = ("Convert", "Multiply", "Subtract", "Transpose", "Reshape")


def open_stage(file: Path, spec: StageSpec, options: Mapping[str, Any]) -> OpenStage:
    """Open an ONNX file. `options`: `threads` (0 = one for each core); `compute`: the type of what is not a product of
    codes. Raises BuildError if OpenVINO cannot.
    """
    compiled = _compile(file, options)
    # A request has buffers of its own, so calls of several threads, which come and go, do not meet.
    idle: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()

    def run(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        check_input(spec, tensors)
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = compiled.create_infer_request()
        request.infer(dict(tensors), share_inputs=True)
        # Copies, as the next call writes to the same buffers.
        results = {name: np.array(request.get_tensor(name).data) for name in outputs}
        idle.put(request)
        return results

    return run


def trace_stage(
    file: Path,
    spec: StageSpec,
    options: Mapping[str, Any],
    calls: Sequence[tuple[Tensors, tuple[str, ...]]],
    repeat: int,
) -> Trace:
    """See `Backend`. The first round of each kind warms up and is not returned."""
    for tensors, _ in calls:
        check_input(spec, tensors)
    plain = _runs(_compile(file, options).create_infer_request(), calls, repeat)
    plain_ms = tuple(milliseconds for milliseconds, _ in plain)
    traced = _runs(_compile(file, {**options, "traced": True}).create_infer_request(), calls, repeat)
    return Trace(plain_ms, tuple(each for run, (_, infos) in enumerate(traced) for each in _operators(run, infos)))


def _runs(
    request: openvino.InferRequest, calls: Sequence[tuple[Tensors, tuple[str, ...]]], repeat: int
) -> Iterator[tuple[float, list[openvino.ProfilingInfo]]]:
    """Milliseconds and operators of each run, all calls in turn; one more round goes before."""
    for turn in range(repeat + 1):
        for tensors, _ in calls:
            began = time.perf_counter()
            request.infer(dict(tensors), share_inputs=True)
            took = 1e3 * (time.perf_counter() - began)
            if turn:
                yield took, request.profiling_info


def _operators(run: int, infos: Iterable[openvino.ProfilingInfo]) -> Iterator[Operator]:
    for info in infos:
        if info.status == openvino.ProfilingInfo.Status.EXECUTED and info.real_time.total_seconds() > 0:
            yield Operator(run, info.node_name, info.node_type, 1e3 * info.real_time.total_seconds())


def _compile(file: Path, options: Mapping[str, Any]) -> openvino.CompiledModel:
    compute = str(options.get("compute", "float32"))
    if compute not in _PRECISIONS:
        raise BuildError(f"target: session.compute: {one_of(compute, _PRECISIONS)}")
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _PRECISIONS[compute],
        # Pinned, the threads of two pictures that are judged at once would share one core.
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": bool(options.get("traced", False)),
    }
    if options.get("threads"):
        settings["INFERENCE_NUM_THREADS"] = int(options["threads"])
    core = openvino.Core()
    try:
        model = core.read_model(str(file))
        return core.compile_model(model, "CPU", {**settings, "DYNAMIC_QUANTIZATION_GROUP_SIZE": _group(model)})
    except RuntimeError as error:
        raise BuildError(f"{file}: openvino {openvino.__version__} cannot open it ({error})") from error


def _group(model: openvino.Model) -> int:
    """How many columns of an activation share a scale, if it has none in the graph: as many as fit all products."""
    columns = [count for node in model.get_ops() if node.get_type_name() == "MatMul" for count in _coded(node)]
    return functools.reduce(math.gcd, columns, _LONGEST_GROUP)


def _coded(product: openvino.Node) -> Iterator[int]:
    """Columns of a product's weight, if it has codes."""
    node = product.input_value(1).get_node()
    while node.get_type_name() in _DECODING:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8:
        yield node.shape[0]
