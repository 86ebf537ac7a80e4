"""Parts of the pictures, each compared on its own, and corrected for how many there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from defaker_opt.errors import DefakerError
from defaker_opt.limits import Limit
from defaker_opt.report.columns import column
from defaker_opt.report.figures import Sample
from defaker_opt.report.values import Slice
from defaker_opt.statistics.clusters import Clusters
from defaker_opt.statistics.decision import holm
from defaker_opt.statistics.paired_proportions import count_pairs, score_tail, tango_interval, tango_score
from defaker_opt.statistics.spread import spread_interval, spread_of, spread_p

# A slice of fewer pictures says nothing; a dimension of more values, such as one photograph each, is no dimension.
FEWEST_IMAGES = 10
MOST_VALUES = 40
WORSE_P = 0.05


@dataclass(frozen=True)
class Sliced:
    """Slices, the most surely worse first; skipped: those that were not looked at, and why."""

    slices: tuple[Slice, ...]
    skipped: tuple[str, ...]


def slice_up(sample: Sample, perturbed: Mapping[str, Sample], limits: Mapping[str, Limit]) -> Sliced:
    """Every value of every dimension, both labels, and all pictures under each perturbation.

    A slice is judged by accuracy, and by the IoU of masks where it has forged pictures, against the limit of either, 0
    without one. Holm's correction is over everything that is returned.
    """
    found: list[Slice] = []
    skipped: list[str] = []
    for dimension, value, part in _parts(sample, perturbed, skipped):
        found.append(_accuracy_slice(dimension, value, part, limits))
        masks = _mask_slice(dimension, value, part, limits)
        if masks:
            found.append(masks)
    adjusted = holm([each.p for each in found]).tolist()
    corrected = [dataclasses.replace(each, p=p, worse=p <= WORSE_P) for each, p in zip(found, adjusted)]
    # Holm ties many at 1; the raw p then says which is worst.
    order = sorted(range(len(found)), key=lambda place: (found[place].p, -found[place].drop))
    return Sliced(tuple(corrected[place] for place in order), tuple(skipped))


def _parts(sample: Sample, perturbed: Mapping[str, Sample], skipped: list[str]) -> Iterator[tuple[str, str, Sample]]:
    evidence = sample.evidence
    labels = tuple("forged" if label else "authentic" for label in evidence.labels.tolist())
    for dimension, values in {"label": labels, **evidence.slices}.items():
        distinct = sorted(set(values) - {""})
        if dimension != "label" and len(distinct) < 2:
            continue
        if len(distinct) > MOST_VALUES:
            skipped.append(f"{dimension}: {len(distinct)} values, more than {MOST_VALUES}")
            continue
        for value in distinct:
            chosen = np.array([each == value for each in values])
            if chosen.sum() < FEWEST_IMAGES:
                skipped.append(f"{dimension} = {value}: {chosen.sum()} images, fewer than {FEWEST_IMAGES}")
            else:
                yield dimension, value, part_of(sample, chosen)
    for name, other in perturbed.items():
        if len(other.evidence) >= FEWEST_IMAGES:
            yield "perturbation", name, other
        else:
            skipped.append(f"perturbation = {name}: {len(other.evidence)} images, fewer than {FEWEST_IMAGES}")


def part_of(sample: Sample, chosen: np.ndarray) -> Sample:
    """Some of the pictures, clusters as they were."""
    index = np.unique(sample.clusters.index[chosen], return_inverse=True)[1].astype(np.int64)
    clusters = Clusters(index, int(index.max()) + 1, sample.clusters.unit)
    return Sample(sample.evidence.where(chosen), clusters, sample.thresholds)


def _accuracy_slice(dimension: str, value: str, part: Sample, limits: Mapping[str, Limit]) -> Slice:
    evidence = part.evidence
    right = evidence.right(evidence.reference), evidence.right(evidence.build)
    counts = count_pairs(*right, part.clusters.index)
    interval = tango_interval(counts)
    limit = _limit(limits, "verdict_accuracy")
    score = float(tango_score(counts.losses, counts.gains, counts.pictures, limit))
    return Slice(
        dimension=dimension,
        value=value,
        metric="verdict_accuracy",
        n=len(evidence),
        flips=int(evidence.flipped.sum()),
        reference=float(right[0].mean()),
        build=float(right[1].mean()),
        drop=float(right[0].mean() - right[1].mean()),
        low=interval.low,
        high=interval.high,
        limit=limit,
        p=score_tail(counts, score),
        worse=False,
    )


def _mask_slice(dimension: str, value: str, part: Sample, limits: Mapping[str, Limit]) -> Slice | None:
    try:
        figure = column("mask_iou", part.evidence, part.thresholds)
    except DefakerError:
        return None
    n = int(figure.used.sum())
    clusters = np.unique(part.clusters.index[figure.used], return_inverse=True)[1]
    if n < FEWEST_IMAGES or clusters.max() == 0:
        return None
    limit = _limit(limits, "mask_iou")
    spread = spread_of(figure.drop, figure.influence, clusters)
    interval = spread_interval(spread)
    return Slice(
        dimension=dimension,
        value=value,
        metric="mask_iou",
        n=n,
        flips=int(part.evidence.flipped[figure.used].sum()),
        reference=figure.reference,
        build=figure.build,
        drop=figure.drop,
        low=interval.low,
        high=interval.high,
        limit=limit,
        p=spread_p(spread, limit),
        worse=False,
    )


def _limit(limits: Mapping[str, Limit], metric: str) -> float:
    return limits[metric].max_drop if metric in limits else 0.0
