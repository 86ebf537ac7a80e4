"""A session that notes what each stage is called with and what it answers; never while time is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from defaker_opt.runtime.backends import Tensors
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.session import Session


@dataclass(frozen=True)
class Call:
    """One call of a stage: its input arrays, the outputs that were asked for, and what came out."""

    stage: str
    tensors: Tensors
    outputs: tuple[str, ...]
    results: Mapping[str, NDArray[Any]]


@dataclass
class RecordingSession(Session):
    """Keeps every call of every stage, in their order."""

    calls: list[Call] = field(default_factory=list)

    def run(self, stage: str, tensors: Tensors, clock: Clock, outputs: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
        """See `Session`."""
        given = dict(tensors)
        results = super().run(stage, tensors, clock, outputs)
        # The session takes key/values out of what it is given, to hold them once.
        self.calls.append(Call(stage, given, tuple(results), dict(results)))
        return results


def record_calls(build: Build, image: Image.Image, gate: float, threads: int = 0) -> tuple[Call, ...]:
    """The calls of stages that judging a picture takes."""
    session = RecordingSession(build, threads)
    session.judge(image, gate)
    return tuple(session.calls)
