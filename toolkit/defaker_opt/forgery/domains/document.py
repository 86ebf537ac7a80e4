"""Pages with text rewritten, text copied from elsewhere on the page, or a stamp pasted on."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from defaker_opt.errors import one_of
from defaker_opt.forgery import Edit, Mask
from defaker_opt.forgery.canvas import Order, canvas_shape
from defaker_opt.forgery.pages import Line, Page, scanned_page
from defaker_opt.forgery.pixels import (
    Floats,
    add_noise,
    blend,
    blur,
    bounding_box,
    feather,
    fill_smoothly,
    match_colour,
    to_pixels,
)
from defaker_opt.forgery.scans import photographed_page
from defaker_opt.forgery.stamps import draw_stamp
from defaker_opt.forgery.writing import TYPEFACES, number, sentence, text_coverage

OPERATIONS = MappingProxyType({"rewritten_text": 0.22, "copied_text": 0.16, "pasted_stamp": 0.07})


def forge(order: Order) -> Edit:
    """See `Domain`."""
    page, source = _any_page(order)
    operations = {"rewritten_text": _rewritten_text, "copied_text": _copied_text, "pasted_stamp": _pasted_stamp}
    assert order.operation in operations, one_of(order.operation, operations)
    return operations[order.operation](order, page, (source,))


def _any_page(order: Order) -> tuple[Page, str]:
    """A photographed page, the oftener the more the split has, if one shows text; else one of ours."""
    shape = canvas_shape(order)
    scans = order.library.of(order.split, ("scan",))
    if scans and order.rng.random() < min(0.6, 0.2 + 0.05 * len(scans)):
        photo = scans[int(order.rng.integers(len(scans)))]
        page = photographed_page(order, photo, shape)
        if page is not None:
            return page, photo.name
    return scanned_page(order, shape)


def _rewritten_text(order: Order, page: Page, sources: tuple[str, ...]) -> Edit:
    """Erase runs of text with the paper around them, and write others in their place."""
    rng, (height, width) = order.rng, page.pixels.shape[:2]
    forged, mask = page.pixels, np.zeros((height, width), bool)
    same_typeface = rng.random() < 0.6
    sharpness = rng.uniform(0.0, 0.8)
    for part in _spans(rng, page, order.area * height * width):
        box = page.box_mask(part.left - 3, part.top - 3, part.left + part.width + 3, part.top + part.height + 3)
        if not box.any():
            continue
        typeface = part.typeface if same_typeface else TYPEFACES[int(rng.integers(len(TYPEFACES)))]
        erased = _erased(rng, forged, box)
        written = page.on_scan(_replacement(rng, part, typeface, height, width))
        opacity = blur(written, sharpness).astype(np.float32) / np.float32(255) * np.float32(rng.uniform(0.95, 1.3))
        ink = np.broadcast_to(np.array(_seen_ink(page, box), np.uint8), erased.shape)
        forged = blend(erased, ink, np.where(box, np.minimum(opacity, 1), np.float32(0)))
        mask |= box
    return Edit(page.pixels, forged, mask, sources)


def _spans(rng: Generator, page: Page, area: float) -> list[Line]:
    """Neighbouring runs of text that together cover about `area` px, the last one cut where it suffices."""
    chosen: list[Line] = []
    if not page.lines:
        return chosen
    start = int(rng.integers(len(page.lines)))
    for line in page.lines[start:] + page.lines[:start]:
        box = (line.width + 6) * (line.height + 6)
        if box <= area:
            chosen.append(line)
            area -= box
            continue
        part = _beginning(line, area / box)
        if part is not None and (not chosen or area > 0.3 * box):
            chosen.append(part)
        if chosen:
            break
    return chosen


def _beginning(line: Line, share: float) -> Line | None:
    """The first part of a line, as a line of its own; None if less than two characters would remain."""
    count = round(len(line.text) * share)
    if count < 2:
        return None
    width = round(line.width * count / len(line.text))
    return Line(line.text[:count], line.typeface, line.size, line.left, line.top, width, line.height)


def _replacement(rng: Generator, part: Line, typeface: str, height: int, width: int) -> NDArray[np.uint8]:
    """Other text for the box of `part`, cut where the box ends; ink [height, width] of the page."""
    words = " " in part.text or not any(character.isdigit() for character in part.text)
    # Longer than it has to be, for letters differ in width; what does not fit is cut.
    text = sentence(rng, round(1.3 * len(part.text))) if words else number(rng)
    drawn = text_coverage(text, typeface, part.size)[: part.height, : part.width]
    ink = np.zeros((height, width), np.uint8)
    top = min(max(0, part.top + int(rng.integers(0, 2))), height - 1)
    left = min(max(0, part.left), width - 1)
    drawn = drawn[: height - top, : width - left]
    ink[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return ink


def _erased(rng: Generator, pixels: NDArray[np.uint8], box: Mask) -> NDArray[np.uint8]:
    """Paint the box over: with one colour of the paper, or with what flows in from its border; a little noise."""
    rows, columns = bounding_box(box, margin=6)
    window, inside = pixels[rows, columns], box[rows, columns]
    around = window[~inside] if (~inside).any() else window.reshape(-1, 3)
    paper = np.percentile(around, 70, axis=0).astype(np.float32)
    if rng.random() < 0.4:
        fill: Floats = np.broadcast_to(paper, window.shape).astype(np.float32)
    else:
        bright = ~inside & (window.mean(-1) > paper.mean() - 20)
        fill = fill_smoothly(window.astype(np.float32), bright) if bright.any() else window.astype(np.float32)
    painted = add_noise(rng, to_pixels(fill), rng.uniform(0, 1.5))
    out = pixels.copy()
    out[rows, columns] = np.where(inside[..., None], painted, window)
    return out


def _seen_ink(page: Page, box: Mask) -> tuple[int, int, int]:
    """The darkest colours in the box: what the ink looks like on the scan."""
    inside = page.pixels[box]
    darkest = inside[inside.sum(-1) <= np.percentile(inside.sum(-1), 1.5)]
    red, green, blue = (int(value) for value in darkest.mean(0))
    return red, green, blue


def _copied_text(order: Order, page: Page, sources: tuple[str, ...]) -> Edit:
    """Cover runs of text with others from the same scan, of the same size."""
    rng, (height, width) = order.rng, page.pixels.shape[:2]
    forged, mask = page.pixels.copy(), np.zeros((height, width), bool)
    if not page.lines:
        return Edit(page.pixels, forged, mask, sources)
    border = 0.0 if rng.random() < 0.6 else 1.5
    for part in _spans(rng, page, order.area * height * width):
        box = page.box_mask(part.left - 2, part.top - 2, part.left + part.width + 2, part.top + part.height + 2)
        if not box.any():
            continue
        rows, columns = bounding_box(box)
        top, left = _place_to_copy(rng, page, part, rows, columns)
        extent = slice(top, top + rows.stop - rows.start), slice(left, left + columns.stop - columns.start)
        inside = box[rows, columns]
        patch = match_colour(page.pixels[extent], inside, page.pixels[rows, columns], inside, rng.uniform(0, 0.5))
        forged[rows, columns] = blend(forged[rows, columns], patch, feather(inside, border))
        mask |= box
    return Edit(page.pixels, forged, mask, sources)


def _place_to_copy(rng: Generator, page: Page, part: Line, rows: slice, columns: slice) -> tuple[int, int]:
    """Top and left of a run of text of the same height if there is one, kept on the page; never the place itself."""
    height, width = page.pixels.shape[:2]
    like = [
        line
        for line in page.lines
        if line.size == part.size and (line.top != part.top or abs(line.left - part.left) > part.width)
    ]
    if like:
        line = like[int(rng.integers(len(like)))]
        slack = max(0, line.width - part.width)
        top, left = line.top - 2, line.left - 2 + int(rng.integers(0, slack + 1))
    else:
        top, left = rows.start + part.height + 4, columns.start + 5
    top += int(rng.integers(-1, 2))
    bottom_limit, right_limit = height - (rows.stop - rows.start), width - (columns.stop - columns.start)
    return min(max(0, top), bottom_limit), min(max(0, left), right_limit)


def _pasted_stamp(order: Order, page: Page, sources: tuple[str, ...]) -> Edit:
    """A stamp drawn over the finished scan: sharp, without the scan's light and noise under its ink."""
    stamp = draw_stamp(order.rng, page.pixels, order.area)
    return Edit(page.pixels, stamp.stamped, stamp.mask, sources)
