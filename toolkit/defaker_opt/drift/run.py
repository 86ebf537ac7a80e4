"""Benchmarks through a build: what the cache lacks is judged by workers, then rows are read in the items' order."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from defaker_opt.benchmarks import Benchmark, Item
from defaker_opt.benchmarks.members import read_bytes
from defaker_opt.catalog import PACKAGE
from defaker_opt.drift.cache import RowCache, open_cache
from defaker_opt.drift.engines import Numbered, find_engine
from defaker_opt.drift.judge import Task
from defaker_opt.drift.perturbations import NONE
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.errors import DefakerError, SuiteError
from defaker_opt.machine import available_cores
from defaker_opt.progress import Progress
from defaker_opt.runtime.build import Build

# What else, beside the build, decides a row.
_LIBRARIES = ("numpy", "pillow", "scipy", "onnxruntime")
_CODE = ("runtime/**/*.py", "drift/judge.py", "drift/rows.py", "drift/perturbations.py", "drift/picture_hash.py")

# A worker holds its build's weights about twice while stages are opened; this much of the memory may go to them.
_COPIES, _MEMORY_SHARE, _WORKER_BYTES = 2, 0.6, 300_000_000


@dataclass(frozen=True)
class Crew:
    """Who judges. threads: of each worker's stages; rows are kept apart by it, as it may change rounding."""

    engine: str
    workers: int
    threads: int


@dataclass(frozen=True)
class Run:
    """A benchmark under one perturbation ("none" for the pictures as they are)."""

    benchmark: Benchmark
    perturbation: str = NONE


@dataclass(frozen=True)
class JudgedRun:
    """One run through one build; iterating reads rows from disk, in the order of the items, as often as one likes."""

    run: Run
    cache: RowCache = field(repr=False)
    digests: tuple[bytes, ...] = field(repr=False)
    problems: Mapping[int, Problem]

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[ImageRow | Problem]:
        for index, (item, digest) in enumerate(zip(self.run.benchmark.items, self.digests, strict=True)):
            yield self.problems.get(index) or self.cache.read(digest, item.key, item.label)


def asked_crew(engine: str, workers: int, threads: int) -> Crew:
    """What the user asks for; 0 leaves a number to `fitted_crew`. Raises DefakerError for what cannot be."""
    find_engine(engine)
    for name, value in (("--workers", workers), ("--threads", threads)):
        if value < 0:
            raise DefakerError(f"{name}: must be 0 or more, got {value}")
    return Crew(engine, workers, threads)


def fitted_crew(asked: Crew, builds: Iterable[Build]) -> Crew:
    """A worker a core with one thread each, or fewer if the largest build would not fit into memory so often.

    One thread a worker wastes least; it stays one if fewer workers are asked for, so that rows stay the same.
    """
    if asked.workers:
        return replace(asked, threads=asked.threads or 1)
    cores = available_cores()
    build_bytes = max(sum(path.stat().st_size for path in build.folder.iterdir()) for build in builds)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fitting = int(memory * _MEMORY_SHARE // (_COPIES * build_bytes + _WORKER_BYTES))
    workers = max(1, min(cores // (asked.threads or 1), fitting))
    return replace(asked, workers=workers, threads=asked.threads or max(1, cores // workers))


def judge_runs(
    build: Build, runs: Sequence[Run], cache_folder: Path, crew: Crew, progress: Progress
) -> tuple[JudgedRun, ...]:
    """Judge what no earlier call has judged. A killed call loses the pictures in hand, nothing else.

    What cannot be read or judged becomes a Problem in its row's place. Raises DefakerError if the cache cannot be
    written, a worker dies, or not one picture could be judged.
    """
    cache = open_cache(cache_folder, row_owner(build, crew.threads))
    ledger = _Ledger(cache, runs, functools.partial(progress, f"judge {build.folder.name}"))
    for number, outcome in find_engine(crew.engine).judge_tasks(build, crew.workers, crew.threads, ledger.missing()):
        ledger.keep_(number, outcome)
    if len(ledger.problems) == ledger.total:
        raise SuiteError(f"not one picture could be judged; the first: {ledger.problems[0]}")
    return tuple(ledger.judged())


class _Ledger:
    """Which rows there are, and what is in the making; items of all runs are numbered through."""

    def __init__(self, cache: RowCache, runs: Sequence[Run], progress: Callable[[float], None]) -> None:
        self.cache, self.runs, self.progress = cache, runs, progress
        self.total = sum(len(run.benchmark.items) for run in runs)
        self.digests: list[bytes] = []
        self.problems: dict[int, Problem] = {}
        self.done = 0

    def missing(self) -> Iterator[Numbered]:
        """Tasks for what has no row yet."""
        for run in self.runs:
            for item in run.benchmark.items:
                number = len(self.digests)
                try:
                    task = read_task(item, run.perturbation)
                except SuiteError as error:
                    self.digests.append(b"")
                    self._settle_(number, Problem(item.key, str(error)))
                    continue
                self.digests.append(task.digest)
                if task.digest in self.cache:
                    self._settle_(number, None)
                else:
                    yield number, task

    def keep_(self, number: int, outcome: ImageRow | Problem) -> None:
        """Keep what became of a task."""
        if isinstance(outcome, ImageRow):
            self.cache.append_(self.digests[number], outcome)
            self._settle_(number, None)
        else:
            self._settle_(number, outcome)

    def _settle_(self, number: int, problem: Problem | None) -> None:
        if problem:
            self.problems[number] = problem
        self.done += 1
        self.progress(self.done / self.total)

    def judged(self) -> Iterator[JudgedRun]:
        """The runs with their rows, once nothing is missing."""
        start = 0
        for run in self.runs:
            stop = start + len(run.benchmark.items)
            problems = {number - start: self.problems[number] for number in self.problems if start <= number < stop}
            yield JudgedRun(run, self.cache, tuple(self.digests[start:stop]), problems)
            start = stop


def read_task(item: Item, perturbation: str) -> Task:
    """An item with its files read. Raises SuiteError if one is missing."""
    mask = read_bytes(item.mask) if item.mask is not None else None
    return Task(item.key, item.label, read_bytes(item.image), mask, item.mask_rule, perturbation)


def sample_runs(runs: Iterable[Run], count: int) -> tuple[Run, ...]:
    """The same runs with at most `count` items each, drawn alike every time: what the noise floor is measured on."""
    return tuple(replace(run, benchmark=_sampled(run.benchmark, count)) for run in runs)


def _sampled(benchmark: Benchmark, count: int) -> Benchmark:
    if len(benchmark.items) <= count:
        return benchmark
    chosen = sorted(random.Random(0).sample(range(len(benchmark.items)), count))  # noqa: S311 - no secret
    return replace(benchmark, items=tuple(benchmark.items[index] for index in chosen))


def other_threads(crew: Crew) -> Crew:
    """A crew with another number of threads, whose rounding may differ: against it the noise floor is seen."""
    if crew.threads > 1:
        return replace(crew, threads=1)
    return replace(crew, threads=2, workers=max(1, crew.workers // 2))


def row_owner(build: Build, threads: int) -> dict[str, Any]:
    """Everything beside the picture that decides a row; rows of another owner are never used."""
    code = b"".join(path.read_bytes() for pattern in _CODE for path in sorted(PACKAGE.glob(pattern)))
    return {
        "build": build.digest,
        "threads": threads,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "code": hashlib.sha256(code).hexdigest(),
        "processor": _processor(),
    }


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Products of 8-bit numbers are rounded differently by older processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
