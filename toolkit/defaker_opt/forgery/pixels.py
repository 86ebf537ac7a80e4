"""Small operations on pictures. uint8 between them, and resampling by Pillow: both round alike on all machines."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage

from defaker_opt.forgery import Mask, Pixels

Floats = NDArray[np.float32]


def to_pixels(values: Floats) -> Pixels:
    """Round and clip to 0…255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def resize(pixels: Pixels, width: int, height: int, resample: Image.Resampling) -> Pixels:
    """Resample to [height, width, …], antialiased when it shrinks."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample))


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """Gaussian blur, sigma in pixels; of a picture [h, w, 3] or one channel [h, w]."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def sharpen(pixels: Pixels, radius: float, percent: int) -> Pixels:
    """Unsharp mask."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.UnsharpMask(radius, percent, 0)))


def add_noise(rng: Generator, pixels: Pixels, sigma: float) -> Pixels:
    """White Gaussian noise, sigma in grey values."""
    return to_pixels(pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(sigma))


def smooth_field(rng: Generator, height: int, width: int, cells: int) -> Floats:
    """A smooth random surface [height, width] of about unit variance, with `cells` bumps along the longer side."""
    longest = max(height, width)
    rows, columns = max(2, cells * height // longest + 1), max(2, cells * width // longest + 1)
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def recompress(pixels: Pixels, quality: int, offset: tuple[int, int] = (0, 0)) -> Pixels:
    """Give a picture a JPEG past; offset (rows, columns), 0…7 each, is where the 8x8 grid of that past begins."""
    rows, columns = offset
    padded = np.pad(pixels, ((rows, 0), (columns, 0), (0, 0)), mode="edge")
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling=2 if quality < 90 else 0)
    with Image.open(file) as decoded:
        return np.ascontiguousarray(np.asarray(decoded.convert("RGB"))[rows:, columns:])


def feather(mask: Mask, width: float) -> Floats:
    """Opacity 0…1 [h, w], zero outside the mask, rising over about `width` pixels inside it; 0 gives a hard border."""
    if width <= 0:
        return mask.astype(np.float32)
    soft = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(width / 2)))
    opacity = np.clip((soft.astype(np.float32) - 120) / np.float32(120), np.float32(1 / 16), 1)
    return np.where(mask, opacity, np.float32(0))


def blend(base: Pixels, patch: Pixels, opacity: Floats) -> Pixels:
    """Put `patch` over `base`; opacity [h, w] in 0…1. Where it is 0 the base is kept to the bit."""
    below = base.astype(np.float32)
    return to_pixels(below + opacity[..., None] * (patch.astype(np.float32) - below))


def match_colour(patch: Pixels, patch_mask: Mask, base: Pixels, base_mask: Mask, strength: float) -> Pixels:
    """Move mean and spread of each channel of the patch towards those of the base, by strength 0…1.

    Reinhard et al. 2001, in sRGB instead of lαβ; the spread changes at most by a factor 0.5…2.
    """
    inside, target = patch[patch_mask].astype(np.float32), base[base_mask].astype(np.float32)  # [n, 3]
    if not len(inside) or not len(target):
        return patch
    ratio = np.clip((target.std(0) + 4) / (inside.std(0) + 4), 0.5, 2)
    gain = 1 + strength * (ratio - 1)
    centre = inside.mean(0)
    shifted = centre + strength * (target.mean(0) - centre)
    return to_pixels(((patch - centre) * gain + shifted).astype(np.float32))


def cut_patch(
    pixels: Pixels, centre: tuple[float, float], shape: tuple[int, int], rotation: float, scale: float
) -> Pixels:
    """Resample a box of `shape` (rows, columns) around `centre` (x, y), turned by `rotation` radians.

    scale > 1 enlarges. Beyond the border the picture is mirrored.
    """
    height, width = shape
    cosine, sine = math.cos(rotation) / scale, math.sin(rotation) / scale
    reach_x = (abs(cosine) * width + abs(sine) * height) / 2 + 2
    reach_y = (abs(sine) * width + abs(cosine) * height) / 2 + 2
    x, y = centre
    margins = (reach_y - y, y + reach_y - pixels.shape[0]), (reach_x - x, x + reach_x - pixels.shape[1])
    (top, bottom), (left, right) = ((max(0, math.ceil(a)), max(0, math.ceil(b))) for a, b in margins)
    if top or bottom or left or right:
        pixels = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    x, y = x + left, y + top
    matrix = (
        *(cosine, -sine, x - cosine * width / 2 + sine * height / 2),
        *(sine, cosine, y - sine * width / 2 - cosine * height / 2),
    )
    source = Image.fromarray(pixels)
    return np.asarray(source.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def fill_smoothly(pixels: Floats, known: Mask) -> Floats:
    """Continue known values [h, w, c] smoothly into the unknown ones (pull-push; Gortler et al. 1996, section 4.4)."""
    weight = known.astype(np.float32)[..., None]
    return np.where(known[..., None], pixels, _pull_push(pixels * weight, weight))


def _pull_push(total: Floats, weight: Floats) -> Floats:
    height, width = total.shape[:2]
    if min(height, width) <= 2 or weight.min() > 0:
        return _normalized(total, weight)
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    coarse_total, coarse_weight = (_halve(np.pad(plane, pad)) for plane in (total, weight))
    coarse = _pull_push(coarse_total, coarse_weight)
    size = (coarse.shape[1] * 2, coarse.shape[0] * 2)
    channels = [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BILINEAR)) for c in np.rollaxis(coarse, 2)]
    guess = np.stack(channels, axis=-1)[:height, :width]
    trust = np.minimum(weight, np.float32(1))
    return np.asarray(trust * _normalized(total, weight) + (np.float32(1) - trust) * guess, np.float32)


def _normalized(total: Floats, weight: Floats) -> Floats:
    return np.asarray(total / np.maximum(weight, np.float32(1e-6)), np.float32)


def _halve(plane: Floats) -> Floats:
    return plane[0::2, 0::2] + plane[1::2, 0::2] + plane[0::2, 1::2] + plane[1::2, 1::2]


def bounding_box(mask: Mask, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns around the True pixels; the mask has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return (
        slice(max(0, int(rows[0]) - margin), min(height, int(rows[-1]) + 1 + margin)),
        slice(max(0, int(columns[0]) - margin), min(width, int(columns[-1]) + 1 + margin)),
    )


def largest_part(mask: Mask) -> Mask:
    """The largest connected part, its holes filled; empty if the mask is."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    filled: Mask = ndimage.binary_fill_holes(labels == int(sizes.argmax()))
    return filled
