"""Regions to forge, of a wanted area."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from defaker_opt.forgery import Mask, Pixels
from defaker_opt.forgery.pixels import blur, largest_part

Outline = NDArray[np.float64]  # [corners, (x, y)], centred, of unit area


@dataclass(frozen=True)
class Region:
    """A mask [h, w] of a box whose upper left corner lies at (left, top) of the canvas."""

    left: int
    top: int
    mask: Mask

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def centre(self) -> tuple[float, float]:
        """x, y on the canvas."""
        height, width = self.mask.shape
        return self.left + width / 2, self.top + height / 2

    def on(self, height: int, width: int) -> Mask:
        """The mask of the whole canvas."""
        canvas = np.zeros((height, width), bool)
        canvas[self.box] = self.mask
        return canvas


def blob(rng: Generator) -> Outline:
    """A smooth closed curve: a circle with a few random harmonics, stretched and turned."""
    angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    radius = np.ones_like(angle)
    for order in range(2, 7):
        radius += rng.uniform(0, 0.38 / order) * np.cos(order * angle + rng.uniform(0, 2 * math.pi))
    return _shaped(rng, np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), stretch=1.7)


def polygon(rng: Generator) -> Outline:
    """Four to eight straight edges."""
    corners = int(rng.integers(4, 9))
    angle = (np.arange(corners) + rng.uniform(0.1, 0.9, corners)) * (2 * math.pi / corners)
    radius = rng.uniform(0.7, 1.2, corners)
    return _shaped(rng, np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), stretch=1.6)


def ellipse(rng: Generator, stretch: float = 1.6) -> Outline:
    """An ellipse with axes in a ratio of 1…stretch, in any direction."""
    angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return _shaped(rng, np.stack([np.cos(angle), np.sin(angle)], axis=1), stretch)


def face_oval(rng: Generator, tilt: float = 0.25) -> Outline:
    """An upright oval, narrower at the chin."""
    angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    y = np.sin(angle) * rng.uniform(1.2, 1.45)
    x = np.cos(angle) * (1 - 0.14 * np.sin(angle)) * (1 + 0.03 * np.cos(3 * angle + rng.uniform(0, 6)))
    return _unit_area(_turned(np.stack([x, y], axis=1), rng.uniform(-tilt, tilt)))


def _shaped(rng: Generator, points: Outline, stretch: float) -> Outline:
    stretched = points * np.array([rng.uniform(1, stretch), 1.0])
    return _unit_area(_turned(stretched, rng.uniform(0, math.pi)))


def _turned(points: Outline, angle: float) -> Outline:
    cosine, sine = math.cos(angle), math.sin(angle)
    turned: Outline = points @ np.array([[cosine, sine], [-sine, cosine]])
    return turned


def _unit_area(points: Outline) -> Outline:
    x, y = points.T
    area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    centred: Outline = (points - (points.max(0) + points.min(0)) / 2) / math.sqrt(area)
    return centred


def place(
    rng: Generator, outline: Outline, area: float, height: int, width: int, near: tuple[float, float] | None = None
) -> Region:
    """Scale an outline to `area` pixels and put it on the canvas, whole, anywhere or as near `near` (x, y) as it fits.

    What is too long for the canvas is squeezed into it and widened, as far as there is room.
    """
    points = outline * math.sqrt(area)
    span = points.max(0) - points.min(0)  # x, y
    limit = np.array([width - 4, height - 4])
    squeeze = np.minimum(1, limit / span)
    points = points * np.minimum(squeeze / squeeze[::-1], limit / span)
    span = np.ceil(points.max(0) - points.min(0)).astype(int) + 2
    room = np.array([width, height]) - span
    wanted = np.array(near) - span / 2 if near is not None else rng.uniform(0, 1, 2) * room
    left, top = np.clip(np.rint(wanted), 0, np.maximum(room, 0)).astype(int).tolist()
    drawn = Image.new("L", (int(span[0]), int(span[1])))
    corners = (points - points.min(0) + 1).ravel().tolist()
    ImageDraw.Draw(drawn).polygon(corners, fill=1)
    return Region(left, top, np.asarray(drawn).astype(bool)[: height - top, : width - left])


def any_outline(rng: Generator) -> Outline:
    """One of the hand-drawn kinds."""
    return (blob, blob, polygon, ellipse)[int(rng.integers(4))](rng)


def follow_object(pixels: Pixels, envelope: Mask, area: float) -> Mask | None:
    """The connected part of about `area` pixels, inside the envelope, that looks like the envelope's middle.

    pixels [h, w, 3] and envelope [h, w] of one box. None if the colours there form no such object.
    """
    height, width = envelope.shape
    if min(height, width) < 8:
        return None
    smooth = blur(pixels, 1.5).astype(np.float32)
    middle = smooth[height * 2 // 5 : height * 3 // 5 + 1, width * 2 // 5 : width * 3 // 5 + 1]
    distance = np.abs(smooth - np.median(middle, axis=(0, 1))).sum(-1)
    threshold = np.quantile(distance[envelope], min(1.0, area / float(envelope.sum())))
    # Opening cuts threads off; the wider the object, the thicker they may be.
    rounds = max(2, round(math.sqrt(area) / 24))
    found = largest_part(ndimage.binary_opening((distance <= threshold) & envelope, iterations=rounds))
    found = (blur(found.astype(np.uint8) * 255, 2.0) >= 128) & envelope
    return found if 0.45 * area <= int(found.sum()) <= 1.3 * area else None
