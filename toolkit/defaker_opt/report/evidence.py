"""Joined rows as columns of numbers: some two hundred bytes a picture, masks and histograms left behind."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from defaker_opt.benchmarks.localization import best_f1, pixel_auc
from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.statistics.clusters import Clusters, choose_clusters

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# What is kept of each side; NaN where there is nothing to say, such as an IoU without ground truth.
SIDE = ("probability", "predicted", "mask_area", "mask_iou", "mask_f1", "mask_best_f1", "mask_pixel_auc", "latency_ms")
_OWN = ("label", "mask_agreement")


@dataclass(frozen=True)
class Evidence:
    """Pictures through both builds. reference, build: name of SIDE → [N]; labels [N] 1 forged; agreement [N].

    slices: dimension → value of each picture, "" where it has none. Fresh rows and those of several suites look alike.
    """

    labels: NDArray[np.int64] = field(repr=False)
    agreement: Floats = field(repr=False)
    reference: Mapping[str, Floats] = field(repr=False)
    build: Mapping[str, Floats] = field(repr=False)
    photographs: tuple[str, ...] = field(repr=False)
    pairs: tuple[str, ...] = field(repr=False)
    slices: Mapping[str, tuple[str, ...]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def flipped(self) -> Bools:
        """Where the builds disagree on the verdict, [N]."""
        differ: Bools = self.reference["predicted"] != self.build["predicted"]
        return differ

    def right(self, side: Mapping[str, Floats]) -> Bools:
        """Where a side's verdict is right, [N]."""
        right: Bools = side["predicted"] == self.labels
        return right

    def clusters(self) -> Clusters:
        """What is independent: photographs if there are enough, else pairs of twins, else pictures."""
        return choose_clusters({"photograph": self.photographs, "pair": self.pairs})

    def clusters_by(self, unit: str) -> Clusters:
        """Clusters of a unit that was chosen on more pictures than these."""
        columns = {"photograph": self.photographs, "pair": self.pairs, "picture": ("",) * len(self)}
        return choose_clusters({unit: columns[unit]}, fewest=1)

    def where(self, chosen: Bools) -> Evidence:
        """Only the chosen pictures, bool [N]."""
        places = np.flatnonzero(chosen).tolist()
        return Evidence(
            self.labels[chosen],
            self.agreement[chosen],
            {name: values[chosen] for name, values in self.reference.items()},
            {name: values[chosen] for name, values in self.build.items()},
            tuple(self.photographs[place] for place in places),
            tuple(self.pairs[place] for place in places),
            {name: tuple(values[place] for place in places) for name, values in self.slices.items()},
        )


def gather(rows: Iterable[PairRow | Problem]) -> Evidence:
    """Read rows once, in their order; what was left out stays out. Sources and pairs of two suites are never one."""
    numbers = array("d")
    photographs: list[str] = []
    pairs: list[str] = []
    slices: dict[str, list[str]] = {}
    count = 0
    for row in rows:
        if isinstance(row, Problem):
            continue
        numbers.extend((row.label, row.mask_agreement, *_side(row.reference), *_side(row.candidate)))
        photographs.append(sys.intern(f"{row.benchmark}/{row.source}") if row.source else "")
        pairs.append(sys.intern(f"{row.benchmark}/{row.pair}") if row.pair else "")
        for name, value in {"suite": row.benchmark, **row.slices}.items():
            slices.setdefault(name, [""] * count).append(sys.intern(value))
        count += 1
        for values in slices.values():
            values.extend([""] * (count - len(values)))
    return _from_numbers(numbers, photographs, pairs, slices)


def merge(parts: Sequence[Evidence]) -> Evidence:
    """Several suites as one."""
    names = dict.fromkeys(name for part in parts for name in part.slices)
    return Evidence(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.agreement for part in parts]),
        {name: np.concatenate([part.reference[name] for part in parts]) for name in SIDE},
        {name: np.concatenate([part.build[name] for part in parts]) for name in SIDE},
        tuple(name for part in parts for name in part.photographs),
        tuple(name for part in parts for name in part.pairs),
        {name: tuple(v for part in parts for v in part.slices.get(name, ("",) * len(part))) for name in names},
    )


def _from_numbers(
    numbers: array[float], photographs: list[str], pairs: list[str], slices: Mapping[str, list[str]]
) -> Evidence:
    width = len(_OWN) + 2 * len(SIDE)
    table = np.frombuffer(numbers, np.float64).reshape(-1, width).T if len(numbers) else np.zeros((width, 0))
    sides = table[len(_OWN) :].reshape(2, len(SIDE), -1)
    reference, build = ({name: side[place].copy() for place, name in enumerate(SIDE)} for side in sides)
    frozen = {name: tuple(values) for name, values in slices.items()}
    return Evidence(
        table[0].astype(np.int64), table[1].copy(), reference, build, tuple(photographs), tuple(pairs), frozen
    )


def _side(row: ImageRow) -> tuple[float, ...]:
    facts, latency = row.mask, row.latency_ms["total"]
    truth = facts.truth
    found: tuple[float | None, ...] = (None,) * 4
    # An authentic picture has nothing to find, so figures of masks are of forged pictures.
    if truth is not None and truth.tp + truth.fn:
        histogram = np.array([truth.authentic, truth.forged])
        found = (truth.iou, truth.f1, best_f1(histogram), pixel_auc(histogram))
    masks = (np.nan if value is None else value for value in found)
    return (row.fake_probability, row.predicted, facts.area, *masks, latency)
