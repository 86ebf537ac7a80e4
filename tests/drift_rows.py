"""Rows of two builds that were never run: decisions and figures are tested on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from defaker_opt.benchmarks import Benchmark, Item, Locator
from defaker_opt.drift.cache import RowCache
from defaker_opt.drift.rows import ImageRow, MaskFacts, count_truth, logit_bins, pack_mask
from defaker_opt.drift.run import Crew, JudgedRun, Run
from defaker_opt.drift.validate import Comparison, PairedRun
from defaker_opt.runtime.build import Build, Manifest

HEIGHT, WIDTH = 12, 16

# What becomes of a reference's row in the build.
Change = Callable[[int, ImageRow], ImageRow]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Rows in memory, asked for as from a cache."""

    rows: tuple[ImageRow, ...]

    def read(self, digest: bytes, key: str, label: int) -> ImageRow:
        row = self.rows[int.from_bytes(digest, "big")]
        assert (row.key, row.label) == (key, label)
        return row


def same(place: int, row: ImageRow) -> ImageRow:
    return row


def synthetic_rows(pairs: int, seed: int = 0, spread: float = 1.0) -> tuple[ImageRow, ...]:
    """Twins, the authentic one first, of a detector that is right on some 95 % of them."""
    random = np.random.default_rng(seed)
    rows = []
    for pair in range(pairs):
        truth = np.zeros((HEIGHT, WIDTH), bool)
        side = 1 + pair % 9
        truth[1 : 1 + side, 2 : 3 + side] = True
        for label in (0, 1):
            score = random.normal(3.3 * (label - 0.5), spread)
            logits = (random.normal(-2, 1.5, truth.shape) + 4 * (truth & (label == 1))).astype(np.float32)
            rows.append(image_row(f"{pair:05d}-{label}", label, float(1 / (1 + np.exp(-score))), logits, truth))
    return tuple(rows)


def image_row(
    key: str, label: int, probability: float, logits: NDArray[np.float32], truth: NDArray[np.bool_]
) -> ImageRow:
    mask = logits > 0
    counts = count_truth(mask, truth if label else np.zeros_like(truth), logit_bins(logits))
    facts = MaskFacts(WIDTH, HEIGHT, float(mask.mean()), pack_mask(mask), counts)
    predicted = 1 if probability > 0.5 else 0
    words = (probability,) * 8
    return ImageRow(key, cast(Any, label), probability, cast(Any, predicted), words, facts, 0, {"total": 5.0})


def flip(row: ImageRow) -> ImageRow:
    """The other verdict."""
    probability = 1 - row.fake_probability
    return dataclasses.replace(row, fake_probability=probability, predicted=cast(Any, 1 - row.predicted))


def benchmark_of(rows: Sequence[ImageRow], name: str = "drawn", source: str = "one") -> Benchmark:
    items = tuple(
        Item(
            key=row.key,
            image=Locator(Path(f"{row.key}.png")),
            label=row.label,
            source=source,
            slices=MappingProxyType({"domain": ("document", "natural", "aigc")[int(row.key[:5]) % 3]}),
            pair=row.key[:5],
        )
        for row in rows
    )
    return Benchmark(name, items)


def judged(rows: Sequence[ImageRow], benchmark: Benchmark, perturbation: str = "none") -> JudgedRun:
    digests = tuple(place.to_bytes(4, "big") for place in range(len(rows)))
    return JudgedRun(Run(benchmark, perturbation), cast(RowCache, Kept(tuple(rows))), digests, {})


def paired(rows: Sequence[ImageRow], change: Change, name: str = "drawn", perturbation: str = "none") -> PairedRun:
    benchmark = benchmark_of(rows, name)
    changed = [change(place, row) for place, row in enumerate(rows)]
    return PairedRun(judged(rows, benchmark, perturbation), judged(changed, benchmark, perturbation))


def build_named(name: str, folder: Path, threshold: float = 0.5) -> Build:
    data = {
        "recipe": {"name": name},
        "source": {"name": "synthetic", "trained": True},
        "thresholds": {"fake_probability": threshold, "gate": 0.5, "mask_logit": 0.0},
    }
    return Build(folder, Manifest(data), f"{name:0<64}")


def comparison_of(runs: Sequence[PairedRun], folder: Path, noise: Sequence[PairedRun] = ()) -> Comparison:
    return Comparison(
        build_named("float32", folder),
        build_named("int8", folder),
        Crew("processes", 1, 1),
        tuple(runs),
        tuple(noise),
        2,
    )
