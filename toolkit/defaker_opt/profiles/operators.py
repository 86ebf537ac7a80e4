"""Where a stage's time goes, operator by operator, under the names of the source's modules."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.runtime import Session
from defaker_opt.runtime.backends import Trace, find_backend
from defaker_opt.runtime.engines import backend_of
from defaker_opt.runtime.recording import Call

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
_PRODUCT_KINDS |= {"MatMulBnb4", "DynamicQuantizeMatMul", "Conv", "FusedConv", "ConvTranspose", "Einsum"}
# Nodes that onnxruntime put in by itself carry no module.
ADDED = "added by the runtime"
# How onnxruntime calls the nodes of our own operator, without a word of the layer that it is in.
_INLINED = "_inlfunc_LlmInt8"
# Of the search for what tracing adds: a millisecond is then known to a billionth.
_HALVINGS = 40


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

    stage_ms: an image, when nothing is traced. tracing_ms: what tracing adds to a call of an operator, and is taken off
    each: as much as makes the operators together no longer than the stage, and never more than the operator took.
    """

    stage: str
    stage_ms: float
    operators: tuple[OperatorTime, ...]
    categories: Mapping[str, float]
    tracing_ms: float

    @property
    def between_ms(self) -> float:
        """Milliseconds an image that are in no operator."""
        return max(0.0, self.stage_ms - sum(self.categories.values()))

    @property
    def covered(self) -> float:
        """Share of the stage that is inside operators, 0…1."""
        return 1 - self.between_ms / self.stage_ms


def measure_operators(session: Session, calls: Sequence[Call], repeat: int) -> tuple[StageOperators, ...]:
    """Trace every stage on its recorded calls; none if the backend cannot tell."""
    backend: Any = find_backend(backend_of(session.build))
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
    plain = np.array(trace.plain_ms).reshape(-1, calls)
    repeat, stage_ms = len(plain), float(np.median(plain, axis=0).sum())
    times: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for each in trace.operators:
        times[each.run % calls, each.name, each.kind].append(each.milliseconds)
    # The runtime's own nodes may share a name within one run.
    counts = {key: len(samples) // repeat for key, samples in times.items()}
    medians = np.array([statistics.median(samples) for samples in times.values()])
    tracing_ms = _tracing(medians, np.array(list(counts.values())), stage_ms)
    totals: dict[tuple[str, str, str], float] = defaultdict(float)
    called: dict[tuple[str, str, str], int] = defaultdict(int)
    for ((_, name, kind), count), median in zip(counts.items(), medians):
        key = (module_of(name, stage), kind, category_of(name, kind))
        called[key] += count
        totals[key] += count * max(0.0, float(median) - tracing_ms)
    rows = [OperatorTime(stage, *key, called[key], total) for key, total in totals.items()]
    rows.sort(key=lambda row: -row.milliseconds)
    categories: dict[str, float] = defaultdict(float)
    for row in rows:
        categories[row.category] += row.milliseconds
    return StageOperators(stage, stage_ms, tuple(rows), dict(categories), tracing_ms)


def _tracing(medians: NDArray[np.float64], counts: NDArray[np.int64], stage_ms: float) -> float:
    """The smallest milliseconds that, taken off every call, leave no more than the stage; 0 if nothing must go."""
    low, high = 0.0, float(medians.max(initial=0.0))
    if float(medians @ counts) <= stage_ms:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        left = float(np.maximum(medians - middle, 0) @ counts)
        low, high = (middle, high) if left > stage_ms else (low, middle)
    return high


def module_of(name: str, stage: str) -> str:
    """The source's module of a node: `<module>/<operator>_<number>`, or a weight's name with a suffix."""
    if name.startswith(_INLINED):
        return f"{stage} (all LLM.int8() products)"
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
