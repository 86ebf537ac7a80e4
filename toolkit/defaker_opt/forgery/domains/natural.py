"""Photographs with a part spliced in from another one, copied within itself, or removed."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
from numpy.random import Generator

from defaker_opt.errors import one_of
from defaker_opt.forgery import Edit, Mask, Pixels
from defaker_opt.forgery.canvas import Canvas, Order, any_canvas, photograph
from defaker_opt.forgery.pixels import (
    Floats,
    blend,
    cut_patch,
    feather,
    fill_smoothly,
    match_colour,
    smooth_field,
    to_pixels,
)
from defaker_opt.forgery.shapes import Region, any_outline, follow_object, place

OPERATIONS = MappingProxyType({"splice": 0.58, "copy_move": 0.3, "removal": 0.2})


def forge(order: Order) -> Edit:
    """See `Domain`."""
    operations = {"splice": _splice, "copy_move": _copy_move, "removal": _removal}
    assert order.operation in operations, one_of(order.operation, operations)
    return operations[order.operation](order)


def _splice(order: Order) -> Edit:
    rng, base = order.rng, any_canvas(order)
    height, width = base.pixels.shape[:2]
    donor_photo = order.pick(without=base.source)
    donor = photograph(order, donor_photo, (height, width)).pixels
    region, opacity, patch = _cut_object(order, donor, (height, width))
    patch = match_colour(patch, opacity > 0, base.pixels[region.box], ~(opacity > 0), rng.uniform(0.2, 1))
    return _edit(base, region, patch, opacity, (base.source, donor_photo.name))


def _cut_object(order: Order, donor: Pixels, shape: tuple[int, int]) -> tuple[Region, Floats, Pixels]:
    """A piece of the donor, following an object there if the colours show one, and where it goes."""
    rng, (height, width) = order.rng, shape
    area = order.area * height * width
    rotation = rng.uniform(-0.45, 0.45) if rng.random() < 0.6 else 0.0
    scale = math.exp(rng.uniform(-0.45, 0.45)) if rng.random() < 0.7 else 1.0
    follow = rng.random() < 0.5 and order.area < 0.3
    region = place(rng, any_outline(rng), area * (2.2 if follow else 1.0), height, width)
    centre = (rng.uniform(0.15, 0.85) * donor.shape[1], rng.uniform(0.15, 0.85) * donor.shape[0])
    patch = cut_patch(donor, centre, region.mask.shape, rotation, scale)
    found = follow_object(patch, region.mask, area) if follow else None
    if found is not None:
        region = Region(region.left, region.top, found)
    return region, feather(region.mask, _border(rng, area)), patch


def _border(rng: Generator, area: float) -> float:
    """Width of the soft border in px: hard in two of five, else up to a tenth of the region's diameter."""
    return 0.0 if rng.random() < 0.4 else float(rng.uniform(1, max(1.5, min(8, 0.1 * math.sqrt(area)))))


def _copy_move(order: Order) -> Edit:
    rng, base = order.rng, any_canvas(order, procedural_share=0.0)
    height, width = base.pixels.shape[:2]
    area = order.area * height * width
    region = place(rng, any_outline(rng), area, height, width)
    rotation = rng.uniform(-0.6, 0.6) if rng.random() < 0.5 else 0.0
    scale = math.exp(rng.uniform(-0.35, 0.35)) if rng.random() < 0.5 else 1.0
    source = _elsewhere(rng, region, height, width)
    patch = cut_patch(base.pixels, source, region.mask.shape, rotation, scale)
    if rng.random() < 0.25:
        patch = patch[:, ::-1]
    found = follow_object(patch, region.mask, area * 0.6) if rng.random() < 0.4 else None
    if found is not None:
        region = Region(region.left, region.top, found)
    if rotation == 0.0 and scale == 1.0:
        patch = to_pixels(patch * np.float32(rng.uniform(0.93, 1.07)))
    opacity = feather(region.mask, _border(rng, area))
    return _edit(base, region, patch, opacity, (base.source,))


def _elsewhere(rng: Generator, region: Region, height: int, width: int) -> tuple[float, float]:
    """x, y of a place to copy from: the farthest of a few from where the copy goes, whole px apart."""
    rows, columns = region.mask.shape
    x, y = region.centre
    room = max(0, (width - columns) // 2), max(0, (height - rows) // 2)
    places = [(int(rng.integers(-room[0], room[0] + 1)), int(rng.integers(-room[1], room[1] + 1))) for _ in range(6)]
    middle = (columns / 2 + (width - columns) // 2, rows / 2 + (height - rows) // 2)
    candidates = [(middle[0] + dx, middle[1] + dy) for dx, dy in places]
    return max(candidates, key=lambda point: abs(point[0] - x) + abs(point[1] - y))


def _removal(order: Order) -> Edit:
    rng, base = order.rng, any_canvas(order, procedural_share=0.0)
    height, width = base.pixels.shape[:2]
    area = order.area * height * width
    region = place(rng, any_outline(rng), area, height, width)
    margin = max(6, round(0.12 * math.sqrt(area)))
    rows, columns = (
        slice(max(0, part.start - margin), min(extent, part.stop + margin))
        for part, extent in zip(region.box, (height, width))
    )
    mask = region.on(height, width)[rows, columns]
    window = base.pixels[rows, columns]
    filled = _diffused(rng, window, mask) if rng.random() < 0.4 else _healed(rng, base.pixels, (rows, columns), mask)
    opacity = feather(mask, 0.0 if rng.random() < 0.5 else 2.0)
    return _edit(base, Region(columns.start, rows.start, mask), filled, opacity, (base.source,))


def _diffused(rng: Generator, window: Pixels, mask: Mask) -> Pixels:
    """Colours of the surroundings flow in; the texture of a painter's brush at times."""
    smooth = fill_smoothly(window.astype(np.float32), ~mask)
    if rng.random() < 0.6:
        cells = max(4, max(mask.shape) // int(rng.integers(3, 9)))
        smooth = smooth + smooth_field(rng, mask.shape[0], mask.shape[1], cells)[..., None] * np.float32(
            rng.uniform(1.5, 7)
        )
    return to_pixels(smooth)


def _healed(rng: Generator, base: Pixels, window: tuple[slice, slice], mask: Mask) -> Pixels:
    """Texture from the best fitting of some places nearby, its colours bent to the border (Pérez et al. 2003)."""
    rows, columns = window
    target = base[rows, columns].astype(np.float32)
    height, width = mask.shape
    border = ~mask
    best, best_error = target, math.inf
    for _ in range(16):
        top = int(rng.integers(0, base.shape[0] - height + 1))
        left = int(rng.integers(0, base.shape[1] - width + 1))
        if abs(top - rows.start) < height // 2 and abs(left - columns.start) < width // 2:
            continue
        candidate = base[top : top + height, left : left + width].astype(np.float32)
        error = float(np.abs(candidate - target)[::2, ::2][border[::2, ::2]].mean()) if border.any() else 0.0
        if error < best_error:
            best, best_error = candidate, error
    if best is target:
        return _diffused(rng, base[rows, columns], mask)
    return to_pixels(best + fill_smoothly(target - best, border))


def _edit(base: Canvas, region: Region, patch: Pixels, opacity: Floats, sources: tuple[str, ...]) -> Edit:
    forged = base.pixels.copy()
    forged[region.box] = blend(base.pixels[region.box], patch, opacity)
    return Edit(base.pixels, forged, region.on(*base.pixels.shape[:2]), sources)
