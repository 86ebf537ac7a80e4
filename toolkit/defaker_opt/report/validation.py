"""Everything that `validate` does between its options and its exit code."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from defaker_opt.benchmarks import Benchmark
from defaker_opt.drift.cache import empty_cache
from defaker_opt.drift.latency import measure_latency
from defaker_opt.drift.perturbations import parse_perturbations
from defaker_opt.drift.reference import open_reference
from defaker_opt.drift.run import asked_crew, fitted_crew, other_threads, row_owner
from defaker_opt.drift.suites import load_suite
from defaker_opt.drift.validate import Comparison, Plan, compare_builds
from defaker_opt.limits import LatencyLimit, Limit
from defaker_opt.progress import Progress, part_of
from defaker_opt.report.judge import judge
from defaker_opt.report.refit import refit
from defaker_opt.report.sequential import Stopped, run_looks
from defaker_opt.report.values import DriftReport, SuiteReport
from defaker_opt.report.words import latency_words, summary_of
from defaker_opt.runtime.build import Build
from defaker_opt.statistics.decision import decide_all


@dataclass(frozen=True)
class Request:
    """What to compare on. refit: a calibration suite to fit thresholds on, "" for none; cache: the folder of rows.

    rows: whether rows of earlier runs count; latency: of the candidate alone, None for no limit.
    """

    suites: tuple[str, ...]
    data: Path | None
    perturb: tuple[str, ...]
    calibration: str
    noise_images: int
    refit: str
    cache: Path
    rows: Literal["kept", "fresh"] = "kept"
    latency: LatencyLimit | None = None


@dataclass(frozen=True)
class Hands:
    """Who judges, as asked for; see `drift.run.Crew`."""

    engine: str
    workers: int
    threads: int


@dataclass(frozen=True)
class Validated:
    """The answer, and the rows it rests on."""

    report: DriftReport
    comparison: Comparison


def validate_build(
    candidate: Build, reference: str, request: Request, hands: Hands, limits: Mapping[str, Limit], progress: Progress
) -> Validated:
    """Judge all pictures of all suites with both builds, and decide. Raises DefakerError."""
    compare, plan = _prepare(candidate, reference, request, hands, progress)
    comparison = compare(plan)
    done = _with_refit(Validated(judge(comparison, limits), comparison), compare, request, progress)
    return _with_latency(done, candidate, request, progress)


def validate_early(
    candidate: Build, reference: str, request: Request, hands: Hands, limits: Mapping[str, Limit], progress: Progress
) -> Validated:
    """The same look by look, stopping when the answer is clear. Raises DefakerError."""
    compare, plan = _prepare(candidate, reference, request, hands, progress)
    bare = dataclasses.replace(plan, perturbations=(), noise_images=0)
    stopped = run_looks(plan.suites, limits, lambda suites: compare(dataclasses.replace(bare, suites=suites)))
    comparison = compare(dataclasses.replace(plan, suites=stopped.suites))
    report = _as_decided(judge(comparison, limits), stopped, len(plan.suites))
    done = _with_refit(Validated(report, comparison), compare, request, progress)
    return _with_latency(done, candidate, request, progress)


Compare = functools.partial[Comparison]


def _prepare(
    candidate: Build, reference: str, request: Request, hands: Hands, progress: Progress
) -> tuple[Compare, Plan]:
    # What is cheap to check is checked before a picture is drawn.
    asked = asked_crew(hands.engine, hands.workers, hands.threads)
    perturbations = parse_perturbations(request.perturb)
    loading = part_of(progress, 0.0, 0.05)
    suites = tuple(load_suite(name, request.data, request.cache, loading) for name in request.suites)
    calibration = load_suite(request.calibration, request.data, request.cache, loading)
    if request.refit not in ("", request.calibration):
        other = load_suite(request.refit, request.data, request.cache, loading)
        calibration = Benchmark(f"{calibration.name} and {other.name}", calibration.items + other.items)
    compared_with = open_reference(reference, request.cache, part_of(progress, 0.05, 0.05))
    crew = fitted_crew(asked, (candidate, compared_with))
    if request.rows == "fresh":
        for build, threads in itertools.product(
            (candidate, compared_with), (crew.threads, other_threads(crew).threads)
        ):
            empty_cache(request.cache, row_owner(build, threads))
    plan = Plan(suites, perturbations, calibration, request.noise_images)

    def compare(wanted: Plan) -> Comparison:
        return compare_builds(compared_with, candidate, wanted, request.cache, crew, part_of(progress, 0.1, 0.85))

    return functools.partial(compare), plan


def _with_refit(done: Validated, compare: Compare, request: Request, progress: Progress) -> Validated:
    if not request.refit:
        return done
    suite = load_suite(request.refit, request.data, request.cache, part_of(progress, 0.95, 0.01))
    rows = compare(Plan((suite,), (), Benchmark("nothing", ()), 0))
    return dataclasses.replace(done, report=dataclasses.replace(done.report, refit=refit(rows, suite.name)))


def _with_latency(done: Validated, candidate: Build, request: Request, progress: Progress) -> Validated:
    """Measured when nothing else is judged; a build that is too slow is rejected whatever it says."""
    if request.latency is None:
        return done
    suite = done.comparison.runs[0].run.benchmark
    latency = measure_latency(candidate, suite, request.latency, part_of(progress, 0.97, 0.03))
    report = dataclasses.replace(done.report, latency=latency)
    if latency.broken:
        slow = f"Too slow: {latency_words(latency)}. {report.summary}"
        report = dataclasses.replace(report, decision="REJECT", summary=slow)
    return dataclasses.replace(done, report=report)


def _as_decided(report: DriftReport, stopped: Stopped, planned: int) -> DriftReport:
    """The answers of the looks in the place of those that a single look would give."""
    suites = tuple(_as_settled(suite, stopped) for suite in report.suites)
    decisions = [suite.decision for suite in suites]
    # A suite that was not reached has no answer.
    decision = decide_all(decisions) if len(suites) == planned or "REJECT" in decisions else "UNDECIDED"
    saved = f"Stopped after {stopped.report.judged:,} of {stopped.report.planned:,} images. "
    return dataclasses.replace(
        report,
        decision=decision,
        summary=saved + summary_of(decision, suites),
        suites=suites,
        pooled=suites[0] if len(suites) == 1 else report.pooled,
        sequential=stopped.report,
        methods=(
            *report.methods,
            f"Sequential: at most {stopped.report.declared} looks, declared beforehand, images in random order, twins "
            "together; error is spent over the looks for accuracy (Lan and DeMets), and shared evenly among them for "
            "other limits. Intervals are those of the images judged, as if no earlier look had been made.",
        ),
    )


def _as_settled(suite: SuiteReport, stopped: Stopped) -> SuiteReport:
    settled = stopped.decisions[suite.name]
    figures = tuple(
        dataclasses.replace(figure, check=dataclasses.replace(figure.check, decision=settled[figure.metric]))
        if figure.check
        else figure
        for figure in suite.figures
    )
    return dataclasses.replace(suite, figures=figures, decision=decide_all(list(settled.values())))
