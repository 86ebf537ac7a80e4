"""Points of the plots: reliability, ROC and IoU by forged area."""

from __future__ import annotations

import numpy as np
from scipy import stats

from defaker_opt.benchmarks.metrics import Labels, area_under_curve, bin_members, roc
from defaker_opt.drift.compare import AREA_BINS
from defaker_opt.report.evidence import Evidence, Floats
from defaker_opt.report.values import AreaBin, Curves, Robustness

_ROC_POINTS = 200
_RELIABILITY_BINS = 10


def curves(evidence: Evidence) -> Curves:
    """All curves of both builds."""
    scores = evidence.reference["probability"], evidence.build["probability"]
    reference, build = (reliability(evidence.labels, score) for score in scores)
    first, second = (roc_points(evidence.labels, score) for score in scores)
    return Curves((reference, build), (first, second), area_bins(evidence))


def reliability(labels: Labels, probabilities: Floats) -> tuple[tuple[float, float, int], ...]:
    """Mean probability, share forged and images of each of ten bins of equal mass."""
    member = bin_members(probabilities, _RELIABILITY_BINS)
    bins = []
    for place in np.unique(member):
        inside = member == place
        bins.append((float(probabilities[inside].mean()), float(labels[inside].mean()), int(inside.sum())))
    return tuple(bins)


def roc_points(labels: Labels, probabilities: Floats) -> tuple[tuple[float, float], ...]:
    """At most 200 corners, false-positive and true-positive rate; none without a class."""
    curve = roc(labels, probabilities, np.ones((1, len(labels))))
    alarms, hits = curve.alarms[0], curve.hits[0]
    if np.isnan(alarms + hits).any():
        return ()
    chosen = np.unique(np.linspace(0, len(alarms) - 1, min(_ROC_POINTS, len(alarms))).round().astype(int))
    return tuple((float(alarms[place]), float(hits[place])) for place in chosen)


def area_bins(evidence: Evidence) -> tuple[AreaBin, ...]:
    """IoU of forged pictures by how much of them is forged, the smallest forgeries first."""
    names = evidence.slices.get("forged_area", ())
    found = []
    for _, name in AREA_BINS:
        inside = np.array([each == name for each in names])
        if not inside.any():
            continue
        sides = [side["mask_iou"][inside] for side in (evidence.reference, evidence.build)]
        n = len(sides[0])
        first, second = (float(values.mean()) for values in sides)
        halves = [_half(values) for values in sides]
        found.append(AreaBin(name, n, (first, second), (halves[0], halves[1])))
    return tuple(found)


def _half(values: Floats) -> float:
    if len(values) < 2:
        return 0.0
    return float(stats.t.isf(0.025, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def robustness(name: str, evidence: Evidence) -> Robustness:
    """Both builds on all pictures under one perturbation."""
    sides = evidence.reference, evidence.build
    ones = np.ones((1, len(evidence)))
    accuracy = [float(evidence.right(side).mean()) for side in sides]
    auc = [float(area_under_curve(evidence.labels, side["probability"], ones)[0]) for side in sides]
    masks = [_mean(side["mask_iou"]) for side in sides]
    return Robustness(
        perturbation=name,
        images=len(evidence),
        flips=int(evidence.flipped.sum()),
        accuracy=(accuracy[0], accuracy[1]),
        auc=(auc[0], auc[1]),
        mask_iou=(masks[0], masks[1]),
    )


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
