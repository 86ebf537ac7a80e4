"""Documents: letters, receipts, forms and cards, written by us and then scanned by us."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from defaker_opt.forgery import Mask, Pixels
from defaker_opt.forgery.canvas import Order
from defaker_opt.forgery.pixels import blur, resize, smooth_field, to_pixels
from defaker_opt.forgery.stamps import draw_stamp
from defaker_opt.forgery.traces import add_grain
from defaker_opt.forgery.writing import (
    MONOSPACED,
    TYPEFACES,
    label,
    load_font,
    number,
    sentence,
    text_coverage,
    text_extent,
)

Ink = NDArray[np.uint8]  # [height, width], 0 paper … 255 ink


@dataclass(frozen=True)
class Line:
    """One run of text on the page, px: the box of its ink, as high as any text of its font; size is the font's."""

    text: str
    typeface: str
    size: int
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Page:
    """A scanned page. pixels [h, w, 3] are the scan; lines lie on the page before it was laid on the scanner.

    tilt: Pillow's affine coefficients, scan → page. ink: its colour before the scan, 0…255 each.
    """

    pixels: Pixels
    lines: tuple[Line, ...]
    tilt: tuple[float, float, float, float, float, float]
    ink: tuple[int, int, int]

    def on_scan(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Move what is drawn on the page, [h, w], to where the scan shows it."""
        if self.tilt == (1, 0, 0, 0, 1, 0):
            return drawn
        image, size = Image.fromarray(drawn), (drawn.shape[1], drawn.shape[0])
        return np.asarray(image.transform(size, Image.Transform.AFFINE, self.tilt, Image.Resampling.BILINEAR))

    def box_mask(self, left: float, top: float, right: float, bottom: float) -> Mask:
        """A box of the page as the scan shows it, [h, w]."""
        height, width = self.pixels.shape[:2]
        drawn = Image.new("L", (width, height))
        ImageDraw.Draw(drawn).rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=255)
        return self.on_scan(np.asarray(drawn)) >= 128


def scanned_page(order: Order, shape: tuple[int, int]) -> tuple[Page, str]:
    """Write a page of `shape` (rows, columns), lay it askew on a scanner and scan it; with the name of its light."""
    rng, (height, width) = order.rng, shape
    layout = (_letter, _receipt, _form)[int(rng.integers(3))]
    lines, rules = layout(rng, height, width)
    ink = tuple(int(value) for value in rng.integers(0, 70, 3)) if rng.random() < 0.8 else (20, 30, 120)
    paper = _paper(rng, height, width)
    drawn = _written(lines, rules, height, width).astype(np.float32)[..., None] / np.float32(255)
    sheet = to_pixels(paper + drawn * (np.array(ink, np.float32) - paper))
    if rng.random() < 0.35:
        sheet = draw_stamp(rng, sheet, 0.01 + 0.05 * rng.random()).stamped
    angle = rng.uniform(-0.022, 0.022) if rng.random() < 0.6 else 0.0
    tilt = _turn(angle, width, height) if angle else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    pixels, light = _scan(order, sheet, tilt)
    return Page(pixels, tuple(lines), tilt, (ink[0], ink[1], ink[2])), light


def _turn(angle: float, width: int, height: int) -> tuple[float, float, float, float, float, float]:
    cosine, sine, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def _paper(rng: Generator, height: int, width: int) -> NDArray[np.float32]:
    """White, tinted, or printed with the waves of a card; [h, w, 3]."""
    tint = 255 - rng.uniform(0, 14, 3) if rng.random() < 0.7 else rng.uniform(190, 250, 3)
    paper = np.broadcast_to(tint.astype(np.float32), (height, width, 3))
    if rng.random() < 0.3:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        wave = np.sin(x / np.float32(rng.uniform(3, 9)) + 6 * np.sin(y / np.float32(rng.uniform(20, 60))))
        paper = paper + wave[..., None] * rng.uniform(-9, 0, 3).astype(np.float32)
    fibres = smooth_field(rng, height, width, max(height, width) // 3) * np.float32(rng.uniform(0, 2.5))
    return np.asarray(paper + fibres[..., None], np.float32)


def _scan(order: Order, sheet: Pixels, tilt: tuple[float, ...]) -> tuple[Pixels, str]:
    """Tilt, blur, uneven light taken from a photographed page, and the grain of a sensor."""
    rng, (height, width) = order.rng, sheet.shape[:2]
    image = Image.fromarray(sheet)
    if tilt[1]:
        corner = tuple(int(value) for value in sheet[0, 0])
        image = image.transform(image.size, Image.Transform.AFFINE, tilt, Image.Resampling.BICUBIC, fillcolor=corner)
    scanned = blur(np.asarray(image), rng.uniform(0.35, 0.9)).astype(np.float32)
    scans = order.library.of(order.split, ("scan",))
    light_name = "rendered"
    if scans and rng.random() < 0.6:
        photo = scans[int(rng.integers(len(scans)))]
        scanned, light_name = scanned * _light(rng, order.library.pixels(photo), height, width), photo.name
    shading = 1 + smooth_field(rng, height, width, 2) * np.float32(rng.uniform(0, 0.05))
    return add_grain(rng, to_pixels(scanned * shading[..., None])), light_name


def _light(rng: Generator, page: Pixels, height: int, width: int) -> NDArray[np.float32]:
    """How light falls on a real page: its brightest values nearby, smoothed; [h, w, 1], about 0.6…1."""
    rows, columns = page.shape[0] // 8, page.shape[1] // 8
    blocks = page[: rows * 8, : columns * 8, 0].reshape(rows, 8, columns, 8).max((1, 3))
    flipped = blocks[:: int(rng.choice([-1, 1])), :: int(rng.choice([-1, 1]))]
    light = blur(np.ascontiguousarray(flipped), 3.0)
    grown = resize(light, width, height, Image.Resampling.BICUBIC).astype(np.float32)
    strength = np.float32(rng.uniform(0.3, 1))
    return np.asarray(1 - strength + strength * (grown / max(1.0, float(grown.max())))[..., None], np.float32)


def _written(lines: list[Line], rules: list[tuple[int, int, int, int]], height: int, width: int) -> Ink:
    ink = Image.new("L", (width, height))
    draw = ImageDraw.Draw(ink)
    for rule in rules:
        draw.line(rule, fill=170, width=1)
    for line in lines:
        drawn = Image.fromarray(text_coverage(line.text, line.typeface, line.size))
        ink.paste(255, (line.left, line.top), drawn)
    return np.asarray(ink)


def _line(text: str, typeface: str, size: int, left: int, top: int, limit: int) -> Line | None:
    """A line as it will be drawn, words that would pass `limit` left out; None if nothing remains."""
    font = load_font(typeface, size)
    while text and left + font.getlength(text) > limit:
        text = text.rpartition(" ")[0]
    if not text:
        return None
    return Line(text, typeface, size, left, top, *text_extent(text, typeface, size))


def _typeface(rng: Generator) -> str:
    return TYPEFACES[int(rng.integers(len(TYPEFACES)))]


def _font_size(rng: Generator, height: int, width: int) -> int:
    """12…19 px, less on canvases whose longer side is below 440 px."""
    return max(7, round(rng.uniform(11.5, 19.5) * min(1.0, max(height, width) / 440)))


def _letter(rng: Generator, height: int, width: int) -> tuple[list[Line], list[tuple[int, int, int, int]]]:
    """A heading and paragraphs."""
    typeface, size = _typeface(rng), _font_size(rng, height, width)
    margin = int(width * rng.uniform(0.05, 0.11))
    top = int(height * rng.uniform(0.04, 0.1))
    lines = [_line(sentence(rng, 14), _typeface(rng), round(size * 1.6), margin, top, width - margin)]
    top += round(size * 3.2)
    step = round(size * rng.uniform(1.25, 1.6))
    while top < height - step - size:
        if rng.random() < 0.12:
            top += step // 2
        else:
            lines.append(_line(sentence(rng, width // (size // 2)), typeface, size, margin, top, width - margin))
        top += step
    return [line for line in lines if line], []


def _receipt(rng: Generator, height: int, width: int) -> tuple[list[Line], list[tuple[int, int, int, int]]]:
    """Articles to the left, prices to the right, rules between groups."""
    typeface, size = MONOSPACED[int(rng.integers(3))], _font_size(rng, height, width)
    margin = int(width * rng.uniform(0.06, 0.2))
    price_left = int(width - margin - size * 6)
    lines, rules = [_line(sentence(rng, 10), typeface, round(size * 1.5), margin, size, width - margin)], []
    top, step = size * 4, round(size * rng.uniform(1.3, 1.7))
    while top < height - step - size:
        if rng.random() < 0.1:
            rules.append((margin, top + step // 2, width - margin, top + step // 2))
        else:
            name = label(rng) if rng.random() < 0.3 else sentence(rng, int(rng.integers(5, 16)))
            lines.append(_line(name, typeface, size, margin, top, price_left - size))
            lines.append(_line(number(rng), typeface, size, price_left, top, width - 4))
        top += step
    return [line for line in lines if line], rules


def _form(rng: Generator, height: int, width: int) -> tuple[list[Line], list[tuple[int, int, int, int]]]:
    """Labelled fields in one or two columns over rules."""
    names, values = _typeface(rng), _typeface(rng)
    size, columns = _font_size(rng, height, width), int(rng.integers(1, 3)) if width > 300 else 1
    margin = int(width * 0.06)
    lines, rules = [_line(sentence(rng, 12), _typeface(rng), round(size * 1.7), margin, size, width - margin)], []
    step = round(size * rng.uniform(2.2, 3.0))
    for column in range(columns):
        left = margin + column * (width - margin) // columns
        right = margin + (column + 1) * (width - margin) // columns - margin // 2
        for top in range(size * 4, height - step, step):
            start = left + round((right - left) * 0.45)
            lines.append(_line(label(rng) + ":", names, size, left, top, start - size // 2))
            value = number(rng) if rng.random() < 0.6 else sentence(rng, 8)
            lines.append(_line(value, values, size, start, top, right))
            rules.append((left, top + round(size * 1.5), right, top + round(size * 1.5)))
    return [line for line in lines if line], rules
