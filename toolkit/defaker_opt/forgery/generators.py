"""Small fixed autoencoders: pictures come out as from a generator, with the traces its up-sampling leaves.

Each maps [h, w, 3] to the same shape. The traces: uneven overlap of transposed convolutions (Odena et al. 2016),
spectral replicas of nearest-neighbour up-sampling (Durall et al. 2020; Zhang et al. 2019), codes that hold less than
the picture, and sensor noise that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from defaker_opt.forgery import Pixels
from defaker_opt.forgery.pixels import Floats, blur, resize, sharpen, smooth_field, to_pixels


def transposed_upsampler(rng: Generator, pixels: Pixels) -> Pixels:
    """Halve, then a transposed convolution, kernel 4, stride 2, with random uneven weights: a checkerboard."""
    height, width = pixels.shape[:2]
    low = resize(pixels, (width + 1) // 2, (height + 1) // 2, Image.Resampling.BOX).astype(np.float32)
    padded = np.pad(low, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = low.shape[:2]
    out = np.empty((rows * 2, columns * 2, 3), np.float32)
    unevenness = rng.uniform(0.015, 0.05)
    for row in range(2):
        for column in range(2):
            gain = np.float32(1 + rng.normal(0, unevenness))
            near, far = 0.75, 0.25
            phase = np.zeros_like(low)
            for dy, weight_y in ((0, near), (2 * row - 1, far)):
                for dx, weight_x in ((0, near), (2 * column - 1, far)):
                    weight = np.float32(weight_y * weight_x * (1 + rng.normal(0, unevenness)))
                    phase += weight * padded[1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns]
            out[row::2, column::2] = phase * gain
    return sharpen(to_pixels(out[:height, :width]), 1.2, int(rng.integers(40, 130)))


def nearest_upsampler(rng: Generator, pixels: Pixels) -> Pixels:
    """Shrink 2 or 4 times, then stages of nearest-neighbour doubling and a fixed random 3x3 convolution."""
    height, width = pixels.shape[:2]
    stages = 1 if rng.random() < 0.65 else 2
    factor = 2**stages
    values = resize(pixels, math.ceil(width / factor), math.ceil(height / factor), Image.Resampling.LANCZOS)
    for _ in range(stages):
        values = _doubled(rng, values)
    grown = sharpen(values, 1.5, int(rng.integers(50, 140)))
    return _invented_detail(rng, grown[:height, :width], cell=factor)


def pyramid_latent(rng: Generator, pixels: Pixels) -> Pixels:
    """A code four times smaller and a coarsely rounded residual twice smaller, decoded by up-sampling convolutions.

    Nothing finer survives: the smoothing of a VAE's decoder, with steps where a weak residual was rounded away.
    """
    height, width = pixels.shape[:2]
    quarter = resize(pixels, math.ceil(width / 4), math.ceil(height / 4), Image.Resampling.BOX)
    half = resize(pixels, quarter.shape[1] * 2, quarter.shape[0] * 2, Image.Resampling.BOX)
    coarse = _doubled(rng, quarter)
    step = np.float32(rng.uniform(6, 16))
    residual = np.rint((half.astype(np.float32) - coarse) / step) * step
    decoded = _doubled(rng, to_pixels(coarse + residual))[:height, :width]
    return sharpen(decoded, 1.2, int(rng.integers(30, 110)))


def _doubled(rng: Generator, values: Pixels) -> Pixels:
    """Nearest-neighbour doubling, then a fixed random 3x3 convolution that keeps the mean."""
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16 + rng.normal(0, 0.02, (3, 3))
    kernel[1, 1] += rng.uniform(0, 0.35)
    kernel /= kernel.sum()
    grown = Image.fromarray(values.repeat(2, axis=0).repeat(2, axis=1))
    return np.asarray(grown.filter(ImageFilter.Kernel((3, 3), kernel.ravel().tolist(), scale=1.0)))


def wavelet_denoiser(rng: Generator, pixels: Pixels) -> Pixels:
    """Haar coefficients shrunk to zero below a threshold, then a decoder's grain: smooth skin, no sensor noise."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge").astype(np.float32)
    threshold = np.float32(rng.uniform(7, 16))
    smooth = _shrunk(padded, threshold, levels=3)[:height, :width]
    return _invented_detail(rng, blur(to_pixels(smooth), rng.uniform(0.35, 0.6)), cell=2)


def _shrunk(values: Floats, threshold: np.float32, levels: int) -> Floats:
    """One level of the orthonormal Haar transform, its details soft-thresholded (Donoho 1995), and so on below."""
    a, b, c, d = values[0::2, 0::2], values[0::2, 1::2], values[1::2, 0::2], values[1::2, 1::2]
    half = np.float32(0.5)
    mean: Floats = (a + b + c + d) * np.float32(0.25)
    details = [_soft((a + b - c - d) * half, threshold), _soft((a - b + c - d) * half, threshold)]
    details.append(_soft((a - b - c + d) * half, threshold))
    if levels > 1:
        mean = _shrunk(mean, threshold * half, levels - 1)
    first, second, third = (detail * half for detail in details)
    out = np.empty_like(values)
    out[0::2, 0::2] = mean + first + second + third
    out[0::2, 1::2] = mean + first - second - third
    out[1::2, 0::2] = mean - first + second - third
    out[1::2, 1::2] = mean - first - second + third
    return out


def _soft(values: Floats, threshold: np.float32) -> Floats:
    return values - np.clip(values, -threshold, threshold)


def _invented_detail(rng: Generator, pixels: Pixels, cell: int) -> Pixels:
    """Detail on a grid of `cell` px, strongest where the picture has edges: what a decoder makes up."""
    height, width = pixels.shape[:2]
    grain = smooth_field(rng, math.ceil(height / cell), math.ceil(width / cell), max(height, width) // cell)
    grain = grain.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    green = pixels[..., 1]
    edges = np.abs(green.astype(np.float32) - blur(green, 2.0).astype(np.float32))
    strength = np.float32(rng.uniform(0.5, 2.0)) + np.minimum(edges, 20) * np.float32(rng.uniform(0.05, 0.2))
    return to_pixels(pixels.astype(np.float32) + (grain * strength)[..., None])


GENERATORS: Mapping[str, Callable[[Generator, Pixels], Pixels]] = MappingProxyType(
    {
        "transposed_upsampler": transposed_upsampler,
        "nearest_upsampler": nearest_upsampler,
        "pyramid_latent": pyramid_latent,
        "wavelet_denoiser": wavelet_denoiser,
    }
)
