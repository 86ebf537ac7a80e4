"""What happens to pictures between the forger and the detector, at stated levels: pure functions, masks following.

jpeg-Q: saved again as JPEG of quality Q, 4:2:0. resize-F: both sides times F, bicubic, the mask by nearest neighbour.
blur-S: Gaussian of standard deviation S px. noise-S: independent Gaussian noise of S grey values, drawn from the item's
key. brightness-F: values times F. contrast-F: distance from the picture's mean luma times F. saturation-F: distance
from the pixel's own luma times F.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from defaker_opt.errors import SuiteError, one_of

NONE = "none"

LEVELS: MappingProxyType[str, tuple[float, ...]] = MappingProxyType(
    {
        "jpeg": (95, 85, 70, 50),
        "resize": (0.75, 0.5),
        "blur": (1, 2),
        "noise": (3, 8),
        "brightness": (0.7, 1.3),
        "contrast": (0.7, 1.3),
        "saturation": (0.5, 1.5),
    }
)
NAMES = tuple(f"{kind}-{level:g}" for kind, levels in LEVELS.items() for level in levels)

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def parse_perturbations(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of perturbations, each once and in the order of `NAMES`.

    A text is a name ("jpeg-70"), a kind with all its levels ("jpeg"), or "all". Raises SuiteError.
    """
    wanted: set[str] = set()
    for text in texts:
        if text not in NAMES and text not in LEVELS and text != "all":
            raise SuiteError(f"perturbation {one_of(text, [*NAMES, *LEVELS, 'all'])}")
        wanted |= {name for name in NAMES if text in ("all", name, name.partition("-")[0])}
    return tuple(name for name in NAMES if name in wanted)


def perturb(
    name: str, image: Image.Image, mask: NDArray[np.bool_] | None, key: str
) -> tuple[Image.Image, NDArray[np.bool_] | None]:
    """Apply a perturbation to an RGB picture and its mask [height, width]; `NONE` changes nothing."""
    if name == NONE:
        return image, mask
    kind, _, level = name.partition("-")
    changed = _KINDS[kind](image, float(level), key)
    if mask is None or changed.size == image.size:
        return changed, mask
    resized = Image.fromarray(mask).resize(changed.size, Image.Resampling.NEAREST)
    return changed, np.asarray(resized)


def _jpeg(image: Image.Image, quality: float, _: str) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _resize(image: Image.Image, factor: float, _: str) -> Image.Image:
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _blur(image: Image.Image, deviation: float, _: str) -> Image.Image:
    return _picture(ndimage.gaussian_filter(_values(image), (deviation, deviation, 0), mode="nearest"))


def _noise(image: Image.Image, deviation: float, key: str) -> Image.Image:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    values = _values(image)
    return _picture(values + np.random.Generator(np.random.PCG64(seed)).normal(0, deviation, values.shape))


def _brightness(image: Image.Image, factor: float, _: str) -> Image.Image:
    return _picture(_values(image) * factor)


def _contrast(image: Image.Image, factor: float, _: str) -> Image.Image:
    values = _values(image)
    middle = (values @ _LUMA).mean()
    return _picture(middle + factor * (values - middle))


def _saturation(image: Image.Image, factor: float, _: str) -> Image.Image:
    values = _values(image)
    grey = (values @ _LUMA)[..., None]
    return _picture(grey + factor * (values - grey))


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, np.float64)  # [height, width, 3], 0…255


def _picture(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


_KINDS: MappingProxyType[str, Callable[[Image.Image, float, str], Image.Image]] = MappingProxyType(
    {
        "jpeg": _jpeg,
        "resize": _resize,
        "blur": _blur,
        "noise": _noise,
        "brightness": _brightness,
        "contrast": _contrast,
        "saturation": _saturation,
    }
)
