"""Authentic/forged pairs with exact masks, drawn from a seed: what detectors are taught, calibrated and tested on.

    photographs ─► canvas ─► domain's forgery ─► resampling ─► codec ─► Pair(authentic, forged)

Everything after the forgery happens to both twins alike, so no property of the file tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [height, width, 3], sRGB
Mask = NDArray[np.bool_]  # [height, width], True where the forgery changed a pixel
Split = Literal["train", "calibration", "test"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
DOMAINS = ("natural", "document", "deepfake", "aigc")
GLOBAL_DOMAINS = ("aigc",)  # the whole picture is made, so these have no forged area to draw

# A new version may draw other pixels from the same seed; cached sets of another version are not reused.
GENERATOR_VERSION = 2


@dataclass(frozen=True)
class CodecFacts:
    """What happened to both twins after the forgery. quality is 0 and subsampling "none" for PNG.

    resize_factor: final size / canvas size; resize_filter: Pillow's name of the filter, "none" if not resized.
    """

    format: Literal["jpeg", "png", "webp"]
    quality: int
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0", "none"]
    resize_factor: float
    resize_filter: Literal["bilinear", "bicubic", "lanczos", "none"]


@dataclass(frozen=True)
class Example:
    """One picture. label: 1 forged, 0 authentic (its mask is then empty).

    image is what `file`, the encoded picture, decodes to; sources are names of photographs, the base first.
    """

    image: Pixels
    mask: Mask
    label: Literal[0, 1]
    domain: str
    operation: str
    sources: tuple[str, ...]
    codec: CodecFacts
    file: bytes = field(repr=False)


@dataclass(frozen=True)
class Pair:
    """The same scene twice; only the forgery differs."""

    authentic: Example
    forged: Example


@dataclass(frozen=True)
class Edit:
    """What a domain returns: both twins before resampling and codec. All of one height and width."""

    authentic: Pixels
    forged: Pixels
    mask: Mask
    sources: tuple[str, ...]
