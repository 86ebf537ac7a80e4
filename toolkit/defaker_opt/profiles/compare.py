"""Which stage changed between two builds that ran in turns, or between two results that were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defaker_opt.errors import DefakerError
from defaker_opt.profiles.measure import Sample
from defaker_opt.profiles.ratios import CONFIDENCE, Ratio, difference_interval, paired_ratio, unpaired_ratio

TOTAL = "total"
# A stage of less than this share of the whole is too short to be blamed for anything.
_SMALLEST_SHARE = 0.005
# Two runs of one build differ by this much from day to day on a shared machine, which no interval of one run knows.
DIFF_TOLERANCE = 0.03


@dataclass(frozen=True)
class Change:
    """What one stage, or the whole, changed: second against first. Milliseconds an image, with an interval.

    The stages' intervals are wide enough that all hold together at CONFIDENCE. sure: whether the ratio's excludes 1,
    as its signed ranks see more than the mere signs behind the interval in milliseconds, and are as right.
    """

    stage: str
    first_ms: float
    second_ms: float
    ratio: Ratio
    difference_ms: float
    low_ms: float
    high_ms: float

    @property
    def sure(self) -> bool:
        """Whether the interval of the ratio excludes 1."""
        return self.ratio.differs


@dataclass(frozen=True)
class Comparison:
    """total: the whole image. stages: each of them. attributed: the stage that surely changed most, or ""."""

    total: Change
    stages: tuple[Change, ...]
    attributed: str


def compare_samples(first: Sequence[Sample], second: Sequence[Sample]) -> Comparison:
    """Compare two builds from samples that were taken in turns: equal rounds and images are pairs."""
    pairs = [(a.latency_ms, b.latency_ms) for a, b in zip(first, second)]
    assert all((a.round, a.image) == (b.round, b.image) for a, b in zip(first, second)), "samples are no pairs"
    names = [name for name in stage_names([*first, *second]) if all(name in a and name in b for a, b in pairs)]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(names))
    stages = tuple(_change(name, pairs, confidence) for name in names)
    return Comparison(_change(TOTAL, pairs, CONFIDENCE), stages, _most_changed(stages))


def stage_names(samples: Sequence[Sample]) -> list[str]:
    """Every stage that ran, the costliest first; opening stages is not one of them."""
    spent: dict[str, float] = {}
    for sample in samples:
        for name, value in sample.latency_ms.items():
            if name not in (TOTAL, "load"):
                spent[name] = spent.get(name, 0.0) + value
    return sorted(spent, key=lambda name: -spent[name])


def _change(name: str, pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], confidence: float) -> Change:
    first, second = [a[name] for a, _ in pairs], [b[name] for _, b in pairs]
    difference, low, high = difference_interval(first, second, confidence)
    ratio = paired_ratio(first, second, confidence)
    return Change(name, float(np.median(first)), float(np.median(second)), ratio, difference, low, high)


def _most_changed(stages: Sequence[Change]) -> str:
    whole = sum(change.first_ms for change in stages)
    sure = [change for change in stages if change.sure and change.first_ms >= _SMALLEST_SHARE * whole]
    return max(sure, key=lambda change: abs(change.difference_ms)).stage if sure else ""


@dataclass(frozen=True)
class Difference:
    """One stage of two kept results. regressed: surely slower by more than DIFF_TOLERANCE."""

    stage: str
    first_ms: float
    second_ms: float
    ratio: Ratio
    regressed: bool


@dataclass(frozen=True)
class Diff:
    """warnings: whatever makes the two hard to compare. attributed: the regressed stage that costs most, or ""."""

    rows: tuple[Difference, ...]
    warnings: tuple[str, ...]
    attributed: str

    @property
    def regressed(self) -> bool:
        """Whether anything is slower."""
        return any(row.regressed for row in self.rows)


def diff_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> Diff:
    """Compare two results as `--json` writes them. Raises DefakerError if pictures or gate differ."""
    for key in ("images", "gate"):
        if first["settings"][key] != second["settings"][key]:
            raise DefakerError(
                f"--diff: the results differ in {key} ({first['settings'][key]} and {second['settings'][key]}), so "
                "their milliseconds are not of the same work; profile both alike"
            )
    one, other = (_by_stage(result["samples"]) for result in (first, second))
    rows = []
    for name in [name for name in one if name in other]:
        ratio = unpaired_ratio(one[name], other[name])
        medians = float(np.median(one[name])), float(np.median(other[name]))
        rows.append(Difference(name, *medians, ratio, ratio.low > 1 + DIFF_TOLERANCE))
    stages = [row for row in rows if row.regressed and row.stage != TOTAL]
    whole = sum(row.first_ms for row in rows if row.stage != TOTAL)
    large = [row for row in stages if row.first_ms >= _SMALLEST_SHARE * whole]
    blamed = max(large, key=lambda row: row.second_ms - row.first_ms).stage if large else ""
    return Diff(tuple(rows), tuple(_warnings(first, second)), blamed)


def _by_stage(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds of each stage in the order they were taken, "total" first."""
    names = dict.fromkeys([TOTAL, *(name for sample in samples for name in sample["latency_ms"] if name != "load")])
    return {
        name: [sample["latency_ms"][name] for sample in samples]
        for name in names
        if all(sample["latency_ms"].get(name) for sample in samples)
    }


def _warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    warnings = []
    for key in ("processor", "cores", "power_mode", "jetson"):
        if first["machine"][key] != second["machine"][key]:
            warnings.append(f"other machine: {key} {first['machine'][key]!r}, then {second['machine'][key]!r}")
    for name in sorted({*first["machine"]["versions"]} & {*second["machine"]["versions"]}):
        before, after = first["machine"]["versions"][name], second["machine"]["versions"][name]
        if before != after:
            warnings.append(f"{name} {before}, then {after}")
    if first.get("peaks") and second.get("peaks"):
        for kind, rate in first["peaks"]["rates"].items():
            change = second["peaks"]["rates"][kind] / rate
            if abs(change - 1) > 0.05:
                warnings.append(f"the machine itself did {kind} products at {change:.0%} of the earlier rate")
    return warnings
