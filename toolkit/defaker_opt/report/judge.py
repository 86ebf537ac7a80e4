"""From a comparison and limits to the signed answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from defaker_opt.drift.perturbations import NONE
from defaker_opt.drift.validate import Comparison, PairedRun
from defaker_opt.errors import SuiteError
from defaker_opt.limits import Limit
from defaker_opt.report.curves import curves, robustness
from defaker_opt.report.evidence import Evidence, gather, merge
from defaker_opt.report.figures import Sample, count_flips, measure
from defaker_opt.report.slices import slice_up
from defaker_opt.report.values import (
    BuildFacts,
    DriftReport,
    Figure,
    Noise,
    SuiteReport,
)
from defaker_opt.report.words import METHODS, summary_of
from defaker_opt.runtime.build import Build
from defaker_opt.statistics.decision import decide_all


def judge(comparison: Comparison, limits: Mapping[str, Limit]) -> DriftReport:
    """Every figure, and the decision over all suites and limits. Raises SuiteError if no picture is left."""
    thresholds = threshold_of(comparison.reference), threshold_of(comparison.candidate)
    plain = {paired.run.benchmark.name: gather(paired) for paired in comparison.runs if paired.run.perturbation == NONE}
    for name, evidence in plain.items():
        if not len(evidence):
            raise SuiteError(f"{name}: not one picture was judged by both builds; the reasons: {comparison.problems()}")
    suites = tuple(report_suite(name, sample_of(each, thresholds), limits) for name, each in plain.items())
    everything = sample_of(merge(list(plain.values())), thresholds)
    pooled = suites[0] if len(suites) == 1 else report_suite("all suites", everything, limits)
    perturbed = _perturbed(comparison.runs)
    samples = {name: sample_of(evidence, thresholds) for name, evidence in perturbed.items()}
    sliced = slice_up(everything, samples, limits)
    decision = decide_all([suite.decision for suite in suites])
    warnings = (*_unjudged(suites, limits), *_implausible(suites), *_untrained(comparison))
    return DriftReport(
        decision=decision if all(_judged(suites, metric) for metric in limits) or decision == "REJECT" else "UNDECIDED",
        summary=summary_of(decision, suites),
        reference=build_facts(comparison.reference),
        build=build_facts(comparison.candidate),
        suites=suites,
        pooled=pooled,
        worst=sliced.slices[0] if sliced.slices else None,
        slices=sliced.slices,
        noise=_noise(comparison, thresholds[0]),
        robustness=tuple(robustness(name, each) for name, each in {NONE: everything.evidence, **perturbed}.items())
        if perturbed
        else (),
        curves=curves(everything.evidence),
        warnings=warnings,
        problems=comparison.problems(),
        passed_over=sliced.skipped,
        methods=METHODS,
    )


def threshold_of(build: Build) -> float:
    """Above this probability a picture is forged."""
    return float(build.manifest.data["thresholds"]["fake_probability"])


def sample_of(evidence: Evidence, thresholds: tuple[float, float]) -> Sample:
    """Evidence with its clusters."""
    return Sample(evidence, evidence.clusters(), thresholds)


def report_suite(name: str, sample: Sample, limits: Mapping[str, Limit]) -> SuiteReport:
    """All figures of one suite, and whether it is within every limit that it can be measured against."""
    measured = measure(sample, limits)
    checks = [figure.check.decision for figure in measured.figures if figure.check]
    return SuiteReport(
        name=name,
        images=len(sample.evidence),
        forged=int(sample.evidence.labels.sum()),
        unit=sample.clusters.unit,
        clusters=sample.clusters.count,
        note=sample.clusters.note,
        figures=measured.figures,
        flips=count_flips(sample),
        missing=measured.missing,
        decision=decide_all(checks),
    )


def build_facts(build: Build) -> BuildFacts:
    """What a report says of a build."""
    data = build.manifest.data
    return BuildFacts(
        name=data["recipe"]["name"],
        digest=build.digest,
        source=data["source"]["name"],
        trained=build.manifest.trained,
        bytes=sum(path.stat().st_size for path in build.folder.iterdir() if path.is_file()),
        threshold=threshold_of(build),
        temperature=float(data["thresholds"].get("temperature", 1.0)),
    )


def _perturbed(runs: Iterable[PairedRun]) -> dict[str, Evidence]:
    """All suites together under each perturbation."""
    parts: dict[str, list[Evidence]] = {}
    for paired in runs:
        if paired.run.perturbation != NONE:
            parts.setdefault(paired.run.perturbation, []).append(gather(paired))
    merged = {name: merge(each) for name, each in parts.items()}
    return {name: evidence for name, evidence in merged.items() if len(evidence)}


def _noise(comparison: Comparison, threshold: float) -> Noise | None:
    parts = [gather(paired) for paired in comparison.noise]
    evidence = merge(parts) if parts else None
    if evidence is None or not len(evidence):
        return None
    sample = sample_of(evidence, (threshold, threshold))
    figures = measure(sample, {}).figures
    return Noise(len(evidence), (comparison.crew.threads, comparison.noise_threads), figures, count_flips(sample))


def _figure(suite: SuiteReport, metric: str) -> Figure | None:
    return next((figure for figure in suite.figures if figure.metric == metric), None)


def _judged(suites: Sequence[SuiteReport], metric: str) -> bool:
    return any(_figure(suite, metric) for suite in suites)


def _unjudged(suites: Sequence[SuiteReport], limits: Mapping[str, Limit]) -> list[str]:
    lines = []
    for metric in limits:
        lacking = [suite for suite in suites if not _figure(suite, metric)]
        for suite in lacking:
            reason = next((line for line in suite.missing if line.startswith(f"{metric}:")), metric)
            lines.append(f"{suite.name}: the limit of {reason}; it is not judged here")
    return lines


def _implausible(suites: Sequence[SuiteReport]) -> list[str]:
    return [
        f"{suite.name}: {figure.metric} is better than the reference's by {-figure.drop:.2%}, surely by more than "
        "the limit; compression does not teach, so look for test images in the calibration set, a threshold fitted on "
        "them, or a reference that ran differently"
        for suite in suites
        for figure in suite.figures
        if figure.check and figure.check.implausible_gain
    ]


def _untrained(comparison: Comparison) -> list[str]:
    sides = (("reference", comparison.reference), ("build", comparison.candidate))
    names = [name for name, build in sides if not build.manifest.trained]
    if not names:
        return []
    return [f"untrained: weights of the {' and the '.join(names)} are drawn at random, so no verdict means anything"]
