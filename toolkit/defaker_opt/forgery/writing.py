"""Words, prices and typefaces for pages."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from defaker_opt.forgery.sources import wheel_folder

# Typefaces inside the matplotlib wheel; "" is Pillow's own scalable font.
TYPEFACES = (
    *("", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmtt10"),
)
MONOSPACED = ("DejaVuSansMono", "DejaVuSansMono-Bold", "cmtt10")

# Reaches as high and as low as our texts do.
TALLEST = "Ilpgq$,"

_SYLLABLES = (
    *("an", "ber", "con", "da", "el", "for", "ga", "hin", "il", "jo", "ka", "lo", "mar", "ne", "or", "pra", "qui"),
    *("ra", "sen", "ti", "un", "va", "wes", "ex", "yor", "zen", "tion", "ment", "ing", "er", "al", "ous", "re", "st"),
)
_LABELS = (
    *("Total", "Date", "Name", "Invoice", "Amount", "Account", "Tax", "Number", "Balance", "Order", "Reference"),
    *("Address", "Phone", "Subtotal", "Cash", "Change", "Valid until", "Born", "Policy", "Customer", "Due"),
)


@lru_cache(maxsize=256)
def load_font(typeface: str, size: int) -> ImageFont.FreeTypeFont:
    """A typeface at a size in px; laid out without shaping, which depends on what else is installed."""
    if typeface:
        path = wheel_folder("matplotlib", "mpl-data/fonts/ttf") / f"{typeface}.ttf"
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def word(rng: Generator) -> str:
    """One to four syllables, a capital at times."""
    text = "".join(_SYLLABLES[i] for i in rng.integers(0, len(_SYLLABLES), int(rng.integers(1, 5))))
    return text.capitalize() if rng.random() < 0.2 else text


def label(rng: Generator) -> str:
    """The name of a field."""
    return _LABELS[int(rng.integers(len(_LABELS)))]


def number(rng: Generator) -> str:
    """A price, a date, a long number or a percentage."""
    kind = int(rng.integers(5))
    if kind == 0:
        return f"{rng.integers(1, 29):02d}/{rng.integers(1, 13):02d}/{rng.integers(1990, 2030)}"
    if kind == 1:
        return "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(6, 13))))
    if kind == 2:
        return f"{rng.integers(1, 100)}.{rng.integers(0, 10)} %"
    return f"{'$' if kind == 3 else ''}{rng.integers(1, 10 ** int(rng.integers(2, 5))):,}.{rng.integers(0, 100):02d}"


def sentence(rng: Generator, characters: int) -> str:
    """Words and now and then a number, at least so many characters."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < characters:
        words.append(number(rng) if rng.random() < 0.12 else word(rng))
    return " ".join(words)


def text_coverage(text: str, typeface: str, size: int) -> NDArray[np.uint8]:
    """Ink of one line of text, 0…255, [height, width]: as wide as the text, as high as any text of this font."""
    font = load_font(typeface, size)
    width, height = text_extent(text, typeface, size)
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((-font.getbbox(text)[0], -font.getbbox(TALLEST)[1]), text, fill=255, font=font)
    return np.asarray(ink)


def text_extent(text: str, typeface: str, size: int) -> tuple[int, int]:
    """Width and height of the box of a line of text, px, at least 1x1; the height depends on the font only."""
    font = load_font(typeface, size)
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox(TALLEST)
    return max(1, int(right - left)), max(1, int(bottom - top))
