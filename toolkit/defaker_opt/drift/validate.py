"""All rows that a decision needs: reference and candidate on every suite and perturbation, and the noise floor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defaker_opt.benchmarks import Benchmark
from defaker_opt.drift.compare import PairRow, join_rows
from defaker_opt.drift.leakage import find_leaks, hash_benchmark, refuse_leaks
from defaker_opt.drift.perturbations import NONE
from defaker_opt.drift.rows import Problem
from defaker_opt.drift.run import Crew, JudgedRun, Run, judge_runs, other_threads, sample_runs
from defaker_opt.errors import SuiteError
from defaker_opt.progress import Progress, part_of
from defaker_opt.runtime.build import Build


@dataclass(frozen=True)
class Plan:
    """What is compared on. perturbations: beside the pictures as they are, which are always judged.

    calibration: pictures that no test item may be; noise_images: of each suite, for the noise floor; 0 leaves it out.
    """

    suites: tuple[Benchmark, ...]
    perturbations: tuple[str, ...]
    calibration: Benchmark
    noise_images: int

    def runs(self) -> tuple[Run, ...]:
        """Every suite as it is, then under every perturbation."""
        return tuple(Run(suite, name) for name in (NONE, *self.perturbations) for suite in self.suites)


@dataclass(frozen=True)
class PairedRun:
    """One suite under one perturbation through two builds; rows are read from disk each time."""

    reference: JudgedRun
    candidate: JudgedRun

    @property
    def run(self) -> Run:
        """The suite and what was done to its pictures."""
        return self.reference.run

    def __iter__(self) -> Iterator[PairRow | Problem]:
        run = self.run
        return join_rows(run.benchmark.name, run.perturbation, run.benchmark.items, self.reference, self.candidate)


@dataclass(frozen=True)
class Comparison:
    """The candidate against the reference; and, as noise, the reference against itself with noise_threads threads."""

    reference: Build
    candidate: Build
    crew: Crew
    runs: tuple[PairedRun, ...]
    noise: tuple[PairedRun, ...]
    noise_threads: int

    def problems(self) -> tuple[str, ...]:
        """What was left out of any suite, and why, one line a picture."""
        lines: dict[str, None] = {}
        for paired in self.runs:
            name = paired.run.benchmark.name
            for problem in paired.run.benchmark.problems:
                lines[f"{name}: {problem}"] = None
            for judged in (paired.reference, paired.candidate):
                for found in judged.problems.values():
                    lines[f"{name} ({paired.run.perturbation}): {found}"] = None
        return tuple(lines)


def compare_builds(
    reference: Build, candidate: Build, plan: Plan, cache_folder: Path, crew: Crew, progress: Progress
) -> Comparison:
    """Judge everything with both builds, the reference first; rows come from the cache where it has them.

    Raises SuiteError if a calibration picture is among the test pictures, before the candidate is judged.
    """
    runs = plan.runs()
    _refuse_twice(plan.suites)
    first = judge_runs(reference, runs, cache_folder, crew, part_of(progress, 0.0, 0.45))
    _check_leakage(plan, first)
    second = judge_runs(candidate, runs, cache_folder, crew, part_of(progress, 0.45, 0.45))
    noise: tuple[PairedRun, ...] = ()
    others = other_threads(crew)
    if plan.noise_images:
        sampled = sample_runs((Run(suite) for suite in plan.suites), plan.noise_images)
        quiet = part_of(progress, 0.9, 0.1)
        same = judge_runs(reference, sampled, cache_folder, crew, lambda what, fraction: None)
        noise = tuple(map(PairedRun, same, judge_runs(reference, sampled, cache_folder, others, quiet)))
    return Comparison(reference, candidate, crew, tuple(map(PairedRun, first, second)), noise, others.threads)


def _refuse_twice(suites: tuple[Benchmark, ...]) -> None:
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise SuiteError(f"--suite {name}: given twice; rename one, so that the report can tell them apart")
    for suite in suites:
        [(key, count)] = Counter(item.key for item in suite.items).most_common(1) or [("", 0)]
        if count > 1:
            raise SuiteError(f"{suite.name}: {count} pictures have the key {key}; give each its own")


def _check_leakage(plan: Plan, judged: tuple[JudgedRun, ...]) -> None:
    hashes = hash_benchmark(plan.calibration)
    for run in judged:
        if run.run.perturbation == NONE:
            suite = run.run.benchmark
            refuse_leaks(plan.calibration, suite, find_leaks(plan.calibration, hashes, zip(suite.items, run)))
