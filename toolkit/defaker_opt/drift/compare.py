"""Reference and candidate side by side, one picture at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from defaker_opt.benchmarks import Item
from defaker_opt.drift.rows import ImageRow, MaskFacts, Problem, unpack_mask

# Upper ends of the slices by forged share, and by pixels of the picture.
AREA_BINS = ((0.005, "<0.5%"), (0.02, "0.5-2%"), (0.1, "2-10%"), (1.0, ">10%"))
RESOLUTION_BINS = ((0.25e6, "<0.25MP"), (1e6, "0.25-1MP"), (4e6, "1-4MP"), (float("inf"), ">4MP"))


@dataclass(frozen=True)
class PairRow:
    """One picture through both builds.

    perturbation: what was done to the picture before either build saw it, "none" if nothing.
    source, pair: as the item has them; slices: those of the item, `resolution` and, for forged
    pictures with ground truth, `forged_area`. mask_agreement: IoU of both masks, 1 where both are empty.
    """

    benchmark: str
    perturbation: str
    source: str
    slices: Mapping[str, str]
    reference: ImageRow
    candidate: ImageRow
    mask_agreement: float
    pair: str = ""

    @property
    def key(self) -> str:
        """The item's key; unique within its benchmark and perturbation."""
        return self.reference.key

    @property
    def label(self) -> Literal[0, 1]:
        """1 forged, 0 authentic."""
        return self.reference.label

    @property
    def flipped(self) -> bool:
        """Whether the builds disagree on the verdict."""
        return self.reference.predicted != self.candidate.predicted

    @property
    def area_bias(self) -> float:
        """How much more of the picture the candidate's mask covers, -1…1."""
        return self.candidate.mask.area - self.reference.mask.area


def join_rows(
    benchmark: str,
    perturbation: str,
    items: Iterable[Item],
    reference: Iterable[ImageRow | Problem],
    candidate: Iterable[ImageRow | Problem],
) -> Iterator[PairRow | Problem]:
    """Pair the rows of two builds, all in the order of the items; what either build left out is left out."""
    for item, first, second in zip(items, reference, candidate, strict=True):
        assert item.key == first.key == second.key
        if isinstance(first, Problem):
            yield first
        elif isinstance(second, Problem):
            yield second
        else:
            slices = MappingProxyType({**item.slices, **derived_slices(first)})
            agreement = mask_agreement(first.mask, second.mask)
            yield PairRow(benchmark, perturbation, item.source, slices, first, second, agreement, item.pair)


def derived_slices(row: ImageRow) -> dict[str, str]:
    """Slices that follow from the picture as it was judged."""
    facts, slices = row.mask, {}
    slices["resolution"] = _bin(facts.width * facts.height, RESOLUTION_BINS)
    if facts.truth is not None and facts.truth.forged_share > 0:
        slices["forged_area"] = _bin(facts.truth.forged_share, AREA_BINS)
    return slices


def _bin(value: float, bins: tuple[tuple[float, str], ...]) -> str:
    return next((name for end, name in bins if value < end), bins[-1][1])


def mask_agreement(first: MaskFacts, second: MaskFacts) -> float:
    """IoU of two predicted masks of one picture, 0…1; 1 where both are empty."""
    assert (first.width, first.height) == (second.width, second.height)
    one, other = unpack_mask(first), unpack_mask(second)
    either = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / either) if either else 1.0
