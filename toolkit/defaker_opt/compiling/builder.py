"""The process that builds one engine: its memory is the system's again when it ends, whatever TensorRT kept.

python -m defaker_opt.compiling.builder JOB.json prints one JSON object a line: {"step", "share"} while it works, and
last {"bytes", "seconds", "tensorrt", "refused"}.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from defaker_opt.runtime.backends.tensor_rt import library


def main(job: Mapping[str, Any]) -> dict[str, Any]:
    """Build what the job says."""
    _end_with_parent()
    trt = library([job["library"]])
    logger = _logger(trt, job["log"])
    started = time.perf_counter()
    builder = trt.Builder(logger)
    # Each operator runs in the type that the graph gives it; the builder may not choose another.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    plan, refused = None, []
    if not parser.parse_from_file(job["graph"]):
        refused = [_words(parser.get_error(index)) for index in range(parser.num_errors)] or [
            "the parser gave no reason"
        ]
    else:
        config = _config(trt, builder, network, job)
        plan = builder.build_serialized_network(network, config)
        refused = [] if plan is not None else logger.errors[-3:] or ["the builder gave no reason"]
        _keep_timing(config, job)
    size = 0 if plan is None else plan.nbytes
    if plan is not None and job["output"]:
        _write_whole(Path(job["output"]), plan)
    seconds = time.perf_counter() - started
    return {"bytes": size, "seconds": seconds, "tensorrt": f"{trt.__name__} {trt.__version__}", "refused": refused}


def _words(error: Any) -> str:
    where = f"{error.node_operator()} {error.node_name()}: " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _config(trt: ModuleType, builder: Any, network: Any, job: Mapping[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job["workspace_mb"]) << 20)
    if job["capability"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["capability"]), 0)
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    if cache:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), False)
    config.progress_monitor = _monitor(trt)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        for ranges in job["profiles"]:
            config.add_optimization_profile(_profile(builder, inputs, ranges))
    return config


def _profile(builder: Any, inputs: list[Any], ranges: Mapping[str, tuple[int, int, int]]) -> Any:
    """One range for each input; the graph's own names say which size each dimension is."""
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        if -1 in tuple(tensor.shape):
            named = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
            shapes = [
                [ranges[name][place] if size == -1 else size for size, name in zip(tensor.shape, named)]
                for place in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
    return profile


def _keep_timing(config: Any, job: Mapping[str, Any]) -> None:
    """What was timed for this engine helps the next one, and the same one next time."""
    cache = config.get_timing_cache()
    if job["timing_cache"] and cache is not None:
        _write_whole(Path(job["timing_cache"]), cache.serialize())


def _write_whole(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _end_with_parent() -> None:
    """A builder whose compile was killed would hold the memory that the next one needs (prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _logger(trt: ModuleType, log: str | None) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps what TensorRT says: warnings in the log, errors also for the answer."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, words: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(words)
            if log and severity <= trt.ILogger.Severity.WARNING:
                with open(log, "a", encoding="utf-8") as stream:
                    stream.write(f"{severity.name} {words}\n")

    return Logger()


def _monitor(trt: ModuleType) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Says how far the outermost phase is."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                print(json.dumps({"step": phase, "share": (step + 1) / max(1, self.steps[phase])}), flush=True)
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
