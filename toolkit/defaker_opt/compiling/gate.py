"""Whether TensorRT reads and builds a build's graphs, asked on a machine without a GPU.

TensorRT for RTX builds engines for GPUs that are not there. It is a product of its own and knows neither Jetson nor
Hopper: what it refuses is wrong, what it takes may still be refused there. A gate, not a proof.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from defaker_opt.compiling import Built, EngineJob
from defaker_opt.compiling.shapes import sizes_of, stage_ranges
from defaker_opt.errors import BuildError
from defaker_opt.progress import Progress, part_named
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.engines import BACKEND
from defaker_opt.runtime.session import open_session

# GPUs that RTX's builder knows, of those that detectors run on; the last is asked for codes of FP4, or by name.
CAPABILITIES = ("SM80", "SM86", "SM89")
BLACKWELL = "SM120"

LIBRARY = "tensorrt_rtx"

# The first of them with FP8.
_FP8_FROM = "SM89"

WORDS = "a gate, not a proof: TensorRT for RTX built these; TensorRT on a Jetson or a Hopper is another product"


def capabilities_of(build: Build) -> tuple[str, ...]:
    """Those that can run its codes: of FP8 only the newer ones, of FP4 the newest."""
    schemes = " ".join(entry["scheme"] for entry in build.manifest.data["stages"].values())
    if "nvfp4" in schemes:
        return (BLACKWELL,)
    return (_FP8_FROM,) if "fp8" in schemes else CAPABILITIES


def check_graphs(
    build: Build,
    capabilities: tuple[str, ...],
    workspace_mb: int,
    build_engine: Callable[[EngineJob, Progress], Built],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Build every stage for each kind of GPU and throw it away: stage, capability, bytes, seconds, refused."""
    require_engines(build)
    if importlib.util.find_spec(LIBRARY) is None:
        raise BuildError(f"--check: needs TensorRT for RTX, {LIBRARY}; install it: pip install 'defaker-opt[rtx]'")
    session, stages = open_session(build), list(build.manifest.data["stages"])
    rows: list[dict[str, Any]] = []
    for stage in stages:
        ranges = stage_ranges(sizes_of(session), stage)
        for capability in capabilities:
            done = len(rows) / (len(stages) * len(capabilities))
            what, size = f"build {stage} for {capability}", 1 / (len(stages) * len(capabilities))
            progress(what, done)
            job = EngineJob(build.folder / f"{stage}.onnx", None, ranges, workspace_mb, LIBRARY, capability)
            built = build_engine(job, part_named(progress, what, done, size))
            rows.append({"stage": stage, "capability": capability, **vars(built), "refused": list(built.refused)})
    return rows


def require_engines(build: Build) -> None:
    """Raise BuildError if a build's graphs are not written for engines."""
    target = build.manifest.data["target"]
    if target["backend"] != BACKEND:
        raise BuildError(
            f"{build.folder}: made for target {target['name']}, which {target['backend']} runs without engines; "
            "make one for a GPU, for example: defaker-opt quantize --recipe jetson-int8"
        )
