"""Where a stage's time goes, operator by operator, under the names of the source's modules."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defaker_opt.profiles.measure import Call
from defaker_opt.runtime import Session
from defaker_opt.runtime.backends import Operator, find_backend
from defaker_opt.runtime.clock import Clock

# What a graph's writer appends to the name of a weight, for the nodes that its encoding takes.
_QUANTIZE_SUFFIXES = (
    *("quantize", "abs", "largest", "token_scale", "safe_scale", "ratio", "cast", "scales", "rescale", "rescale_rows"),
)
_QUANTIZE_KINDS = {"DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "Cast"}
_MOVE_KINDS = {
    *("Transpose", "Reshape", "Concat", "Split", "Slice", "Gather", "Pad", "Expand", "Unsqueeze", "Squeeze", "Shape"),
    *("ReorderInput", "ReorderOutput", "Identity", "Flatten", "Tile", "Resize", "ScatterND", "DepthToSpace"),
}
_PRODUCT_KINDS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"}
_PRODUCT_KINDS |= {"DynamicQuantizeMatMul", "Conv", "FusedConv", "ConvTranspose", "Einsum"}
# Nodes that onnxruntime put in by itself carry no module.
ADDED = "added by the runtime"


@dataclass(frozen=True)
class OperatorTime:
    """module: of the source, such as language.layers.0.mlp.up_proj. milliseconds: an image, over all its calls."""

    stage: str
    module: str
    kind: str
    category: str
    calls: int
    milliseconds: float


@dataclass(frozen=True)
class StageOperators:
    """operators: the costliest first. stage_ms: the same calls without a trace, before and after the traced ones.

    Both are of the fastest of several repetitions, as the machine may have done something else during the others.
    categories: milliseconds an image by category. covered: the operators' share of stage_ms; tracing itself takes some
    microseconds an operator, so it may be above 1 where a stage has many small ones.
    """

    stage: str
    stage_ms: float
    operators: tuple[OperatorTime, ...]
    categories: Mapping[str, float]
    covered: float


def measure_operators(session: Session, calls: Sequence[Call], repeat: int) -> tuple[StageOperators, ...]:
    """Trace every stage on its recorded calls; none if the backend cannot tell."""
    backend: Any = find_backend(session.build.manifest.data["target"]["backend"])
    if not hasattr(backend, "trace_stage"):
        return ()
    results = []
    for stage in dict.fromkeys(call.stage for call in calls):
        own = [call for call in calls if call.stage == stage]
        file = session.build.folder / f"{stage}.onnx"
        given = [(call.tensors, call.outputs) for call in own]
        before = _untraced(session, own, repeat)
        operators = backend.trace_stage(file, session.spec(stage), session.options(), given, repeat)
        after = _untraced(session, own, repeat)
        results.append(summarize_operators(stage, operators, len(own), min(before + after)))
    return tuple(results)


def _untraced(session: Session, calls: Sequence[Call], repeat: int) -> list[float]:
    """Milliseconds of all calls of a stage, `repeat` times, after one that is not counted."""
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        for call in calls:
            session.run(call.stage, call.tensors, Clock(), call.outputs)
        times.append((time.perf_counter() - started) * 1e3)
    return times[1:]


def summarize_operators(stage: str, operators: Sequence[Operator], calls: int, stage_ms: float) -> StageOperators:
    """The operators of the repetition that was disturbed least, added up by module and kind."""
    spent: dict[int, float] = defaultdict(float)
    for each in operators:
        spent[each.run // calls] += each.milliseconds
    fastest = min(spent, key=lambda repetition: spent[repetition])
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for each in operators:
        if each.run // calls == fastest:
            key = (module_of(each.name, stage), each.kind, category_of(each.name, each.kind))
            totals[key].append(each.milliseconds)
    rows = [
        OperatorTime(stage, module, kind, category, len(values), sum(values))
        for (module, kind, category), values in totals.items()
    ]
    rows.sort(key=lambda row: -row.milliseconds)
    categories: dict[str, float] = defaultdict(float)
    for row in rows:
        categories[row.category] += row.milliseconds
    return StageOperators(
        stage, stage_ms, tuple(rows), dict(categories), spent[fastest] / stage_ms if stage_ms else 0.0
    )


def module_of(name: str, stage: str) -> str:
    """The source's module of a node: `<module>/<operator>_<number>`, or a weight's name with a suffix."""
    if not name.startswith(stage):
        return f"{stage} ({ADDED})"
    path = name.partition("/")[0]
    module = path.partition(".weight")[0]
    return ".".join(part for part in module.split(".") if not part.startswith("_"))


def category_of(name: str, kind: str) -> str:
    """What an operator is for: a product, quantizing, moving memory, or everything else."""
    if kind in _PRODUCT_KINDS:
        return "products"
    if name.rpartition(".weight.")[2] in _QUANTIZE_SUFFIXES and ".weight." in name:
        return "quantize and dequantize"
    if kind in _QUANTIZE_KINDS:
        return "quantize and dequantize"
    return "memory movement" if kind in _MOVE_KINDS else "other"
