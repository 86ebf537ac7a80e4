"""Authentic pictures to work on: crops of photographs, jittered, with a past of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from PIL import Image

from defaker_opt.forgery import Pixels, Split
from defaker_opt.forgery.pixels import recompress, smooth_field, to_pixels
from defaker_opt.forgery.sources import Kind, Library, Photo
from defaker_opt.forgery.traces import add_grain

# Width / height; nine in ten are near enough to a square to be one tile, from which a small detector learns fastest.
ASPECTS = (1.0, 1.0, 4 / 3, 4 / 3, 4 / 3, 3 / 4, 3 / 4, 5 / 4, 4 / 5, 16 / 9)
MAX_ENLARGEMENT = 1.25


@dataclass(frozen=True)
class Order:
    """What to forge. size: the longest side of the canvas in px; area: wanted forged share of it, 0…1."""

    rng: Generator
    library: Library
    split: Split
    operation: str
    size: int
    area: float

    def pick(self, kinds: Sequence[Kind] = ("photo", "texture"), without: str = "") -> Photo:
        """Draw a photograph, textures rarely; not the one named `without` if there is another."""
        found = self.library.of(self.split, kinds)
        others = [photo for photo in found if photo.name != without] or list(found)
        weights = np.array([0.3 if photo.kind == "texture" else 1.0 for photo in others])
        return others[int(self.rng.choice(len(others), p=weights / weights.sum()))]

    def with_area(self, limit: float) -> Order:
        """The same order, its area at most `limit`."""
        return replace(self, area=min(self.area, limit))


@dataclass(frozen=True)
class Canvas:
    """pixels [h, w, 3]; face: middle x and y, half width and half height on the canvas, if one lies inside."""

    pixels: Pixels
    source: str
    face: tuple[float, float, float, float] | None = None


def canvas_shape(order: Order) -> tuple[int, int]:
    """Rows and columns for a new canvas."""
    aspect = ASPECTS[int(order.rng.integers(len(ASPECTS)))]
    longest = order.size if order.rng.random() < 0.5 else round(order.size * order.rng.uniform(0.7, 1))
    height, width = (longest / aspect, longest) if aspect >= 1 else (longest, longest * aspect)
    return round(height), round(width)


def photograph(
    order: Order, photo: Photo, shape: tuple[int, int], around: tuple[float, float, float, float] | None = None
) -> Canvas:
    """A random crop of a photograph as a canvas; with `around` (a face), one that shows it, not too small.

    shape (rows, columns) is kept in ratio, but made smaller where the photograph has not enough pixels.
    """
    rng, pixels = order.rng, order.library.pixels(photo)
    height, width = _affordable(shape, pixels)
    most = min(pixels.shape[0] / height, pixels.shape[1] / width)  # source pixels for one of the canvas
    least = min(max(1 / MAX_ENLARGEMENT, most * 0.45), most)
    step = rng.uniform(least, min(most, least * 2.2))
    if around is not None:
        wanted = math.sqrt(math.pi * around[2] * around[3] / order.area / (height * width))
        step = float(np.clip(wanted, 0.6, most))
    rows, columns = height * step, width * step
    x, y = (around[0], around[1]) if around is not None else (math.inf, math.inf)
    left = _offset(rng, pixels.shape[1], columns, x)
    top = _offset(rng, pixels.shape[0], rows, y)
    crop = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.BICUBIC, (left, top, left + columns, top + rows), reducing_gap=3.0
    )
    face = photo.face and _face_on_canvas(photo.face, left, top, step)
    taken = np.asarray(crop)
    if rng.random() < 0.5:
        taken = taken[:, ::-1]
        face = face and (width - face[0], *face[1:])
    inside = face is not None and 0 < face[0] < width and 0 < face[1] < height
    return Canvas(_with_past(rng, _jittered(rng, np.ascontiguousarray(taken))), photo.name, face if inside else None)


def _affordable(shape: tuple[int, int], pixels: Pixels) -> tuple[int, int]:
    enlarged = max(shape[0] / pixels.shape[0], shape[1] / pixels.shape[1])
    shrink = max(1.0, enlarged / MAX_ENLARGEMENT)
    return max(48, int(shape[0] / shrink)), max(48, int(shape[1] / shrink))


def _offset(rng: Generator, extent: int, taken: float, middle: float) -> float:
    room = max(0.0, extent - taken)
    if math.isinf(middle):
        return float(rng.uniform(0, room))
    return float(np.clip(middle - taken * rng.uniform(0.35, 0.65), 0, room))


def _face_on_canvas(
    face: tuple[float, float, float, float], left: float, top: float, step: float
) -> tuple[float, float, float, float]:
    x, y, half_width, half_height = face
    return (x - left) / step, (y - top) / step, half_width / step, half_height / step


def _jittered(rng: Generator, pixels: Pixels) -> Pixels:
    """Gamma, contrast and colour balance by one table per channel; grey pictures are tinted at times."""
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
    gamma = math.exp(rng.uniform(-0.3, 0.3))
    spread = 0.16 if grey else 0.07
    ramp = (np.arange(256) / 255) ** gamma
    contrast, lift = rng.uniform(0.85, 1.1), rng.uniform(-0.04, 0.06)
    channels = []
    for channel in range(3):
        table = to_pixels((255 * (ramp * contrast * math.exp(rng.uniform(-spread, spread)) + lift)).astype(np.float32))
        channels.append(table[pixels[..., channel]])
    return np.stack(channels, axis=-1)


def _with_past(rng: Generator, pixels: Pixels) -> Pixels:
    """An older JPEG at times, then the grain of one sensor."""
    if rng.random() < 0.5:
        pixels = recompress(pixels, int(rng.integers(75, 97)), (int(rng.integers(8)), int(rng.integers(8))))
    return add_grain(rng, pixels)


def procedural_scene(order: Order, shape: tuple[int, int]) -> Canvas:
    """Clouds over a gradient, with soft blobs of light and sensor noise: a background that no photograph holds."""
    rng, (height, width) = order.rng, shape
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(max(shape))
    slope = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    clouds = np.zeros(shape, np.float32)
    for octave in range(6):
        clouds += smooth_field(rng, height, width, 3 * 2**octave) * np.float32(0.62**octave)
    colours = rng.uniform(40, 215, (2, 3)).astype(np.float32)
    mixture = 1 / (1 + np.exp(-(clouds * np.float32(rng.uniform(0.6, 1.6)) + 2 * slope)))[..., None]
    scene = colours[0] + mixture * (colours[1] - colours[0])
    grain = smooth_field(rng, height, width, max(shape) // 2) * np.float32(rng.uniform(0.5, 4))
    return Canvas(_with_past(rng, to_pixels(scene + grain[..., None])), "procedural")


def any_canvas(order: Order, procedural_share: float = 0.06) -> Canvas:
    """A crop of any photograph of the split, or at times a procedural scene."""
    shape = canvas_shape(order)
    if order.rng.random() < procedural_share:
        return procedural_scene(order, shape)
    return photograph(order, order.pick(), shape)
