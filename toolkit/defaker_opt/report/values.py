"""What a report is made of: frozen values, whose names are the keys of report.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from defaker_opt.drift.latency import Latency
from defaker_opt.statistics.decision import Decision

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Check:
    """A figure against its limit. low, high: one-sided bounds of the drop at `confidence` each.

    images: how many it would take in all for `answer` with 80 % power, None if the drop is the limit or the answer
    is there; more: of them, beyond those at hand. implausible_gain: surely better by more than the limit.
    """

    max_drop: float
    confidence: float
    decision: Decision
    low: float
    high: float
    images: int | None
    more: int | None
    answer: str
    implausible_gain: bool


@dataclass(frozen=True)
class Figure:
    """One metric of both builds on the same n pictures, in `clusters` independent groups.

    drop: how much worse the build is, positive is a loss, whichever way is better; reference − build where neither is.
    low, high: its two-sided 95 % interval.
    """

    metric: str
    better: Better
    n: int
    clusters: int
    reference: float
    build: float
    drop: float
    low: float
    high: float
    method: str
    check: Check | None = None


@dataclass(frozen=True)
class Flips:
    """How often the builds disagree on the verdict; upper: one-sided 95 % bound of the rate."""

    flips: int
    n: int
    rate: float
    upper: float
    losses: int
    gains: int


@dataclass(frozen=True)
class SuiteReport:
    """One suite, or all of them. unit: what a cluster is; missing: metrics without a figure, with the reason."""

    name: str
    images: int
    forged: int
    unit: str
    clusters: int
    note: str
    figures: tuple[Figure, ...]
    flips: Flips
    missing: tuple[str, ...]
    decision: Decision


@dataclass(frozen=True)
class Slice:
    """A figure on part of the pictures. p: of "the drop is the limit or less", after Holm; worse: p ≤ 5 %."""

    dimension: str
    value: str
    metric: str
    n: int
    flips: int
    reference: float
    build: float
    drop: float
    low: float
    high: float
    limit: float
    p: float
    worse: bool

    @property
    def name(self) -> str:
        """Such as domain = document."""
        return f"{self.dimension} = {self.value}"


@dataclass(frozen=True)
class Noise:
    """The reference against itself with another number of threads: differences that mean nothing."""

    images: int
    threads: tuple[int, int]
    figures: tuple[Figure, ...]
    flips: Flips


@dataclass(frozen=True)
class Robustness:
    """Both builds under one perturbation, all suites together; NaN where there is nothing to say."""

    perturbation: str
    images: int
    flips: int
    accuracy: tuple[float, float]
    auc: tuple[float, float]
    mask_iou: tuple[float, float]


@dataclass(frozen=True)
class Curves:
    """Points of plots, reference and build. reliability: (mean probability, share forged, images); roc: (FPR, TPR)."""

    reliability: tuple[tuple[tuple[float, float, int], ...], tuple[tuple[float, float, int], ...]]
    roc: tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]
    area_bins: tuple[AreaBin, ...]


@dataclass(frozen=True)
class AreaBin:
    """Mean IoU of forged pictures by the share that is forged; half: of the 95 % interval of each mean."""

    name: str
    n: int
    mask_iou: tuple[float, float]
    half: tuple[float, float]


@dataclass(frozen=True)
class BuildFacts:
    """Which build it was. name: its recipe; threshold, temperature: as shipped."""

    name: str
    digest: str
    source: str
    trained: bool
    bytes: int
    threshold: float
    temperature: float


@dataclass(frozen=True)
class LookReport:
    """One look of a sequential run: pictures of the suite judged by then, and what was concluded."""

    suite: str
    images: int
    decision: Decision
    finished: bool
    detail: str


@dataclass(frozen=True)
class Sequential:
    """Looks that were declared, those that were made, and pictures that need not be judged."""

    declared: int
    looks: tuple[LookReport, ...]
    judged: int
    planned: int


@dataclass(frozen=True)
class Refit:
    """Thresholds that restore the reference's habits, from calibration pictures."""

    suite: str
    images: int
    threshold: float
    shipped_threshold: float
    reference_rate: float
    shipped_rate: float
    rate: float
    temperature: float
    temperature_note: str
    written: str


@dataclass(frozen=True)
class DriftReport:
    """Everything that the pages show. pooled: all suites together, the only one itself if there is one.

    worst: the slice that is most surely worse than the limit, None without slices. problems: pictures that were left
    out; passed_over: slices that were.
    """

    decision: Decision
    summary: str
    reference: BuildFacts
    build: BuildFacts
    suites: tuple[SuiteReport, ...]
    pooled: SuiteReport
    worst: Slice | None
    slices: tuple[Slice, ...]
    noise: Noise | None
    robustness: tuple[Robustness, ...]
    curves: Curves
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    passed_over: tuple[str, ...]
    methods: tuple[str, ...]
    sequential: Sequential | None = None
    refit: Refit | None = None
    latency: Latency | None = None
