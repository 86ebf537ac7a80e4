"""Labelled pictures that methods may look at: a set of ours or a table of the user's, refused unless it is fit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from defaker_opt.benchmarks import Item, Locator
from defaker_opt.benchmarks.load import load_suite_file
from defaker_opt.benchmarks.members import read_bytes
from defaker_opt.benchmarks.read import read_image
from defaker_opt.catalog import yaml_names
from defaker_opt.errors import PassError, SuiteError
from defaker_opt.forgery.sets import load_set, load_spec
from defaker_opt.forgery.sketch import load_sketches

# Told what is being done and how much of it is behind us, 0…1.
Progress = Callable[[str, float], None]

# What `calibration: embedded` means.
EMBEDDED = "embedded"
_EMBEDDED_SET = "calibration"

# Fewer pictures give statistics of these pictures rather than of pictures; fewer of one label are one-sided.
FEWEST = 32
SMALLEST_SHARE = 0.2

# Two pictures are one if the mean colours of all their 4x4 cells are this near, in grey values. Measured: saved again
# as JPEG 70 at 0.75 of their size they stay within 6; the nearest of different pictures of our own sets are 11 apart.
_SAME_COLOURS = 7
_COLOURS = slice(12, 60)


@dataclass(frozen=True)
class Samples:
    """Pictures in a fixed order. digest: SHA-256 over their encoded bytes, in order."""

    name: str
    digest: str
    items: tuple[Item, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def as_json(self) -> dict[str, str | int]:
        """The form the manifest keeps."""
        return {"name": self.name, "images": len(self), "sha256": self.digest}

    def images(self) -> Iterator[Image.Image]:
        """All pictures as RGB, decoded one at a time. Raises SuiteError."""
        return (read_image(item) for item in self.items)


def load_samples(name: str, cache_folder: Path, progress: Progress) -> Samples:
    """The set `embedded`, another set of ours by name, or a table by the path of its CSV file.

    Raises SuiteError if it is too small or one-sided, or has a picture of a shipped test set in it.
    """
    items = _table(name) if Path(name).suffix == ".csv" else _set(name, cache_folder, progress)
    _refuse_small_or_one_sided(name, items)
    samples = Samples(name, _digest(items), items)
    _refuse_test_pictures(samples)
    return samples


def require_named(recipe: str, calibration: str | None, looks: list[str]) -> None:
    """Raise PassError if passes look at pictures, for the reasons given, and the recipe names none."""
    if looks and calibration is None:
        raise PassError(
            f"recipe {recipe}: {'; '.join(looks)} must look at pictures, and none are named; "
            "add calibration: embedded, or the path of a CSV table of your own"
        )


def expected_samples(name: str) -> tuple[int, int]:
    """How many pictures `load_samples` would give, and their longest side in px, 0 if unknown; nothing is drawn."""
    if Path(name).suffix == ".csv":
        return len(_table(name)), 0
    spec, _ = load_spec(_EMBEDDED_SET if name == EMBEDDED else name)
    return spec.images, spec.size


def _table(name: str) -> tuple[Item, ...]:
    table = load_suite_file(Path(name), None)
    if table.problems:
        raise SuiteError(f"calibration {name}: {table.problems[0]}; calibration leaves no picture out")
    return table.items


def suite_of(name: str) -> str:
    """What suites call the pictures of a calibration set: there `embedded` is another set."""
    return _EMBEDDED_SET if name == EMBEDDED else name


def _set(name: str, cache_folder: Path, progress: Progress) -> tuple[Item, ...]:
    set_name = suite_of(name)
    spec, _ = load_spec(set_name)
    if spec.split == "test":
        raise SuiteError(
            f"calibration {name}: made of photographs that builds are tested on, which would hide drift; "
            f"use {EMBEDDED}, a set with split: calibration, or a CSV table of your own"
        )
    images = load_set(set_name, cache_folder / "forgeries", progress)
    return tuple(
        Item(
            key=Path(row.file).stem,
            image=Locator(images.folder / row.file),
            label=row.label,
            slices=MappingProxyType({"domain": row.domain}),
        )
        for row in images.rows
    )


def _refuse_small_or_one_sided(name: str, items: tuple[Item, ...]) -> None:
    if len(items) < FEWEST:
        raise SuiteError(f"calibration {name}: {len(items)} pictures are too few, at least {FEWEST} are needed")
    for label, word in ((0, "authentic"), (1, "forged")):
        count = sum(item.label == label for item in items)
        if count < SMALLEST_SHARE * len(items):
            raise SuiteError(
                f"calibration {name}: only {count} of {len(items)} pictures are {word}; methods would fit the others, "
                f"so at least {SMALLEST_SHARE:.0%} must be"
            )
    domains = Counter(item.slices.get("domain", "") for item in items)
    if len(domains) == 1 and "" not in domains:
        raise SuiteError(
            f"calibration {name}: all pictures are of the domain {next(iter(domains))!r}; add pictures of another one"
        )


def _digest(items: tuple[Item, ...]) -> str:
    whole = hashlib.sha256()
    for item in items:
        whole.update(hashlib.sha256(read_bytes(item.image)).digest())
    return whole.hexdigest()


def _refuse_test_pictures(samples: Samples) -> None:
    """Compare with the sketches of shipped test sets, whose pictures need not be there for that."""
    own = np.stack([_colours(image) for image in samples.images()]).astype(np.int16)
    for set_name, path in yaml_names("calibration").items():
        spec, _ = load_spec(set_name)
        if spec.split != "test":
            continue
        known = load_sketches(path, spec.images)[:, _COLOURS].astype(np.int16)
        for item, colours in zip(samples.items, own):
            same = np.flatnonzero(np.abs(known - colours).max(axis=1) <= _SAME_COLOURS)
            if len(same):
                raise SuiteError(
                    f"calibration {samples.name}: {item.key} is picture {same[0]} of the test set {set_name}, which "
                    "would hide drift; take it out"
                )


def _colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((4, 4), Image.Resampling.BOX)).ravel()
