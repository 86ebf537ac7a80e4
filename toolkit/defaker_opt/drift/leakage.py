"""Is a picture that a build was calibrated on among those it is judged by? Saved again or scaled, it still counts.

Hashes find candidates among any number of pictures; a candidate counts if both, shrunk, are nearly the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from defaker_opt.benchmarks import Benchmark, Item
from defaker_opt.benchmarks.read import read_image
from defaker_opt.drift.picture_hash import hash_distances, picture_hash, sketch_correlation
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.errors import SuiteError

# Measured on our own sets: pictures saved again as JPEG 70 at 0.75 of their size differ in at most 4 bits and correlate
# at 0.989 or more; of different pictures the nearest differ in 8 bits, and correlate at 0.71.
LEAK_BITS = 8
LEAK_CORRELATION = 0.95

_SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """One picture in both sets, by key. bits: of 64, in how many their hashes differ; correlation: of both, shrunk."""

    calibration: str
    tested: str
    bits: int
    correlation: float


def hash_benchmark(benchmark: Benchmark) -> tuple[int, ...]:
    """The perceptual hash of every picture. Raises SuiteError if one cannot be read."""
    return tuple(picture_hash(read_image(item)) for item in benchmark.items)


def find_leaks(
    calibration: Benchmark, hashes: Sequence[int], tested: Iterable[tuple[Item, ImageRow | Problem]]
) -> list[Leak]:
    """Pictures of the calibration set (with their hashes) among those tested; rows bring the hashes of the latter."""
    known = np.array(hashes, np.uint64)
    leaks = []
    for item, row in tested:
        if isinstance(row, Problem) or not len(known):
            continue
        distances = hash_distances(row.picture_hash, known)
        for index in np.flatnonzero(distances <= LEAK_BITS).tolist():
            other = calibration.items[index]
            correlation = sketch_correlation(read_image(other), read_image(item))
            if correlation >= LEAK_CORRELATION:
                leaks.append(Leak(other.key, item.key, int(distances[index]), correlation))
    return leaks


def refuse_leaks(calibration: Benchmark, tested: Benchmark, leaks: Sequence[Leak]) -> None:
    """Raise SuiteError naming both pictures of each leak, if there is any."""
    if not leaks:
        return
    shown = [f"{leak.calibration} is {leak.tested} ({leak.bits} bits)" for leak in leaks[:_SHOWN]]
    more = [f"and {len(leaks) - _SHOWN} more"] if len(leaks) > _SHOWN else []
    raise SuiteError(
        f"{len(leaks)} pictures of the calibration set {calibration.name} are in the test set {tested.name} too, so it "
        f"cannot show drift; take them out of one of both: {'; '.join([*shown, *more])}"
    )
