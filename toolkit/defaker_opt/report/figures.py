"""Every metric of both builds on one set of pictures, with the interval of its drop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from defaker_opt.errors import DefakerError
from defaker_opt.limits import LIMITABLE, Limit
from defaker_opt.report.columns import column
from defaker_opt.report.evidence import Evidence
from defaker_opt.report.values import Check, Figure, Flips
from defaker_opt.statistics import Interval
from defaker_opt.statistics.auc import compare_auc
from defaker_opt.statistics.clusters import Clusters
from defaker_opt.statistics.crossing import limit_test
from defaker_opt.statistics.decision import decide, decide_interval, is_implausible_gain, two_sided
from defaker_opt.statistics.intervals import clopper_pearson_upper
from defaker_opt.statistics.paired_proportions import PairedCounts, count_pairs, mcnemar_exact, tango_interval
from defaker_opt.statistics.sample_size import images_needed
from defaker_opt.statistics.spread import (
    FEWEST_CARRIERS,
    Spread,
    deciding_interval,
    more_needed,
    spread_interval,
    spread_of,
)

# All metrics in the order of the tables; `mask_area` shows a bias and cannot be limited.
METRICS = (*LIMITABLE, "mask_area")
POWER = 0.8


@dataclass(frozen=True)
class Sample:
    """Pictures, which of them are not independent, and each build's threshold of the probability of forged."""

    evidence: Evidence
    clusters: Clusters
    thresholds: tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """Figures that could be computed, and the reasons why others could not."""

    figures: tuple[Figure, ...]
    missing: tuple[str, ...]


def measure(sample: Sample, limits: Mapping[str, Limit], only: Iterable[str] = METRICS) -> Measured:
    """Metrics, all unless said, with their intervals; those with a limit are checked against it."""
    figures, missing = [], []
    for metric in only:
        try:
            figures.append(_figure(metric, sample, limits.get(metric)))
        except DefakerError as error:
            missing.append(f"{metric}: {error}")
    return Measured(tuple(figures), tuple(missing))


def count_flips(sample: Sample) -> Flips:
    """Flips, with an upper bound that counts clusters as often as they deserve."""
    evidence = sample.evidence
    flipped, n = evidence.flipped, len(evidence)
    counts = count_pairs(flipped, np.zeros(n, bool), sample.clusters.index)
    seen, trials = math.ceil(counts.losses), max(1, math.floor(counts.pictures))
    right, build_right = evidence.right(evidence.reference), evidence.right(evidence.build)
    return Flips(
        flips=int(flipped.sum()),
        n=n,
        rate=float(flipped.mean()),
        upper=clopper_pearson_upper(min(seen, trials), trials),
        losses=int((right & ~build_right).sum()),
        gains=int((~right & build_right).sum()),
    )


def _figure(metric: str, sample: Sample, limit: Limit | None) -> Figure:
    if metric == "verdict_accuracy":
        return accuracy_figure(sample, limit)
    if metric == "verdict_auc":
        return _auc_figure(sample, limit)
    return _spread_figure(metric, sample, limit)


def accuracy_figure(sample: Sample, limit: Limit | None) -> Figure:
    """Accuracy by counts of pictures that only one build gets right."""
    evidence = sample.evidence
    right = evidence.right(evidence.reference), evidence.right(evidence.build)
    counts = count_pairs(*right, sample.clusters.index)
    interval = tango_interval(counts)
    losses, gains = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    p = mcnemar_exact(losses, gains)
    return Figure(
        metric="verdict_accuracy",
        better="higher",
        n=len(evidence),
        clusters=counts.clusters,
        reference=float(right[0].mean()),
        build=float(right[1].mean()),
        drop=(losses - gains) / len(evidence),
        low=interval.low,
        high=interval.high,
        method=f"Tango score, design effect {counts.design_effect:.2f}; {losses} lost, {gains} gained, "
        f"McNemar exact p = {p:.3g}",
        check=_check_counts(counts, interval, limit) if limit else None,
    )


def _check_counts(counts: PairedCounts, interval: Interval, limit: Limit) -> Check:
    test = limit_test(counts, limit.max_drop)
    decision = decide(test, limit.confidence)
    bounds = tango_interval(counts, two_sided(limit.confidence))
    needed = None
    if decision == "UNDECIDED":
        needed = images_needed(counts, limit.max_drop, limit.confidence, POWER)
    return Check(
        max_drop=limit.max_drop,
        confidence=limit.confidence,
        decision=decision,
        low=bounds.low,
        high=bounds.high,
        images=needed.images if needed else None,
        # An exact test may miss its answer by a hair that the approximate count does not see.
        more=max(1, needed.more) if needed else None,
        answer=needed.answer if needed else "",
        implausible_gain=is_implausible_gain(interval, limit.max_drop),
    )


def _auc_figure(sample: Sample, limit: Limit | None) -> Figure:
    evidence = sample.evidence
    scores = evidence.reference["probability"], evidence.build["probability"]
    compared = compare_auc(evidence.labels, *scores, sample.clusters.index)
    if compared is None:
        raise DefakerError("needs authentic and forged images")
    check = None
    if limit:
        bounds = compare_auc(evidence.labels, *scores, sample.clusters.index, two_sided(limit.confidence))
        assert bounds is not None
        check = _check_interval(compared.spread, bounds.deciding, compared.interval, limit, len(evidence))
    return Figure(
        metric="verdict_auc",
        better="higher",
        n=len(evidence),
        clusters=compared.clusters,
        reference=compared.reference,
        build=compared.build,
        drop=compared.drop,
        low=compared.interval.low,
        high=compared.interval.high,
        method="paired DeLong, clustered (Obuchowski)",
        check=check,
    )


def _spread_figure(metric: str, sample: Sample, limit: Limit | None) -> Figure:
    figure = column(metric, sample.evidence, sample.thresholds)
    clusters = np.unique(sample.clusters.index[figure.used], return_inverse=True)[1]
    if clusters.max() == 0:
        raise DefakerError("all images are of one cluster")
    spread = spread_of(figure.drop, figure.influence, clusters)
    interval = spread_interval(spread)
    n = int(figure.used.sum())
    check = None
    if limit:
        bounds = deciding_interval(spread, two_sided(limit.confidence))
        check = _check_interval(spread, bounds, interval, limit, n)
    return Figure(
        metric=metric,
        better=figure.better,
        n=n,
        clusters=spread.clusters,
        reference=figure.reference,
        build=figure.build,
        drop=figure.drop,
        low=interval.low,
        high=interval.high,
        method=f"influences of clusters{_few_carriers(spread)}",
        check=check,
    )


def _few_carriers(spread: Spread) -> str:
    if not 0 < spread.carriers < FEWEST_CARRIERS:
        return ""
    return f"; rests on some {spread.carriers:.0f} clusters, so it may be too narrow"


def _check_interval(spread: Spread, bounds: Interval, interval: Interval, limit: Limit, n: int) -> Check:
    decision, drop = decide_interval(bounds, limit.max_drop), spread.estimate
    times = more_needed(spread, limit.max_drop, limit.confidence, POWER) if decision == "UNDECIDED" else None
    images = None if times is None else math.ceil(times * n)
    return Check(
        max_drop=limit.max_drop,
        confidence=limit.confidence,
        decision=decision,
        low=bounds.low,
        high=bounds.high,
        images=images,
        more=None if images is None else max(1, images - n),
        answer="" if images is None else "ACCEPT" if drop < limit.max_drop else "REJECT",
        implausible_gain=is_implausible_gain(interval, limit.max_drop),
    )
