"""The best this machine does: products in each format through the runtime's own library, and copying memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Tokens, columns in, rows out: of the products in vision towers, decoders and pictures' encoders.
_SHAPES = ((1024, 1024, 4096), (512, 2048, 2048))
_GROUP = 32
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Peaks:
    """rates: operations a second by format, the best of several products; bandwidth: bytes a second, read + written."""

    rates: Mapping[str, float]
    bandwidth: float


def measure_peaks(threads: int, seconds: float = 1.0) -> Peaks:
    """Measure for about `seconds` each. `threads`: of the products, 0 = one for each core."""
    import os

    copying = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        rates = {
            kind: max(_rate(Path(folder) / f"{kind}.onnx", kind, shape, threads, seconds) for shape in _SHAPES)
            for kind in ("fp32", "int8", "int4")
        }
    return Peaks(rates, _copy_bandwidth(copying, seconds))


def _rate(path: Path, kind: str, shape: tuple[int, int, int], threads: int, seconds: float) -> float:
    """Operations a second of the fastest run of one product."""
    from defaker_opt.runtime.backends.onnx_runtime import open_stage
    from defaker_opt.runtime.spec import StageSpec, TensorSpec

    tokens, columns, rows = shape
    _write_product(path, kind, columns, rows)
    spec = StageSpec(
        kind, (TensorSpec("x", "float32", ("tokens", columns)),), (TensorSpec("y", "float32", ("tokens", rows)),)
    )
    run = open_stage(path, spec, {"threads": threads})
    given = {"x": np.random.default_rng(0).standard_normal((tokens, columns), np.float32)}
    run(given, ("y",))
    best, until = float("inf"), time.perf_counter() + seconds / len(_SHAPES)
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        run(given, ("y",))
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * columns * rows / best


def _write_product(path: Path, kind: str, columns: int, rows: int) -> None:
    """One linear layer in the encoding that builds for onnxruntime use."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(1)
    constants: dict[str, np.ndarray]
    if kind == "fp32":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        constants = {"w": generator.standard_normal((columns, rows)).astype(np.float32)}
    elif kind == "int8":
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
            helper.make_node("Cast", ["product"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["scale", "s"], ["both"]),
            helper.make_node("Mul", ["cast", "both"], ["y"]),
        ]
        codes = generator.integers(-127, 128, (columns, rows)).astype(np.int8)
        constants = {"w": codes, "s": np.full(rows, 0.01, np.float32)}
    else:
        given: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": _GROUP, "accuracy_level": 4}
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **given)]
        groups = columns // _GROUP
        packed = generator.integers(0, 256, (rows, groups, _GROUP // 2)).astype(np.uint8)
        constants = {"w": packed, "s": np.full(rows * groups, 0.01, np.float32)}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", n])
        for name, n in (("x", columns), ("y", rows))
    )
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, kind, [x], [y], values), opset_imports=opsets, ir_version=10), path
    )


def _copy_bandwidth(threads: int, seconds: float) -> float:
    """Bytes read and written a second while each thread copies an array that no cache holds."""
    sources = [np.ones(_COPY_BYTES // threads, np.uint8) for _ in range(threads)]
    targets = [np.zeros_like(source) for source in sources]
    best, until = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as workers:
        while time.perf_counter() < until or best == float("inf"):
            started = time.perf_counter()
            list(workers.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - started)
    return 2.0 * sum(source.nbytes for source in sources) / best
