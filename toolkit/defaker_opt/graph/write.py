"""Graphs to disk and back: a small .onnx file, and one beside it with the weights, which knows no 2 GB wall."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from defaker_opt.detector import Detector, linear_weights
from defaker_opt.graph import Graph
from defaker_opt.graph.bitsandbytes import unpack_nf4
from defaker_opt.graph.packing import unpack_codes
from defaker_opt.methods import NF4, Array, decode


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
    graph = ir.load(path).graph
    columns = {node.name: node.attributes["K"].as_int() for node in graph if "K" in node.attributes}
    for name in graph.initializers:
        weight, _, part = name.rpartition(".")
        if part != "codes":
            continue
        parts = {
            part: value
            for part in ("codes", "scale", "block_scale", "tensor_scale", "zero", "factor")
            if (value := graph.initializers.get(f"{weight}.{part}")) is not None
        }
        decoded = _decoded({part: _array(value) for part, value in parts.items()}, columns.get(weight))
        for value in parts.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.release()
        yield weight, decoded


def _decoded(parts: dict[str, np.ndarray], columns: int | None) -> Array:
    """columns: of a blocked product, None for a whole one, whose codes are stored [in, out]. NF4 lies in one row."""
    if "block_scale" in parts:
        parts = {**parts, "scale": parts["block_scale"].astype(np.float32) * parts["tensor_scale"]}
    codes, scale, factor = parts["codes"], parts["scale"], parts.get("factor")
    if columns is not None and codes.ndim == 1:
        numbers = NF4[unpack_nf4(codes)].reshape(-1, columns)
        return decode(numbers, scale.reshape(len(numbers), -1), None, factor)
    if columns is None:
        # [out] of whole rows, or [groups, out] of blocks.
        by_group = scale[:, None] if scale.ndim == 1 else scale.T.astype(np.float32)
        return decode(codes.T, by_group, None, factor)
    rows, groups = codes.shape[:2]
    bits = 8 * codes.size // (rows * columns)
    whole = unpack_codes(codes.reshape(rows, -1), bits, columns)
    zero = unpack_codes(parts["zero"].reshape(rows, -1), bits, groups) if "zero" in parts else None
    return decode(whole, scale.reshape(rows, groups), zero, factor)


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
