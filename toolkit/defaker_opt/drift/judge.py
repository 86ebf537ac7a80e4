"""One picture through one open build: bytes → ImageRow. The same function wherever it runs."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.read import forged_pixels
from defaker_opt.drift.perturbations import NONE, perturb
from defaker_opt.drift.picture_hash import picture_hash
from defaker_opt.drift.rows import ImageRow, MaskFacts, Problem, TruthCounts, count_truth, logit_bins, pack_mask
from defaker_opt.errors import BuildError, ImageError
from defaker_opt.runtime.images import decode_image, resized_rows
from defaker_opt.runtime.session import Session, Verdict


@dataclass(frozen=True)
class Task:
    """One picture to be judged, with all that decides its row. image, mask: encoded; mask None if there is none.

    perturbation: a name of `perturbations`, or "none".
    """

    key: str
    label: Literal[0, 1]
    image: bytes = field(repr=False)
    mask: bytes | None = field(repr=False)
    mask_rule: MaskRule
    perturbation: str

    @property
    def digest(self) -> bytes:
        """SHA-256 over what decides the row, given the build."""
        rule = self.mask_rule
        facts = [
            hashlib.sha256(self.image).hexdigest(),
            hashlib.sha256(self.mask).hexdigest() if self.mask is not None else self.label,
            [rule.polarity, rule.threshold, rule.channel] if self.mask is not None else [],
            self.perturbation,
            self.key if self.perturbation != NONE else "",  # noise is drawn from it
        ]
        return hashlib.sha256(json.dumps(facts).encode()).digest()


def judge_task(session: Session, task: Task) -> ImageRow | Problem:
    """Judge one picture, with its mask whatever the verdict; what cannot be judged becomes a Problem."""
    try:
        picture = decode_image(io.BytesIO(task.image), "image")
        image, truth = perturb(task.perturbation, picture, _read_truth(task, picture.size), task.key)
        verdict = session.judge(image, gate=0.0)
    except (ImageError, BuildError) as error:
        return Problem(task.key, str(error))
    return ImageRow(
        key=task.key,
        label=task.label,
        fake_probability=verdict.fake_probability,
        predicted=1 if verdict.is_fake else 0,
        verdict_logits=tuple(verdict.verdict_logits.tolist()),
        mask=_mask_facts(session, verdict, truth),
        picture_hash=picture_hash(picture),
        latency_ms=verdict.latency_ms,
    )


def _read_truth(task: Task, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Where the picture is forged; None if nobody says. Raises ImageError if the mask does not fit the picture."""
    if task.mask is None:
        return np.zeros(size[::-1], bool) if task.label == 0 else None
    mask = decode_image(io.BytesIO(task.mask), "mask")
    if mask.size != size:
        raise ImageError(
            f"mask: {mask.width}x{mask.height}, its picture {size[0]}x{size[1]}; "
            "put a mask of the picture's size there, or leave the picture out"
        )
    return forged_pixels(mask, task.mask_rule)


def _mask_facts(session: Session, verdict: Verdict, truth: NDArray[np.bool_] | None) -> MaskFacts:
    mask, logits = verdict.mask, verdict.mask_logits
    assert mask is not None
    assert logits is not None
    assert verdict.mask_area is not None
    height, width = mask.shape
    counts: TruthCounts | None = None
    if truth is not None:
        size = session.build.manifest.data["input"]["mask_image_size"]
        bins = np.concatenate([logit_bins(band) for band in resized_rows(logits, size, width, height)])
        counts = count_truth(mask, truth, bins)
    return MaskFacts(width, height, verdict.mask_area, pack_mask(mask), counts)
