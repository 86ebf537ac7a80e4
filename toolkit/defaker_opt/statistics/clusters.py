"""Which pictures belong together, and what an interval over them speaks about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from defaker_opt.statistics import Integers

# Below this many clusters, intervals over clusters were found to cover too rarely (profiling/coverage.py).
FEWEST_CLUSTERS = 20


@dataclass(frozen=True)
class Clusters:
    """index [N]: 0 … count − 1. unit: what one cluster is. note: what was passed over and why, "" if nothing was."""

    index: Integers = field(repr=False)
    count: int
    unit: str
    note: str = ""


def choose_clusters(columns: Mapping[str, Sequence[str]], fewest: int = FEWEST_CLUSTERS) -> Clusters:
    """The coarsest column with enough clusters; columns: unit → name of each picture's cluster [N], coarsest first.

    A picture without a name ("") is a cluster of its own, and single pictures are the last resort. With too few
    sources a statement about new sources cannot be made: the result is then about more pictures of these sources, and
    says so.
    """
    assert columns, "no column to choose from"
    passed_over: list[str] = []
    for unit, names in columns.items():
        index = _numbered(names)
        count = int(index.max()) + 1
        if count >= fewest:
            return Clusters(index, count, unit, _note(passed_over))
        passed_over.append(f"{count} of unit {unit}")
    pictures = len(next(iter(columns.values())))
    return Clusters(np.arange(pictures), pictures, "picture", _note(passed_over))


def _numbered(names: Sequence[str]) -> Integers:
    alone = [name or f"\0{place}" for place, name in enumerate(names)]
    return np.unique(np.array(alone, dtype=object), return_inverse=True)[1].astype(np.int64)


def _note(passed_over: list[str]) -> str:
    if not passed_over:
        return ""
    return (
        f"too few clusters to speak about others of their kind ({', '.join(passed_over)}); "
        "intervals hold for more pictures of the same ones"
    )
