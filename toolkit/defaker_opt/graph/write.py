"""Graphs to disk and back: a small .onnx file, and one beside it with the weights, which knows no 2 GB wall."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from defaker_opt.detector import Detector, linear_weights
from defaker_opt.graph import Graph
from defaker_opt.graph.codes import unpack_nibbles
from defaker_opt.methods import Array


def write_graph(graph: Graph, folder: Path) -> list[Path]:
    """Write `<stage>.onnx` and `<stage>.onnx.data`, one tensor at a time; the files written."""
    path = folder / f"{graph.spec.name}.onnx"
    data = path.with_suffix(".onnx.data")
    ir.save(graph.model, path, external_data=data.name, size_threshold_bytes=256)
    return [file for file in (path, data) if file.exists()]


def decoded_weights(path: Path) -> Iterator[tuple[str, Array]]:
    """Every quantized weight [out, in] in a written graph, decoded from its codes: what the file really says.

    No more of the file than one weight is held at a time.
    """
    initializers = ir.load(path).graph.initializers
    for name in initializers:
        weight, _, part = name.rpartition(".")
        if part == "codes":
            decoded = _decoded(_array(initializers[name]), _array(initializers[f"{weight}.scale"]))
            for read in (initializers[name], initializers[f"{weight}.scale"]):
                if isinstance(read.const_value, ir.ExternalTensor):
                    read.const_value.release()
            yield weight, decoded


def _decoded(codes: np.ndarray, scale: np.ndarray) -> Array:
    if codes.dtype == np.int8:
        whole: Array = codes.T.astype(np.float32) * scale[:, None]
        return whole
    rows, groups = codes.shape[:2]
    grouped = unpack_nibbles(codes.reshape(rows, -1)).reshape(rows, groups, -1).astype(np.float32)
    blocked: Array = (grouped * scale.reshape(rows, groups, 1)).reshape(rows, -1)
    return blocked


def check_decoded(path: Path, detector: Detector, stage: str) -> None:
    """Assert that a written graph decodes, bit for bit, to the weights that torch was given."""
    expected = {name for name in linear_weights(detector.config, stage) if name in detector.codes}
    seen = set()
    for name, weight in decoded_weights(path):
        assert np.array_equal(weight, detector.codes[name].dequantize()), f"{path}: {name} decodes to other numbers"
        seen.add(name)
    assert seen == expected, f"{path}: {sorted(seen ^ expected)} are in the graph or the detector, but not in both"


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
