"""One pair of a set on disk: its files, and the facts that say when they are complete and unchanged."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from defaker_opt import strict
from defaker_opt.errors import ConfigError, DefakerError, write_failure
from defaker_opt.forgery import CodecFacts, Example, Mask, Pair
from defaker_opt.forgery.codec import SUFFIXES, decode
from defaker_opt.forgery.generate import digest


@dataclass(frozen=True)
class CachedExample:
    """The facts of one image on disk. pixels: `digest` of image and mask; the sha256 are those of the files."""

    file: str
    sha256: str
    mask_file: str | None
    mask_sha256: str | None
    pixels: str
    label: Literal[0, 1]
    domain: str
    operation: str
    sources: tuple[str, ...]
    codec: CodecFacts


@dataclass(frozen=True)
class CachedPair:
    """The authentic example, then the forged one."""

    examples: tuple[CachedExample, ...]


def load_cached_pair(folder: Path, index: int) -> CachedPair | None:
    """A pair's facts, its files checked; None if any is missing. Raises DefakerError for one that changed."""
    facts = folder / f"{index:06d}.json"
    if not facts.is_file():
        return None
    try:
        pair = strict.read_json(CachedPair, facts)
    except ConfigError as error:
        raise DefakerError(f"{error}\n  delete it and run again; pair {index} is then made anew") from error
    for example in pair.examples:
        for file, expected in ((example.file, example.sha256), (example.mask_file, example.mask_sha256)):
            if file is not None and not (folder / file).is_file():
                return None
            if file is not None and expected != hashlib.sha256(_read(folder / file)).hexdigest():
                raise _changed(folder / file)
    return pair


def _changed(path: Path) -> DefakerError:
    return DefakerError(f"{path}: changed since it was written; delete it and run again, it is then made anew")


def write_pair(folder: Path, index: int, pair: Pair) -> CachedPair:
    """Write both examples, then their facts. Raises DefakerError if the folder cannot be written."""
    rows = []
    for example in (pair.authentic, pair.forged):
        file = f"{index:06d}-{example.label}{SUFFIXES[example.codec.format]}"
        mask_file = f"{index:06d}-1-mask.png" if example.label else None
        mask = _mask_bytes(example.mask) if mask_file else None
        write_whole(folder / file, example.file)
        if mask_file and mask:
            write_whole(folder / mask_file, mask)
        rows.append(
            CachedExample(
                file=file,
                sha256=hashlib.sha256(example.file).hexdigest(),
                mask_file=mask_file,
                mask_sha256=hashlib.sha256(mask).hexdigest() if mask else None,
                pixels=digest(example.image, example.mask),
                label=example.label,
                domain=example.domain,
                operation=example.operation,
                sources=example.sources,
                codec=example.codec,
            )
        )
    cached = CachedPair(tuple(rows))
    write_whole(folder / f"{index:06d}.json", json.dumps(dataclasses.asdict(cached), indent=1).encode())
    return cached


def _mask_bytes(mask: Mask) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def load_example(folder: Path, row: CachedExample) -> Example:
    """Decode one example. Raises DefakerError if a file is missing or changed."""
    file = _read(folder / row.file)
    if hashlib.sha256(file).hexdigest() != row.sha256:
        raise _changed(folder / row.file)
    image = decode(file)
    mask = np.zeros(image.shape[:2], bool)
    if row.mask_file is not None:
        encoded = _read(folder / row.mask_file)
        if hashlib.sha256(encoded).hexdigest() != row.mask_sha256:
            raise _changed(folder / row.mask_file)
        with Image.open(io.BytesIO(encoded)) as opened:
            mask = np.asarray(opened).astype(bool)
    return Example(image, mask, row.label, row.domain, row.operation, row.sources, row.codec, file)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DefakerError(f"{path}: cannot be read ({error.strerror or error}); run again to make it anew") from error


def write_whole(path: Path, content: bytes) -> None:
    """All of a file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_failure(path, error) from error
