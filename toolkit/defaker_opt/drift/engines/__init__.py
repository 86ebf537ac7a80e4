"""What carries tasks to open builds and rows back. One engine a file; the file name is what `--engine` takes.

Every engine runs the same `judge_task` with the same number of threads a worker, so rows do not depend on the engine or
on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Protocol

from defaker_opt.catalog import find_module, module_names
from defaker_opt.drift.judge import Task
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.errors import DefakerError, one_of
from defaker_opt.runtime.build import Build

# A task with a number by which its outcome is known again.
Numbered = tuple[int, Task]
Outcome = tuple[int, ImageRow | Problem]


class Engine(Protocol):
    """What an engine's module offers."""

    def judge_tasks(self, build: Build, workers: int, threads: int, tasks: Iterator[Numbered]) -> Iterator[Outcome]:
        """Outcomes in any order; no more tasks are taken than workers can hold. threads: for each worker's stages."""
        ...


def thread_limits(threads: int) -> MappingProxyType[str, str]:
    """What a worker's environment must say before numpy is imported: its products would else use every core."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return MappingProxyType(dict.fromkeys(names, str(threads)))


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises DefakerError."""
    names = module_names("drift.engines")
    if name not in names:
        raise DefakerError(f"--engine {one_of(name, names)}")
    engine: Any = find_module("drift.engines", name)
    found: Engine = engine
    return found
