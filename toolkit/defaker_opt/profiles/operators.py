"""Where a stage's time goes, operator by operator, under the names of the source's modules."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defaker_opt.profiles.measure import Call
from defaker_opt.runtime import Session
from defaker_opt.runtime.backends import Trace, find_backend

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
    """operators: the costliest first; medians, as a single run is easily disturbed. categories: their sums by purpose.

    covered: share of the traced runs' own time that is inside operators; the rest is between them, where the trace
    itself writes for some microseconds an operator. stage_ms: operators and what is between them, an image.
    """

    stage: str
    stage_ms: float
    operators: tuple[OperatorTime, ...]
    categories: Mapping[str, float]
    covered: float

    @property
    def between_ms(self) -> float:
        """Milliseconds an image that are in no operator."""
        return self.stage_ms - sum(self.categories.values())


def measure_operators(session: Session, calls: Sequence[Call], repeat: int) -> tuple[StageOperators, ...]:
    """Trace every stage on its recorded calls; none if the backend cannot tell."""
    backend: Any = find_backend(session.build.manifest.data["target"]["backend"])
    if not hasattr(backend, "trace_stage"):
        return ()
    results = []
    for stage in dict.fromkeys(call.stage for call in calls):
        own = [(call.tensors, call.outputs) for call in calls if call.stage == stage]
        file = session.build.folder / f"{stage}.onnx"
        trace = backend.trace_stage(file, session.spec(stage), session.options(), own, repeat)
        results.append(summarize_operators(stage, trace, len(own)))
    return tuple(results)


def summarize_operators(stage: str, trace: Trace, calls: int) -> StageOperators:
    """Add up each node's median over the repetitions, by module and kind."""
    repeat = len(trace.run_ms) // calls
    times: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for each in trace.operators:
        times[each.run % calls, each.name, each.kind].append(each.milliseconds)
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for (_, name, kind), samples in times.items():
        key = (module_of(name, stage), kind, category_of(name, kind))
        # The runtime's own nodes may share a name within one run.
        counts[key] += len(samples) // repeat
        totals[key].append(statistics.median(samples) * (len(samples) // repeat))
    rows = [OperatorTime(stage, *key, counts[key], sum(values)) for key, values in totals.items()]
    rows.sort(key=lambda row: -row.milliseconds)
    categories: dict[str, float] = defaultdict(float)
    for row in rows:
        categories[row.category] += row.milliseconds
    covered = sum(each.milliseconds for each in trace.operators) / sum(trace.run_ms)
    return StageOperators(stage, sum(categories.values()) / covered, tuple(rows), dict(categories), covered)


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
