"""A face, or a face-like oval where a photograph has none marked, replaced, warped or generated anew."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from defaker_opt.errors import one_of
from defaker_opt.forgery import Edit, Pixels
from defaker_opt.forgery.canvas import Canvas, Order, canvas_shape, photograph
from defaker_opt.forgery.generators import nearest_upsampler, transposed_upsampler
from defaker_opt.forgery.pixels import (
    Floats,
    add_noise,
    blend,
    blur,
    cut_patch,
    feather,
    match_colour,
    resize,
    sharpen,
    smooth_field,
)
from defaker_opt.forgery.shapes import Region, blob, face_oval, place
from defaker_opt.forgery.sources import Photo

OPERATIONS = MappingProxyType({"face_blend": 0.4, "self_blend": 0.4, "face_resynthesis": 0.4})


def forge(order: Order) -> Edit:
    """See `Domain`."""
    base = _face_canvas(order)
    height, width = base.pixels.shape[:2]
    region = _face_region(order, base, height, width)
    window = base.pixels[region.box]
    opacity = feather(region.mask, _softness(order.rng, region))
    sources: tuple[str, ...] = (base.source,)
    if order.operation == "face_blend":
        patch, donor = _other_face(order, base, region)
        sources = (base.source, donor)
    elif order.operation == "self_blend":
        patch = _warped(order.rng, base.pixels, region)
    elif order.operation == "face_resynthesis":
        make = nearest_upsampler if order.rng.random() < 0.5 else transposed_upsampler
        patch = make(order.rng, _warped(order.rng, base.pixels, region))
    else:
        raise AssertionError(one_of(order.operation, OPERATIONS))
    forged = base.pixels.copy()
    forged[region.box] = blend(window, patch, opacity)
    return Edit(base.pixels, forged, region.on(height, width), sources)


def _face_canvas(order: Order) -> Canvas:
    """Photographs with a marked face come in every second pair, where the split has any."""
    rng = order.rng
    faces = [photo for photo in order.library.of(order.split, ("photo",)) if photo.face]
    if faces and rng.random() < 0.5:
        photo = faces[int(rng.integers(len(faces)))]
        return photograph(order, photo, canvas_shape(order), photo.face)
    return photograph(order, order.pick(("photo",)), canvas_shape(order))


def _face_region(order: Order, base: Canvas, height: int, width: int) -> Region:
    """Over the marked face, or some of its features when the wanted area is smaller than the face."""
    rng, area = order.rng, order.area * height * width
    if base.face is None:
        return place(rng, face_oval(rng), area, height, width)
    x, y, half_width, half_height = base.face
    face_area = math.pi * half_width * half_height
    whole = area > 0.4 * face_area
    reach = 0.08 if whole else 0.45
    near = (x + rng.uniform(-reach, reach) * half_width, y + rng.uniform(-reach, reach) * half_height)
    outline = face_oval(rng) if whole else blob(rng)
    return place(rng, outline, min(area, 1.5 * face_area), height, width, near)


def _softness(rng: Generator, region: Region) -> float:
    radius = math.sqrt(float(region.mask.sum()) / math.pi)
    return float(rng.uniform(0.04, 0.3) * radius)


def _other_face(order: Order, base: Canvas, region: Region) -> tuple[Pixels, str]:
    """Another source's face, as a low-resolution decoder gives it, its colours matched to the one it covers."""
    rng = order.rng
    rows, columns = region.mask.shape
    photo = _donor(order, base)
    pixels = order.library.pixels(photo)
    if photo.face is not None and base.face is not None:
        x, y, half_width, _ = photo.face
        scale = columns / 2 / half_width * rng.uniform(0.9, 1.1)
        # Mirrored, because a split may have no other face than the one it covers.
        patch = cut_patch(pixels, (x, y), (rows, columns), rng.uniform(-0.2, 0.2), scale)[:, ::-1]
    else:
        scale = max(rows / pixels.shape[0], columns / pixels.shape[1]) * rng.uniform(1.2, 2.2)
        centre = (rng.uniform(0.3, 0.7) * pixels.shape[1], rng.uniform(0.3, 0.7) * pixels.shape[0])
        patch = cut_patch(pixels, centre, (rows, columns), rng.uniform(-0.3, 0.3), scale)
    patch = _decoded_face(rng, patch)
    return match_colour(patch, region.mask, base.pixels[region.box], region.mask, rng.uniform(0.7, 1)), photo.name


def _donor(order: Order, base: Canvas) -> Photo:
    """A face for a face, anything for anything; another photograph if the split has one that fits."""
    faces = [photo for photo in order.library.of(order.split, ("photo",)) if photo.face]
    if base.face is None or not faces:
        return order.pick(("photo",), without=base.source)
    others = [photo for photo in faces if photo.name != base.source] or faces
    return others[int(order.rng.integers(len(others)))]


def _decoded_face(rng: Generator, patch: Pixels) -> Pixels:
    """Through a grid of 32…160 px, as face swappers work at a fixed size."""
    rows, columns = patch.shape[:2]
    share = min(0.85, float(rng.integers(32, 161)) / max(rows, columns))
    low = resize(patch, max(8, round(columns * share)), max(8, round(rows * share)), Image.Resampling.BOX)
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    grown = resize(low, columns, rows, filters[int(rng.integers(3))])
    return sharpen(grown, 1.5, int(rng.integers(20, 100))) if rng.random() < 0.5 else grown


def _warped(rng: Generator, pixels: Pixels, region: Region) -> Pixels:
    """The same face bent by a few px, with other colours and sharpness (self-blended images; Shiohara et al. 2022)."""
    rows, columns = region.mask.shape
    centre = (region.centre[0] + rng.uniform(-2, 2), region.centre[1] + rng.uniform(-2, 2))
    scale = math.exp(rng.uniform(-0.06, 0.06))
    patch = cut_patch(pixels, centre, (rows, columns), rng.uniform(-0.06, 0.06), scale)
    amplitude = np.float32(min(6, rng.uniform(0.01, 0.03) * max(rows, columns) + 1))
    bent = _bent(patch, *(smooth_field(rng, rows, columns, 3) * amplitude for _ in range(2)))
    shift = rng.uniform(-9, 9, 3).astype(np.float32)
    coloured = np.clip(np.rint(bent * np.float32(rng.uniform(0.93, 1.07)) + shift), 0, 255).astype(np.uint8)
    treatment = rng.random()
    if treatment < 0.4:
        return blur(coloured, rng.uniform(0.6, 1.6))
    if treatment < 0.75:
        return sharpen(coloured, 1.5, int(rng.integers(60, 180)))
    return add_noise(rng, coloured, rng.uniform(2, 6))


def _bent(patch: Pixels, shift_y: Floats, shift_x: Floats) -> Floats:
    rows, columns = np.mgrid[0 : patch.shape[0], 0 : patch.shape[1]].astype(np.float32)
    places = np.stack([rows + shift_y, columns + shift_x])
    channels = [
        ndimage.map_coordinates(patch[..., channel].astype(np.float32), places, order=1, mode="nearest")
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1)
