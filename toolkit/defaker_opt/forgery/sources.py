"""Photographs to forge: those inside wheels, and any folder; each belongs to one split for good.

Built-in photographs have a fixed split. A user's photograph goes where a hash of its bytes says (7 of 10 train, 1
calibration, 2 test), so it stays there whatever it is called and whatever else is in the folder. Those below a folder
called DOCUMENTS are pages of text, and used as such.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from defaker_opt.errors import DefakerError, ImageError
from defaker_opt.forgery import Pixels, Split
from defaker_opt.runtime.images import load_image

Kind = Literal["photo", "texture", "scan"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")

DOCUMENTS = "documents"

# Pictures are kept at most this long, px: forgeries are no larger, and decoding dominates otherwise.
LONGEST_SIDE = 1024
SHORTEST_SIDE = 64

# Pictures up to this many bytes in all are kept decoded; the rest are decoded each time they are used.
DECODED_BYTES = 2**30

# Wheel → the folder of its photographs.
FOLDERS = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}


@dataclass(frozen=True)
class Photo:
    """One photograph. digest: first 16 hex digits of the file's sha256.

    face: x and y of the middle of a face, its half width and half height, px of the file; None where none is marked.
    """

    name: str
    path: Path
    split: Split
    kind: Kind
    digest: str
    face: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Library:
    """The photographs of all splits. Reads only what it was made from, so it may be shared by threads."""

    photos: tuple[Photo, ...]
    decoded: Mapping[str, Pixels] = field(repr=False, default_factory=dict)

    def of(self, split: Split, kinds: Sequence[Kind]) -> tuple[Photo, ...]:
        """Photographs of a split, of these kinds."""
        return tuple(photo for photo in self.photos if photo.split == split and photo.kind in kinds)

    def pixels(self, photo: Photo) -> Pixels:
        """Decoded, at most LONGEST_SIDE long, [h, w, 3]."""
        kept = self.decoded.get(photo.digest)
        return _decode(photo) if kept is None else kept


# file, split, kind, first 16 digits of sha256, face
_BUILT_IN: tuple[tuple[str, str, Split, Kind, str, tuple[float, float, float, float] | None], ...] = (
    ("skimage", "astronaut.png", "train", "photo", "88431cd9653ccd53", (224, 112, 52, 68)),
    ("skimage", "coffee.png", "train", "photo", "cc02f8ca188b167c", None),
    ("skimage", "camera.png", "train", "photo", "b0793d2adda0fa6a", None),
    ("skimage", "hubble_deep_field.jpg", "train", "photo", "3a19c5dd8a927a93", None),
    ("skimage", "ihc.png", "train", "photo", "f8dd1aa387ddd1f4", None),
    ("sklearn", "china.jpg", "train", "photo", "8378025ad2519d64", None),
    ("skimage", "brick.png", "train", "texture", "7966caf324f6ba84", None),
    ("skimage", "gravel.png", "train", "texture", "c48615b451bf1e60", None),
    ("skimage", "page.png", "train", "scan", "341a6f0a61557662", None),
    ("skimage", "rocket.jpg", "calibration", "photo", "c2dd0de7c538df8d", None),
    ("skimage", "motorcycle_left.png", "calibration", "photo", "db18e9c415761740", None),
    ("skimage", "motorcycle_right.png", "calibration", "photo", "5fc913ae870e42a4", None),
    ("skimage", "moon.png", "calibration", "texture", "78739619d11f7eb9", None),
    ("skimage", "chelsea.png", "test", "photo", "596aa1e7cb875eb7", None),
    ("skimage", "coins.png", "test", "photo", "f8d773fc9cfa6f4d", None),
    ("skimage", "retina.jpg", "test", "texture", "38a07f36f27f095e", None),
    ("sklearn", "flower.jpg", "test", "photo", "a77f6ec41e353afd", None),
    ("matplotlib", "grace_hopper.jpg", "test", "photo", "a8ca6d734765703b", (262, 195, 76, 100)),
    ("skimage", "grass.png", "test", "texture", "b6b6022426b38936", None),
    ("skimage", "text.png", "test", "scan", "bd84aa3a6e3c9887", None),
)


def wheel_folder(wheel: str, inner: str) -> Path:
    """A folder inside an installed package, which is not imported. Raises DefakerError if it is not installed."""
    spec = importlib.util.find_spec(wheel)
    if spec is None or not spec.submodule_search_locations:
        raise DefakerError(
            f"{wheel} is not installed, and the photographs and fonts inside it are what forgeries are made from; "
            "run: pip install 'defaker-opt[forgery]'"
        )
    return Path(spec.submodule_search_locations[0]) / inner


def load_library(folders: Sequence[Path] = ()) -> Library:
    """The built-in photographs and those of the folders, searched recursively for IMAGE_SUFFIXES.

    Raises DefakerError for what cannot be used, every such file at once.
    """
    photos = load_built_in_photos()
    known = {photo.digest: photo for photo in photos}
    for folder in folders:
        for photo in _folder_photos(folder):
            # A copy of a known photograph must not reach a second split, and needs no second entry.
            known.setdefault(photo.digest, photo)
    return _decoded_library(tuple(known.values()))


def load_built_in_photos() -> list[Photo]:
    """The photographs inside wheels. Raises DefakerError if one is missing or is not the one it should be."""
    photos, problems = [], []
    for wheel, file, split, kind, digest, face in _BUILT_IN:
        path = wheel_folder(wheel, FOLDERS[wheel]) / file
        found = _digest(path) if path.is_file() else "no such file"
        if found != digest:
            problems.append(f"{path}: sha256 must begin with {digest}, got {found}")
        photos.append(Photo(path.stem, path, split, kind, digest, face))
    if problems:
        raise DefakerError("\n  ".join(["photographs inside wheels:", *problems, "install the versions of [forgery]"]))
    return photos


def _folder_photos(folder: Path) -> list[Photo]:
    if not folder.is_dir():
        raise DefakerError(f"{folder}: no such folder; give one that holds photographs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise DefakerError(f"{folder}: holds no photograph; files named {', '.join(IMAGE_SUFFIXES)} are looked for")
    photos, problems = [], []
    for path in paths:
        try:
            image = load_image(path)
        except ImageError as error:
            problems.append(str(error))
            continue
        if min(image.size) < SHORTEST_SIDE:
            problems.append(f"{path}: {image.width}x{image.height}; both sides must be at least {SHORTEST_SIDE} px")
        digest = _digest(path)
        name = path.relative_to(folder)
        kind: Kind = "scan" if DOCUMENTS in name.parts[:-1] else "photo"
        photos.append(Photo(name.as_posix(), path, _split_of(digest), kind, digest))
    if problems:
        shown = problems[:10] + [f"… and {len(problems) - 10} more"] * (len(problems) > 10)
        raise DefakerError("\n  ".join([f"{folder}: remove or repair what cannot be used:", *shown]))
    return photos


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DefakerError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def _split_of(digest: str) -> Split:
    share = int(digest, 16) % 10
    return "train" if share < 7 else "calibration" if share == 7 else "test"


def _decode(photo: Photo) -> Pixels:
    image = load_image(photo.path)
    longest = max(image.size)
    if longest > LONGEST_SIDE:
        width, height = (max(1, round(side * LONGEST_SIDE / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _decoded_library(photos: tuple[Photo, ...]) -> Library:
    decoded: dict[str, Pixels] = {}
    used = 0
    for photo in photos:
        pixels = _decode(photo)
        used += pixels.nbytes
        if used > DECODED_BYTES:
            break
        decoded[photo.digest] = pixels
    return Library(photos, decoded)
