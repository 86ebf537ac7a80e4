"""Graphs of a build → engines for the machine at hand, with TensorRT and without torch.

<stage>.onnx ─► a process of its own: parser ─► builder ─► <stage>.engine ─► compared with ONNX Runtime ─► engines.json
                                                                  │ refused, wrong or slower
                                                                  └─► the same stage without codes, float16, float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By the name of a size that changes: the least, the usual and the most.
Range = tuple[int, int, int]
Ranges = Mapping[str, Range]


@dataclass(frozen=True)
class EngineJob:
    """One engine to build. graph: an ONNX file; output: where the engine goes, None to throw it away.

    profiles: ranges of sizes, each of which the engine is tuned for. workspace_mb: what kernels may work on.
    library: TensorRT's Python module. capability: of RTX's own builder, which needs no GPU for it, such as "SM86"; ""
    for the GPU at hand.
    """

    graph: Path
    output: Path | None
    profiles: tuple[Ranges, ...]
    workspace_mb: int
    library: str
    capability: str = ""
    timing_cache: Path | None = None
    log: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """For the process that builds it."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Built:
    """What came of a job. refused: the parser's or builder's own words, empty if there is an engine."""

    bytes: int
    seconds: float
    tensorrt: str
    refused: tuple[str, ...] = ()
