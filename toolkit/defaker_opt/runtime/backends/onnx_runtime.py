"""ONNX Runtime: on the CPU, or on what the target's providers are for."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Set before the import: its telemetry is on by default on Linux, and no later call turns it off completely.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from defaker_opt.errors import BuildError
from defaker_opt.runtime.backends import OpenStage, Operator, Tensors, Trace, check_input
from defaker_opt.runtime.spec import StageSpec

_LOG_ERRORS_ONLY = 3
_CPU = "CPUExecutionProvider"

# What it raises when it opens or runs a graph; they have no base of their own.
OPEN_ERRORS = (
    RuntimeError,
    ValueError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)


def open_stage(file: Path, spec: StageSpec, options: Mapping[str, Any]) -> OpenStage:
    """Open an ONNX file. `options`: `threads` (0 = one for each core); `providers`: by which operators run, before the
    CPU's; `as_written`: codes are decoded where the graph says so, and what comes out is multiplied, on the CPU.
    """
    session = _open(file, _settings(options), options)

    def run(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        check_input(spec, tensors)
        return dict(zip(outputs, session.run(list(outputs), dict(tensors))))

    return run


def trace_stage(
    file: Path,
    spec: StageSpec,
    options: Mapping[str, Any],
    calls: Sequence[tuple[Tensors, tuple[str, ...]]],
    repeat: int,
) -> Trace:
    """See `Backend`. The first round of each kind warms up and is not returned; run numbers count the calls of later
    rounds. One session is open at a time, as a stage may fill half of a device's memory.
    """
    for tensors, _ in calls:
        check_input(spec, tensors)
    plain = _time_runs(_open(file, _settings(options), options), calls, repeat)
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(options)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / spec.name)
        session = _open(file, settings, options)
        _time_runs(session, calls, repeat)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ends = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    return Trace(tuple(plain), tuple(_operators(events, ends, skip=len(calls))))


def _time_runs(
    session: onnxruntime.InferenceSession, calls: Sequence[tuple[Tensors, tuple[str, ...]]], repeat: int
) -> list[float]:
    """Milliseconds of each run, all calls in turn; one more round goes before."""
    took = []
    for _ in range(repeat + 1):
        for tensors, outputs in calls:
            began = time.perf_counter()
            session.run(list(outputs), dict(tensors))
            took.append(1e3 * (time.perf_counter() - began))
    return took[len(calls) :]


def _operators(events: Sequence[Mapping[str, Any]], ends: Sequence[int], skip: int) -> Iterator[Operator]:
    """Sort the nodes' events into the runs during which they happened, by when each run ended."""
    nodes = sorted((event for event in events if event.get("cat") == "Node"), key=lambda event: event["ts"])
    run = 0
    for node in nodes:
        while node["ts"] > ends[run]:
            run += 1
        if run >= skip:
            name = node["name"].removesuffix("_kernel_time")
            yield Operator(run - skip, name, node["args"]["op_name"], node["dur"] / 1e3)


def _settings(options: Mapping[str, Any]) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _LOG_ERRORS_ONLY
    settings.intra_op_num_threads = int(options.get("threads", 0))
    # Each stage has threads of its own, which would spin on after their stage and take the cores from the next one.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.get("as_written"):
        # Beyond basic optimizations codes are fused into products, and of FP8 a Relu before them is lost (1.31).
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return settings


def _open(file: Path, settings: onnxruntime.SessionOptions, options: Mapping[str, Any]) -> onnxruntime.InferenceSession:
    providers = [] if options.get("as_written") else list(options.get("providers", ()))
    have = onnxruntime.get_available_providers()
    for name in providers:
        if name not in have:
            raise BuildError(
                f"target: providers: {name} is not in this onnxruntime, which has {', '.join(have)}; for a GPU: "
                "pip install onnxruntime-gpu"
            )
    try:
        session = onnxruntime.InferenceSession(str(file), settings, providers=list(dict.fromkeys([*providers, _CPU])))
    except native.NotImplemented as error:
        raise BuildError(
            f"{file}: onnxruntime {onnxruntime.__version__} has no operator for its codes here ({error}); FP4 is "
            "run by torch: without --backend, or with --backend torch_cuda"
        ) from error
    except OPEN_ERRORS as error:
        raise BuildError(f"{file}: onnxruntime {onnxruntime.__version__} cannot open it ({error})") from error
    for name in providers:
        # One that cannot start is only warned about, and the CPU does its work.
        if name not in session.get_providers():
            raise BuildError(
                f"target: providers: {name} did not start here; are the GPU's driver, CUDA and cuDNN those that "
                f"onnxruntime {onnxruntime.__version__} wants? see: defaker-opt doctor"
            )
    return session
