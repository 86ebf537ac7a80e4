"""Whether a written graph is one that a target's parser reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from defaker_opt.errors import PassError
from defaker_opt.graph.tensors import reader_of
from defaker_opt.target import GraphLimits

_CODES = ("QuantizeLinear", "DequantizeLinear")


def check_accepted(path: Path, limits: GraphLimits, target: str) -> None:
    """Raise PassError with everything in a written stage that the target's parser would refuse."""
    problems = list(_problems(ir.load(path), limits))
    if problems:
        raise PassError(
            f"{path.stem}: target {target} does not read its graph:\n  "
            + "\n  ".join(problems)
            + "\nother schemes are written otherwise; its file says what it reads, see: defaker-opt show targets"
        )


def _problems(model: ir.Model, limits: GraphLimits) -> Iterator[str]:
    opset = model.opset_imports.get("", 0)
    if opset > limits.opset:
        yield f"opset {opset}, and it reads up to {limits.opset}"
    for kind in sorted({_full_name(node) for node in model.graph} - set(limits.operators)):
        first = next(node for node in model.graph if _full_name(node) == kind)
        yield f"operator {kind} ({first.name}) is not one that it reads"
    for node in model.graph:
        if node.op_type in _CODES:
            yield from _wrong_codes(node)
        size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else None
        if size and size not in limits.blocks:
            yield f"{node.name}: blocks of {size}, and it reads {', '.join(map(str, limits.blocks)) or 'none'}"


def _full_name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _wrong_codes(node: ir.Node) -> Iterator[str]:
    """Codes must stand for numbers around 0, in steps above 0; a bias is added as it is."""
    readers = (reader_of(value) for value in (*node.inputs[1:3], None)[:2])
    scale, zero = (read() if read else None for read in readers)
    if zero is not None and np.any(zero.astype(np.float32) != 0):
        yield f"{node.name}: a zero point other than 0"
    if scale is None:
        yield f"{node.name}: a scale that is computed"
    elif not np.all(scale > 0):
        yield f"{node.name}: a scale that is not above 0"
    codes = node.inputs[0]
    if codes is not None and codes.dtype == ir.DataType.INT32:
        yield f"{node.name}: codes of 32 bits, as of a bias"
