"""What one build said about one picture, small enough to keep for every picture there is."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BINS = 64

# Inner edges of the bins of mask logits: 0 in the middle, 0.08 wide there, and out to ±30 for segmenters that are sure.
# Rounded, so that they are the same numbers on every machine.
_SOFTNESS, _LARGEST = 0.53, 30.0
LOGIT_EDGES: NDArray[np.float32] = np.round(
    _SOFTNESS * np.sinh(np.linspace(-1, 1, BINS - 1) * np.arcsinh(_LARGEST / _SOFTNESS)), 3
).astype(np.float32)


@dataclass(frozen=True)
class TruthCounts:
    """Pixels of the picture's own size against its ground truth.

    tp, fp, fn, tn: at the build's shipped mask threshold. forged, authentic: pixels of either ground truth by mask
    logit, [BINS]; bin i holds logits from LOGIT_EDGES[i - 1] up to but not including LOGIT_EDGES[i].
    """

    tp: int
    fp: int
    fn: int
    tn: int
    forged: tuple[int, ...]
    authentic: tuple[int, ...]

    @property
    def forged_share(self) -> float:
        """Share of the picture that is forged according to the ground truth, 0…1."""
        return (self.tp + self.fn) / (self.tp + self.fp + self.fn + self.tn)

    @property
    def iou(self) -> float | None:
        """Intersection over union of mask and ground truth; None where the ground truth is empty."""
        return self.tp / (self.tp + self.fp + self.fn) if self.tp + self.fn else None

    @property
    def f1(self) -> float | None:
        """Pixel F1 of the mask; None where the ground truth is empty."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if self.tp + self.fn else None


@dataclass(frozen=True)
class MaskFacts:
    """One predicted mask at the size of the picture as it was judged.

    width, height: px; area: forged share by the mask, 0…1; packed: `pack_mask` of the mask.
    truth: None where the picture is forged and nobody says where.
    """

    width: int
    height: int
    area: float
    packed: bytes = field(repr=False)
    truth: TruthCounts | None


@dataclass(frozen=True)
class ImageRow:
    """One picture through one build.

    label, predicted: 1 forged, 0 authentic; predicted is the build's verdict at its shipped threshold.
    verdict_logits: 8 float32 values, first the four answers that say fake.
    picture_hash: 64-bit perceptual hash of the picture before any perturbation.
    latency_ms: milliseconds by stage, and "total"; measured when the picture was judged, maybe beside other workers.
    """

    key: str
    label: Literal[0, 1]
    fake_probability: float
    predicted: Literal[0, 1]
    verdict_logits: tuple[float, ...]
    mask: MaskFacts
    picture_hash: int
    latency_ms: Mapping[str, float] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Problem:
    """An item that was left out, and why; it is counted and shown in the report."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask [height, width] as compressed bits."""
    return zlib.compress(np.packbits(mask).tobytes(), 6)


def unpack_mask(facts: MaskFacts) -> NDArray[np.bool_]:
    """The predicted mask again, bool [height, width]."""
    bits = np.frombuffer(zlib.decompress(facts.packed), np.uint8)
    return np.unpackbits(bits, count=facts.width * facts.height).astype(bool).reshape(facts.height, facts.width)


def count_truth(mask: NDArray[np.bool_], truth: NDArray[np.bool_], bins: NDArray[np.intp]) -> TruthCounts:
    """Counts of a predicted mask against the ground truth; bins: `logit_bins` of its logits; all [height, width]."""
    tp, predicted, forged = int((mask & truth).sum()), int(mask.sum()), int(truth.sum())
    by_truth = np.bincount((bins + BINS * truth).ravel(), minlength=2 * BINS).tolist()
    return TruthCounts(
        tp=tp,
        fp=predicted - tp,
        fn=forged - tp,
        tn=mask.size - predicted - forged + tp,
        forged=tuple(by_truth[BINS:]),
        authentic=tuple(by_truth[:BINS]),
    )


def logit_bins(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """The bin, 0…BINS-1, of every mask logit."""
    return np.searchsorted(LOGIT_EDGES, logits, side="right")
