"""How long one image takes alone: rows are judged by workers that share the cores, so their times are longer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from defaker_opt.benchmarks import Benchmark
from defaker_opt.drift.judge import judge_task
from defaker_opt.drift.perturbations import NONE
from defaker_opt.drift.rows import ImageRow
from defaker_opt.drift.run import read_task
from defaker_opt.errors import SuiteError
from defaker_opt.limits import LatencyLimit
from defaker_opt.machine import available_cores
from defaker_opt.progress import Progress
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.session import open_session

IMAGES = 20


@dataclass(frozen=True)
class Latency:
    """Median milliseconds from end to end over so many images, mask always made, with this many threads."""

    median_ms: float
    max_ms: float
    images: int
    threads: int

    @property
    def broken(self) -> bool:
        """Whether it is above the limit."""
        return self.median_ms > self.max_ms


def measure_latency(build: Build, suite: Benchmark, limit: LatencyLimit, progress: Progress) -> Latency:
    """Judge the first images of a suite one by one, on all cores; the first one twice, to open the stages.

    Raises SuiteError if none of them can be judged.
    """
    threads = available_cores()
    session = open_session(build, threads)
    chosen = suite.items[:IMAGES]
    times = []
    for number, item in enumerate((*chosen[:1], *chosen)):
        outcome = judge_task(session, read_task(item, NONE))
        if number and isinstance(outcome, ImageRow):
            times.append(outcome.latency_ms["total"])
        progress("measure latency", (number + 1) / (len(chosen) + 1))
    if not times:
        raise SuiteError(f"{suite.name}: not one of the first {len(chosen)} images could be judged for the latency")
    return Latency(statistics.median(times), limit.max, len(times), threads)
