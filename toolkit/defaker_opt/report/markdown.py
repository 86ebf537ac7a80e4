"""report.md: the report for a terminal, a pull request or an archive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from defaker_opt.report.values import DriftReport, Figure, Slice, SuiteReport
from defaker_opt.report.words import NAMES, latency_words, limit_line, limited, points, refit_words, slice_words

_TOP_SLICES = 12


def report_as_markdown(report: DriftReport) -> str:
    """The same figures as report.json, rounded."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: DriftReport) -> Iterator[str]:
    yield from (f"# {report.decision}: {report.build.name} against {report.reference.name}", "", report.summary, "")
    if report.worst:
        yield from (f"Worst slice: {slice_words(report.worst)}", "")
    for warning in report.warnings:
        yield f"- **{warning}**"
    yield from ("", "## Limits", "")
    for pair in limited(report.suites):
        yield f"- {limit_line(*pair)}"
    if report.latency:
        yield f"- {latency_words(report.latency)}"
    if report.sequential:
        yield from ("", "## Looks", "")
        for look in report.sequential.looks:
            yield f"- {look.suite}, {look.images:,} images: {look.decision}; {look.detail}"
    if report.refit:
        yield f"- {refit_words(report.refit)}"
    for suite in report.suites if len(report.suites) == 1 else (*report.suites, report.pooled):
        yield from ("", f"## {suite.name}", "", suite_words(suite), "")
        yield from figure_table(suite.figures)
    yield from ("", "## Slices", "")
    yield from _slice_table(report.slices[:_TOP_SLICES])
    if report.noise:
        flips = report.noise.flips
        yield from ("", "## Noise floor", "", f"{flips.flips} of {flips.n:,} verdicts flip.", "")
        yield from figure_table(report.noise.figures)
    yield from ("", "## How it was computed", "", *(f"- {line}" for line in report.methods))
    yield from (
        "",
        "## Left out",
        "",
        *(f"- {line}" for line in (*report.problems, *report.passed_over) or ("nothing",)),
    )


def suite_words(suite: SuiteReport) -> str:
    """What was judged, and how independent it is."""
    flips = suite.flips
    note = f"; {suite.note}" if suite.note else ""
    return (
        f"{suite.images:,} images, {suite.forged:,} forged, {suite.clusters:,} clusters of unit {suite.unit}{note}. "
        f"{flips.flips} verdicts flipped ({points(flips.rate)} %, at most {points(flips.upper)} % at 95 %): "
        f"{flips.losses} lost, {flips.gains} gained."
    )


def figure_table(figures: Sequence[Figure]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| metric | n | reference | build | drop [pp] | 95 % interval [pp] | limit [pp] | decision | method |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|---|"
    for each in figures:
        check = each.check
        limit, decision = (points(check.max_drop), check.decision) if check else ("", "")
        yield (
            f"| {NAMES[each.metric]} | {each.n} | {each.reference:.4f} | {each.build:.4f} | {points(each.drop)} | "
            f"{points(each.low)} … {points(each.high)} | {limit} | {decision} | {each.method} |"
        )


def _slice_table(slices: Sequence[Slice]) -> Iterator[str]:
    yield "| slice | metric | n | flips | reference | build | drop [pp] | 95 % interval [pp] | p (Holm) |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for each in slices:
        yield (
            f"| {each.name} | {NAMES[each.metric]} | {each.n} | {each.flips} | {each.reference:.4f} | {each.build:.4f} "
            f"| {points(each.drop)} | {points(each.low)} … {points(each.high)} | {each.p:.2g} |"
        )
