"""The mask over the photo, with the verdict written under it, for people to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defaker_opt.runtime.session import Verdict

_TINT = np.array([230, 30, 40], np.float32)
_TINT_SHARE = 0.45
_OUTLINE = (255, 235, 0)
_BAR = {True: (150, 20, 30), False: (20, 95, 60)}


def draw_overlay(image: Image.Image, verdict: Verdict, trained: bool) -> Image.Image:
    """The RGB picture with the mask tinted red and outlined, and a caption bar below it."""
    pixels = np.asarray(image, np.float32).copy()
    if verdict.mask is not None:
        pixels[verdict.mask] = (1 - _TINT_SHARE) * pixels[verdict.mask] + _TINT_SHARE * _TINT
        pixels[_outline(verdict.mask, max(1, min(image.size) // 300))] = _OUTLINE
    size = max(12, image.width // 40)
    font = ImageFont.load_default(size)
    text = caption(verdict, trained)
    lines = _wrap(text, font, image.width - size)
    bar = Image.new("RGB", (image.width, round(size * (0.7 + 1.35 * len(lines)))), _BAR[verdict.is_fake])
    ImageDraw.Draw(bar).multiline_text((size // 2, size // 3), "\n".join(lines), fill="white", font=font)
    whole = Image.new("RGB", (image.width, image.height + bar.height))
    whole.paste(Image.fromarray(pixels.astype(np.uint8)))
    whole.paste(bar, (0, image.height))
    return whole


def caption(verdict: Verdict, trained: bool) -> str:
    """One line about a verdict."""
    parts = [f"{'FAKE' if verdict.is_fake else 'REAL'}, fake probability {verdict.fake_probability:.1%}"]
    if verdict.mask_area is not None:
        parts.append(f"tampered area {verdict.mask_area:.1%}")
    if not trained:
        parts.append("untrained weights, no verdict to rely on")
    return " - ".join(parts)


def _outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The mask's pixels that have a neighbour outside it within `thickness` rows or columns."""
    inner = mask.copy()
    for step in range(1, thickness + 1):
        inner[step:] &= mask[:-step]
        inner[:-step] &= mask[step:]
        inner[:, step:] &= mask[:, :-step]
        inner[:, :-step] &= mask[:, step:]
    outline: np.ndarray = mask & ~inner
    return outline


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
