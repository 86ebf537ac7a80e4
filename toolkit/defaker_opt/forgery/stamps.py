"""Rubber stamps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from defaker_opt.forgery import Mask, Pixels
from defaker_opt.forgery.pixels import Floats, smooth_field, to_pixels
from defaker_opt.forgery.writing import load_font, number, word

_COLOURS = ((190, 30, 40), (30, 50, 160), (20, 110, 70), (90, 30, 120), (40, 40, 45))


@dataclass(frozen=True)
class Stamp:
    """stamped [h, w, 3]; mask [h, w] where there is ink."""

    stamped: Pixels
    mask: Mask


def draw_stamp(rng: Generator, pixels: Pixels, area: float) -> Stamp:
    """Press a stamp on a page, its ink covering about `area` (0…1) of it."""
    height, width = pixels.shape[:2]
    # The ink of our designs covers about this share of the square around them.
    side = round(min(math.sqrt(area * height * width / 0.3), 0.9 * min(height, width)))
    side = max(24, side)
    turned = _design(rng, side).rotate(rng.uniform(-35, 35), Image.Resampling.BICUBIC)
    worn = _worn(rng, np.asarray(turned))
    left = int(rng.integers(0, max(1, width - side)))
    top = int(rng.integers(0, max(1, height - side)))
    opacity = np.zeros((height, width), np.float32)
    rows, columns = slice(top, min(height, top + side)), slice(left, min(width, left + side))
    opacity[rows, columns] = worn[: rows.stop - top, : columns.stop - left]
    colour = np.array(_COLOURS[int(rng.integers(len(_COLOURS)))], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
    below = pixels.astype(np.float32)
    return Stamp(to_pixels(below + opacity[..., None] * (colour - below)), opacity > 0)


def _design(rng: Generator, side: int) -> Image.Image:
    """A ring or a frame, with a date and a word or two inside; L, 255 = ink."""
    drawn = Image.new("L", (side, side))
    draw = ImageDraw.Draw(drawn)
    edge, thick = side * 0.04, max(2, round(side * rng.uniform(0.03, 0.07)))
    centre, half = side / 2, side / 2 - edge
    if rng.random() < 0.6:
        draw.ellipse((edge, edge, side - edge, side - edge), outline=255, width=thick)
        inner = edge + thick * 2
        draw.ellipse((inner, inner, side - inner, side - inner), outline=255, width=max(1, thick // 2))
        rows, reach = (word(rng).upper(), number(rng)), half * 1.35
    else:
        box = (edge, centre - half * 0.55, side - edge, centre + half * 0.55)
        draw.rectangle(box, outline=255, width=thick)
        rows, reach = (word(rng).upper(), number(rng)), half * 1.75
    for place, text in zip((0.4, 0.6), rows):
        size = max(8, round(side * 0.17))
        while size > 8 and load_font("DejaVuSans-Bold", size).getlength(text) > reach:
            size = max(8, round(size * 0.85))
        font = load_font("DejaVuSans-Bold", size)
        draw.text((centre, side * place), text, fill=255, font=font, anchor="mm")
    return drawn


def _worn(rng: Generator, ink: Pixels) -> Floats:
    """Opacity [h, w] of ink that was not spread evenly; zero below one part in 16."""
    height, width = ink.shape[:2]
    patches = smooth_field(rng, height, width, 14) + smooth_field(rng, height, width, max(4, height // 3))
    strength = np.clip(np.float32(rng.uniform(0.75, 0.95)) - np.float32(0.09) * np.abs(patches), 0.15, 1)
    opacity = ink.astype(np.float32) / np.float32(255) * strength
    return np.where(opacity < 1 / 16, np.float32(0), opacity)
