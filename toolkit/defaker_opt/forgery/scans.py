"""Photographed pages as documents: where their lines of text are, found by how dark rows and columns are."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from defaker_opt.forgery.canvas import Order, photograph
from defaker_opt.forgery.pages import Line, Page
from defaker_opt.forgery.pixels import blur
from defaker_opt.forgery.sources import Photo
from defaker_opt.forgery.writing import TYPEFACES

# Ink is this much darker than its surroundings, grey values.
INK_CONTRAST = 14

# Lines of other heights, px, are not text we can imitate.
LOWEST_LINE, HIGHEST_LINE = 7, 48

# A row belongs to a line if more of it is ink than this share, and than this part of what is usual on the page.
ROW_INK = 0.012
ROW_INK_RELATIVE = 0.3

FEWEST_LINES = 3


def photographed_page(order: Order, photo: Photo, shape: tuple[int, int]) -> Page | None:
    """A crop of a photographed page as a document; None if too few lines of text are found on it."""
    canvas = photograph(order, photo, shape)
    typeface = TYPEFACES[int(order.rng.integers(len(TYPEFACES)))]
    lines = find_lines(order.rng, canvas.pixels[..., 1], typeface)
    if len(lines) < FEWEST_LINES:
        return None
    return Page(canvas.pixels, tuple(lines), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (20, 20, 20))


def find_lines(rng: Generator, grey: NDArray[np.uint8], typeface: str) -> list[Line]:
    """Runs of text on an upright page [h, w]; what they say is unknown, so their text only has the right length."""
    ink = grey.astype(np.int16) < blur(grey, 12.0).astype(np.int16) - INK_CONTRAST
    lines = []
    share = np.asarray(ink.mean(1))
    for top, bottom in _runs(share > max(ROW_INK, ROW_INK_RELATIVE * float(share.mean())), gap=1):
        height = bottom - top
        if not LOWEST_LINE <= height <= HIGHEST_LINE:
            continue
        for left, right in _runs(np.asarray(ink[top:bottom].any(0)), gap=round(1.2 * height)):
            if right - left >= 2 * height:
                length = max(3, round((right - left) / (0.5 * height)))
                text = "0" * length if rng.random() < 0.3 else ("words " * length)[:length]
                lines.append(Line(text, typeface, max(7, round(0.9 * height)), left, top, right - left, height))
    return lines


def _runs(flags: NDArray[np.bool_], gap: int) -> list[tuple[int, int]]:
    """Start and end of each run of True [n]; runs at most `gap` apart are one."""
    places = np.flatnonzero(flags)
    if not len(places):
        return []
    breaks = np.flatnonzero(np.diff(places) > gap + 1)
    starts = places[np.concatenate([[0], breaks + 1])]
    ends = places[np.concatenate([breaks, [len(places) - 1]])] + 1
    return [(int(start), int(end)) for start, end in zip(starts, ends)]
