"""Named sets of forgeries: described by YAML in `calibration/`, made on first use, kept in a cache folder.

    <cache>/<name>-<hash of what was asked for>/
        000012.json      the facts of pair 12, written after its files: what it names is complete
        000012-0.jpg     its authentic twin; 000012-1.jpg and 000012-1-mask.png its forged one
        set.json         written last: how the images agree with the YAML's digest

A file that is missing is made again; one that changed since it was written is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from defaker_opt import strict
from defaker_opt.catalog import find_yaml
from defaker_opt.errors import ConfigError, DefakerError, write_failure
from defaker_opt.forgery import DOMAINS, GENERATOR_VERSION, Example, Split
from defaker_opt.forgery.cache import CachedExample, CachedPair, load_cached_pair, load_example, write_pair, write_whole
from defaker_opt.forgery.generate import LARGEST_SIZE, SMALLEST_SIZE, make_pair
from defaker_opt.forgery.sketch import Agreement, compare, load_sketches
from defaker_opt.forgery.sources import Library, load_library
from defaker_opt.progress import Progress


def _wrong_count(images: int) -> str | None:
    step = 2 * len(DOMAINS)
    right = images > 0 and images % step == 0
    return None if right else f"must be a multiple of {step} (domains x labels), got {images}"


def _wrong_size(size: int) -> str | None:
    return None if SMALLEST_SIZE <= size <= LARGEST_SIZE else f"must be {SMALLEST_SIZE}…{LARGEST_SIZE} px, got {size}"


@dataclass(frozen=True)
class SetSpec:
    """A set as its YAML says. images: how many, half of them forged; size: longest side, px.

    digest: sha256 over the pixels and masks of all images; made_with: the versions that drew them.
    """

    description: str
    seed: int
    images: int
    size: int
    split: Split
    digest: str = ""
    made_with: dict[str, str] = field(default_factory=dict)

    CHECKS: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {
        "images": _wrong_count,
        "size": _wrong_size,
        "seed": lambda seed: None if seed >= 0 else f"must be 0 or more, got {seed}",
    }

    @property
    def key(self) -> str:
        """A short hash of all that decides the pixels."""
        asked = [GENERATOR_VERSION, self.seed, self.images, self.size, self.split]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Verified:
    """What set.json says: the digest of the YAML, that of the images, and how they agree."""

    expected: str
    found: str
    agreement: Agreement


@dataclass(frozen=True)
class ForgerySet:
    """A complete set on disk; images are decoded when asked for, authentic ones at even places.

    agreement says how the images compare with those the YAML's digest was taken from.
    """

    name: str
    spec: SetSpec
    folder: Path
    rows: tuple[CachedExample, ...] = field(repr=False)
    agreement: Agreement

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return load_example(self.folder, self.rows[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def load_spec(name: str) -> tuple[SetSpec, Path]:
    """A shipped set's description by name, or any by path; with its file. Raises DefakerError."""
    path = find_yaml("calibration", name, "set")
    return strict.read_value(SetSpec, strict.read_yaml(path), path), path


def load_set(name: str, cache_folder: Path, progress: Progress, workers: int = 0) -> ForgerySet:
    """Open a set, making first what the cache lacks; workers: threads, 0 for one a core.

    Raises DefakerError if a cached file changed, the images are not those the digest was taken from, or the folder
    cannot be written. What was made before an interruption is kept.
    """
    spec, path = load_spec(name)
    if not spec.digest:
        raise ConfigError(path, [f"digest: missing; run: python -m defaker_opt.forgery {name}"])
    rows = fill_cache(spec, path.stem, cache_folder, progress, workers)
    folder = _set_folder(spec, path.stem, cache_folder)
    verified = _verified(folder / "set.json", spec.digest, rows_digest(rows))
    if verified is None:
        verified = _Verified(spec.digest, rows_digest(rows), _agreement(spec, path, folder, rows, progress))
        write_whole(folder / "set.json", json.dumps(dataclasses.asdict(verified), indent=1).encode())
    return ForgerySet(path.stem, spec, folder, rows, verified.agreement)


def _verified(file: Path, expected: str, found: str) -> _Verified | None:
    """What an earlier load found out about the same images, if there was one."""
    if not file.is_file():
        return None
    try:
        verified = strict.read_json(_Verified, file)
    except ConfigError as error:
        raise DefakerError(f"{error}\n  delete it and run again; the images are then compared anew") from error
    return verified if (verified.expected, verified.found) == (expected, found) else None


def _agreement(
    spec: SetSpec, path: Path, folder: Path, rows: tuple[CachedExample, ...], progress: Progress
) -> Agreement:
    if rows_digest(rows) == spec.digest:
        return Agreement(len(rows), 0, 0)
    examples = (load_example(folder, row) for row in rows)
    return compare(path, load_sketches(path, len(rows)), examples, spec.made_with, progress)


def rows_digest(rows: tuple[CachedExample, ...]) -> str:
    """sha256 over the digests of all images in order."""
    return hashlib.sha256("".join(row.pixels for row in rows).encode()).hexdigest()


def fill_cache(
    spec: SetSpec, name: str, cache_folder: Path, progress: Progress, workers: int
) -> tuple[CachedExample, ...]:
    """Make the pairs that the cache lacks; the facts of all images in order."""
    folder, count = _set_folder(spec, name, cache_folder), spec.images // 2
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    found = {index: pair for index in range(count) if (pair := load_cached_pair(folder, index)) is not None}
    missing = [index for index in range(count) if index not in found]
    if missing:
        found.update(_make_missing(spec, name, folder, missing, progress, workers))
    return tuple(example for index in range(count) for example in found[index].examples)


def _make_missing(
    spec: SetSpec, name: str, folder: Path, missing: list[int], progress: Progress, workers: int
) -> dict[int, CachedPair]:
    library: Library = load_library()
    made: dict[int, CachedPair] = {}

    def make(index: int) -> CachedPair:
        return write_pair(folder, index, make_pair(spec.seed, index, spec.split, library, spec.size))

    executor = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        for index, pair in zip(missing, executor.map(make, missing)):
            made[index] = pair
            progress(f"make {name}", len(made) / len(missing))
    finally:
        # An interrupted run ends with the pairs in hand, not with all that were queued.
        executor.shutdown(cancel_futures=True)
    return made


def _set_folder(spec: SetSpec, name: str, cache_folder: Path) -> Path:
    return cache_folder / f"{name}-{spec.key}"
