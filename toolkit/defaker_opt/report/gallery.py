"""Pictures whose verdict flipped, or whose mask moved most, as small pictures that a page can hold."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.benchmarks.read import read_image, read_mask
from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.perturbations import perturb
from defaker_opt.drift.rows import Problem, unpack_mask
from defaker_opt.drift.validate import PairedRun

MOST_PICTURES = 24
_SIDE = 176  # px, the longer one
_QUALITY = 82
_TINT = np.array([235, 60, 50])


@dataclass(frozen=True)
class Picture:
    """One row of the gallery. images: photo, ground truth, the reference's mask, the build's, each a data URI.

    The ground truth is "" where nobody says what is forged.
    """

    name: str
    label: int
    flipped: bool
    probabilities: tuple[float, float]
    agreement: float
    slices: str
    images: tuple[str, str, str, str]


def pick_pictures(runs: Sequence[PairedRun], most: int = MOST_PICTURES) -> tuple[Picture, ...]:
    """Flips first, the largest change of probability before others, then the masks that agree least.

    Rows are read once; only the chosen are kept. Pictures that moved nowhere are no news.
    """
    chosen = heapq.nlargest(most, _candidates(runs), key=lambda each: each[0])
    return tuple(_picture(runs[run], place, row) for (*_, run, place), row in chosen)


Rank = tuple[bool, float, float, int, int]


def _candidates(runs: Sequence[PairedRun]) -> Iterator[tuple[Rank, PairRow]]:
    for run, paired in enumerate(runs):
        for place, row in enumerate(paired):
            if isinstance(row, Problem) or not (row.flipped or row.mask_agreement < 1):
                continue
            moved = abs(row.reference.fake_probability - row.candidate.fake_probability) if row.flipped else 0.0
            yield (row.flipped, moved, 1 - row.mask_agreement, run, place), row


def _picture(paired: PairedRun, place: int, row: PairRow) -> Picture:
    item = paired.run.benchmark.items[place]
    photo = read_image(item)
    image, truth = perturb(row.perturbation, photo, read_mask(item, photo.size), item.key)
    small = _shrunk(image)
    masks = [unpack_mask(facts) for facts in (row.reference.mask, row.candidate.mask)]
    where = "" if row.perturbation == "none" else f" ({row.perturbation})"
    return Picture(
        name=f"{row.benchmark}/{row.key}{where}",
        label=row.label,
        flipped=row.flipped,
        probabilities=(row.reference.fake_probability, row.candidate.fake_probability),
        agreement=row.mask_agreement,
        slices=", ".join(f"{name} {value}" for name, value in row.slices.items() if value),
        images=(
            _jpeg(small),
            _tinted(small, truth) if truth is not None else "",
            _tinted(small, masks[0]),
            _tinted(small, masks[1]),
        ),
    )


def _shrunk(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return small


def _tinted(small: Image.Image, mask: NDArray[np.bool_]) -> str:
    """The picture in grey, and red where the mask is."""
    share = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(small.size, Image.Resampling.BOX)) / 255
    grey = np.asarray(small.convert("L"), np.float64)[..., None] * 0.55 + 70
    cover = 0.75 * share[..., None]
    return _jpeg(Image.fromarray((grey * (1 - cover) + _TINT * cover).astype(np.uint8)))


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
