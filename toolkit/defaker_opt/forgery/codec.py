"""What happens to both twins after the forgery: one resampling, one codec, drawn once a pair."""

from __future__ import annotations

import io
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image

from defaker_opt.forgery import CodecFacts, Edit, Pixels
from defaker_opt.forgery.pixels import resize

FILTERS = MappingProxyType(
    {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
)
SUFFIXES = MappingProxyType({"jpeg": ".jpg", "png": ".png", "webp": ".webp"})


def draw_codec(rng: Generator) -> CodecFacts:
    """Three pairs in four keep their size; six in ten are JPEG. Mild, so that grain survives: what harsher codecs do
    to a verdict is measured by perturbations.
    """
    factor, resize_filter = 1.0, "none"
    if rng.random() < 0.25:
        factor = round(float(rng.uniform(0.8, 1.0) if rng.random() < 0.75 else rng.uniform(1.0, 1.2)), 3)
        resize_filter = list(FILTERS)[int(rng.integers(len(FILTERS)))]
    kind = rng.random()
    if kind < 0.6:
        subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = ("4:4:4", "4:2:2", "4:2:0", "4:2:0")[int(rng.integers(4))]
        quality = int(rng.integers(85, 99))
        return CodecFacts("jpeg", quality, subsampling, factor, resize_filter)  # type: ignore[arg-type]
    if kind < 0.85:
        return CodecFacts("png", 0, "none", factor, resize_filter)  # type: ignore[arg-type]
    return CodecFacts("webp", int(rng.integers(90, 99)), "4:2:0", factor, resize_filter)  # type: ignore[arg-type]


def resample(edit: Edit, codec: CodecFacts, longest: int) -> Edit:
    """Resize both twins alike; the mask then holds every pixel that differs, and no pixel outside it does."""
    if codec.resize_filter == "none":
        return edit
    height, width = edit.mask.shape
    factor = min(codec.resize_factor, longest / max(height, width))
    width, height = max(1, round(width * factor)), max(1, round(height * factor))
    how = FILTERS[codec.resize_filter]
    authentic, forged = (resize(pixels, width, height, how) for pixels in (edit.authentic, edit.forged))
    covered = resize(edit.mask.astype(np.uint8) * 255, width, height, Image.Resampling.BILINEAR) >= 128
    return Edit(authentic, forged, covered | (authentic != forged).any(-1), edit.sources)


def encode(pixels: Pixels, codec: CodecFacts) -> bytes:
    """The bytes of a file."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if codec.format == "jpeg":
        image.save(file, "JPEG", quality=codec.quality, subsampling=codec.subsampling)
    elif codec.format == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "WEBP", quality=codec.quality, method=0)
    return file.getvalue()


def decode(file: bytes) -> Pixels:
    """Pixels [h, w, 3] of a file written by `encode`."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))
