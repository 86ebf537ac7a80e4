"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Set before the import: its telemetry is on by default on Linux, and no later call turns it off completely.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from defaker_opt.errors import BuildError
from defaker_opt.runtime.backends import OpenStage, Tensors, check_input
from defaker_opt.runtime.spec import StageSpec

_LOG_ERRORS_ONLY = 3

_OPEN_ERRORS = (
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
    """Open an ONNX file. `options`: `threads` (0 = one for each core)."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _LOG_ERRORS_ONLY
    settings.intra_op_num_threads = int(options.get("threads", 0))
    try:
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except _OPEN_ERRORS as error:
        raise BuildError(f"{file}: onnxruntime {onnxruntime.__version__} cannot open it ({error})") from error

    def run(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        check_input(spec, tensors)
        return dict(zip(outputs, session.run(list(outputs), dict(tensors))))

    return run
