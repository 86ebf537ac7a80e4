"""What a job would do, said before doing it."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from defaker_opt.detector import linear_weights, parameter_shapes
from defaker_opt.methods import parse_scheme
from defaker_opt.pipeline import Job

# A graph's nodes and names, beside its weights: about this much.
_GRAPH_BYTES = 60_000


def preview_job(job: Job, output: Path) -> dict[str, Any]:
    """The resolved recipe, where the build would go, and for each stage what its layers become and its size."""
    schemes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for each in job.recipe.passes:
        preview = each.check(job.detector.config, job.target)
        schemes.update(preview.schemes)
        reasons.update(preview.reasons)
    stages = {stage: _preview_stage(job, stage, schemes) for stage in job.recipe.stages()}
    return {
        "build": str(output),
        "recipe": {**job.recipe.as_json(), "source": job.source, "target": job.target.name},
        "stages": stages,
        "left_in_float": reasons,
        **({} if job.detector.config.trained else {"untrained": True}),
        "predicted_bytes": sum(stage["predicted_bytes"] for stage in stages.values()),
    }


def _preview_stage(job: Job, stage: str, schemes: dict[str, str]) -> dict[str, Any]:
    shapes = parameter_shapes(job.detector.config, stage)
    linear = linear_weights(job.detector.config, stage)
    float_bytes = _GRAPH_BYTES + 4 * sum(math.prod(shape) for shape in shapes.values())
    saved = sum(
        4 * math.prod(shape) - quantized_bytes(shape, schemes.get(name, "float")) for name, shape in linear.items()
    )
    return {
        "schemes": dict(Counter(schemes.get(name, "float") for name in linear)),
        "float32_bytes": float_bytes,
        "predicted_bytes": float_bytes - saved,
    }


def quantized_bytes(shape: tuple[int, ...], scheme_name: str) -> int:
    """Bytes of a weight [out, in] with its scales."""
    scheme = parse_scheme(scheme_name)
    if scheme is None:
        return 4 * math.prod(shape)
    groups = shape[1] // scheme.group_size if scheme.group_size else 1
    zero_points = scheme.bits * shape[0] * groups // 8 if scheme.zero_point == "group" else 0
    # Engines have float16, NVFP4 has FP8, and its one scale more is not worth counting.
    scale = 1 if scheme.number == "nvfp" else 2 if scheme.symmetric else 4
    return math.prod(shape) * scheme.bits // 8 + scale * shape[0] * groups + zero_points


def peak_memory_bytes() -> int:
    """The most memory this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux's getrusage begins with the memory of the process that started this one.
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
