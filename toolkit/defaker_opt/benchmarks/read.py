"""Pictures and masks of a benchmark's items, decoded."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.benchmarks import Item, Locator, MaskRule
from defaker_opt.benchmarks.members import read_bytes
from defaker_opt.errors import ImageError, SuiteError
from defaker_opt.runtime.images import decode_image

# Masks that are looked at, evenly spaced, before a benchmark is accepted.
AREA_SAMPLE = 64


def read_image(item: Item) -> Image.Image:
    """The picture as RGB, decoded as `load_image` does. Raises SuiteError if it is missing or cannot be decoded."""
    return _decode(item.image)


def read_mask(item: Item, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Where the picture is forged, bool [height, width]; empty for an authentic picture, None if nobody says.

    size: width and height of the picture, px. Raises SuiteError if the mask is missing, unreadable or of another size.
    """
    if item.mask is None:
        return np.zeros(size[::-1], bool) if item.label == 0 else None
    mask = decode_mask(item.mask, item.mask_rule)
    if mask.shape != size[::-1]:
        raise SuiteError(
            f"{_name(item.mask)}: the mask is {mask.shape[1]}x{mask.shape[0]}, its picture {size[0]}x{size[1]}; "
            "put a mask of the picture's size there, or leave the picture out"
        )
    return mask


def decode_mask(locator: Locator, rule: MaskRule) -> NDArray[np.bool_]:
    """A mask at its own size, bool [height, width]. Raises SuiteError."""
    return forged_pixels(_decode(locator), rule)


def forged_pixels(image: Image.Image, rule: MaskRule) -> NDArray[np.bool_]:
    """What a mask, decoded to RGB, says; bool [height, width]."""
    if rule.channel == "grey":
        values = np.asarray(image.convert("L"))
    else:
        values = np.asarray(image)[:, :, ("red", "green", "blue").index(rule.channel)]
    return values > rule.threshold if rule.polarity == "white-is-forged" else values < rule.threshold


def mean_mask_area(items: Sequence[Item]) -> tuple[float, int]:
    """Mean forged share of forged pictures, over a sample of the masks that can be read; and of how many that is."""
    masked = [(item.mask, item.mask_rule) for item in items if item.mask is not None and item.label == 1]
    step = max(1, -(-len(masked) // AREA_SAMPLE))
    areas = []
    for locator, rule in masked[::step]:
        try:
            areas.append(float(decode_mask(locator, rule).mean()))
        except SuiteError:
            continue  # whoever judges it says so
    return (float(np.mean(areas)) if areas else 0.0), len(areas)


def _decode(locator: Locator) -> Image.Image:
    try:
        if not locator.member:
            return decode_image(locator.path, locator.path)
        return decode_image(io.BytesIO(read_bytes(locator)), _name(locator))
    except ImageError as error:
        raise SuiteError(str(error)) from error


def _name(locator: Locator) -> str:
    return f"{locator.path}, {locator.member}" if locator.member else str(locator.path)
