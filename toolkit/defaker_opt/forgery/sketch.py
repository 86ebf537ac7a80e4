"""Sketches: a few bytes an image, to tell rounding on another machine from another set.

Decoders, text rendering and vectorised functions may round differently from machine to machine, and a digest cannot
say by how much. So each set comes with `<name>.sketch.npy`, uint8 [images, 76]:

    0…7     first bytes of the image's digest
    8…11    height and width, 16 bits each, little endian
    12…59   mean colour of 4x4 cells
    60…75   forged share of 4x4 cells, 255 = all

An image agrees if its size is the same, its colours are within COLOUR_TOLERANCE grey values and its shares within
SHARE_TOLERANCE / 255. One image in MOST_BEYOND may disagree: where a threshold falls between two roundings, a
forgery is drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.errors import DefakerError
from defaker_opt.forgery import Example
from defaker_opt.forgery.generate import digest
from defaker_opt.progress import Progress

Sketches = NDArray[np.uint8]  # [images, 76]

COLOUR_TOLERANCE = 2
SHARE_TOLERANCE = 3
MOST_BEYOND = 100

PACKAGES = ("numpy", "scipy", "pillow", "scikit-image", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class Agreement:
    """identical + rounded + redrawn = all images: equal to the bit, within the tolerance, beyond it."""

    identical: int
    rounded: int
    redrawn: int


def draw_sketch(example: Example) -> NDArray[np.uint8]:
    """The 76 bytes of one image."""
    height, width = example.mask.shape
    colours = Image.fromarray(example.image).resize((4, 4), Image.Resampling.BOX)
    shares = Image.fromarray(example.mask.astype(np.uint8) * 255).resize((4, 4), Image.Resampling.BOX)
    return np.concatenate(
        [
            np.frombuffer(bytes.fromhex(digest(example.image, example.mask)[:16]), np.uint8),
            np.array([height, width], "<u2").view(np.uint8),
            np.asarray(colours).ravel(),
            np.asarray(shares).ravel(),
        ]
    )


def sketch_path(yaml: Path) -> Path:
    """Where the sketches of a set lie."""
    return yaml.with_name(f"{yaml.stem}.sketch.npy")


def load_sketches(yaml: Path, images: int) -> Sketches:
    """Read the sketches of a set. Raises DefakerError if they are missing or of another set."""
    path = sketch_path(yaml)
    again = f"run: python -m defaker_opt.forgery {yaml}"
    try:
        sketches = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DefakerError(f"{path}: cannot be read ({error}); {again}") from error
    if sketches.shape != (images, 76) or sketches.dtype != np.uint8:
        raise DefakerError(f"{path}: must be uint8 ({images}, 76), got {sketches.dtype} {sketches.shape}; {again}")
    return np.asarray(sketches)


def installed_versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def compare(
    yaml: Path,
    expected: Sketches,
    examples: Iterable[Example],
    made_with: Mapping[str, str],
    progress: Progress,
) -> Agreement:
    """Count how many images agree. Raises DefakerError, naming the first that does not, if too many disagree."""
    identical, rounded, redrawn = 0, 0, 0
    first = ""
    for index, example in enumerate(examples):
        found = draw_sketch(example)
        if np.array_equal(found[:8], expected[index, :8]):
            identical += 1
        elif (problem := _difference(found, expected[index])) is None:
            rounded += 1
        else:
            redrawn += 1
            first = first or f"image {index} ({example.domain}, {example.operation}): {problem}"
        progress(f"compare {yaml.stem}", (index + 1) / len(expected))
    if redrawn * MOST_BEYOND > len(expected):
        raise DefakerError(_too_different(yaml, first, redrawn, len(expected), made_with))
    return Agreement(identical, rounded, redrawn)


def _difference(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> str | None:
    sizes = [tuple(sketch[8:12].view("<u2").tolist()) for sketch in (found, expected)]
    if sizes[0] != sizes[1]:
        return f"{sizes[0]} px high and wide, must be {sizes[1]}"
    apart = np.abs(found.astype(int) - expected)
    colour, share = int(apart[12:60].max()), int(apart[60:].max())
    if colour > COLOUR_TOLERANCE:
        return f"colours differ by up to {colour} grey values, at most {COLOUR_TOLERANCE} are allowed"
    if share > SHARE_TOLERANCE:
        return f"forged areas differ by up to {share}/255 of a cell, at most {SHARE_TOLERANCE}/255 are allowed"
    return None


def _too_different(yaml: Path, first: str, redrawn: int, images: int, made_with: Mapping[str, str]) -> str:
    here = installed_versions()
    versions = [f"{name} {made_with[name]} (here {here.get(name, 'none')})" for name in made_with]
    changed = [text for name, text in zip(made_with, versions) if made_with[name] != here.get(name)]
    return (
        f"{yaml}: {redrawn} of {images} images are not those its digest was taken from; {first}. "
        f"It was made with {', '.join(changed or versions)}; install those versions, or accept these images with: "
        f"python -m defaker_opt.forgery {yaml}"
    )
