"""(seed, index, split) → a pair: a pure function, so any worker may make any pair."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from defaker_opt.errors import DefakerError, one_of
from defaker_opt.forgery import (
    DOMAINS,
    GLOBAL_DOMAINS,
    SPLITS,
    CodecFacts,
    Edit,
    Example,
    Pair,
    Pixels,
    Split,
)
from defaker_opt.forgery.canvas import Order
from defaker_opt.forgery.codec import decode, draw_codec, encode, resample
from defaker_opt.forgery.domains import Domain, aigc, deepfake, document, natural
from defaker_opt.forgery.sources import Library
from defaker_opt.forgery.traces import leave_trace

# Forged share of a locally forged picture.
SMALLEST_AREA = 0.003
SMALL_BELOW = 0.02
LARGEST_AREA = 0.6

SMALLEST_SIZE, LARGEST_SIZE = 192, 1024  # longest side of a canvas, px

# Draws before giving up; each starts from the photographs again, and one in a few fails by its area.
ATTEMPTS = 60

# A forgery that moves fewer grey values than this, on average over its mask, did not change what the picture shows.
FAINTEST_LOCAL_CHANGE = 4.0
FAINTEST_GLOBAL_CHANGE = 2.0

_DOMAINS: MappingProxyType[str, Domain] = MappingProxyType(
    {
        "natural": cast("Domain", natural),
        "document": cast("Domain", document),
        "deepfake": cast("Domain", deepfake),
        "aigc": cast("Domain", aigc),
    }
)


@dataclass(frozen=True)
class Draft:
    """A pair before its codec: outside edit.mask its twins are equal to the bit."""

    edit: Edit
    codec: CodecFacts
    domain: str
    operation: str


def make_example(seed: int, index: int, split: Split, library: Library, size: int = 512) -> Example:
    """Example `index`: even ones are authentic, odd ones their forged twins. Raises DefakerError as `make_pair`."""
    pair = make_pair(seed, index // 2, split, library, size)
    return pair.forged if index % 2 else pair.authentic


def make_pair(seed: int, index: int, split: Split, library: Library, size: int = 512) -> Pair:
    """Pair `index`, 0…; domains take turns. size: the longest side of a picture is at most this, px.

    Raises DefakerError for an impossible split, size or index, and if no forgery can be made from the photographs.
    """
    draft = make_draft(seed, index, split, library, size)
    edit = draft.edit
    none = np.zeros_like(edit.mask)
    facts = (draft.domain, draft.operation, edit.sources, draft.codec)
    files = [encode(pixels, draft.codec) for pixels in (edit.authentic, edit.forged)]
    authentic = Example(decode(files[0]), none, 0, *facts, files[0])
    return Pair(authentic, Example(decode(files[1]), edit.mask, 1, *facts, files[1]))


def make_draft(seed: int, index: int, split: Split, library: Library, size: int = 512) -> Draft:
    """Pair `index` before its codec; see `make_pair`."""
    _check(seed, index, split, size)
    domain = DOMAINS[index % len(DOMAINS)]
    turn = index // len(DOMAINS)
    operations = list(_DOMAINS[domain].OPERATIONS)
    # Small forgeries come every fourth turn; the second term keeps them from meeting the same operation each time.
    operation = operations[(turn + turn // 4) % len(operations)]
    small = turn % 4 == 0
    for attempt in range(ATTEMPTS):
        rng = _generator(seed, index, split, attempt)
        codec = draw_codec(rng)
        largest = _DOMAINS[domain].OPERATIONS[operation]
        order = Order(rng, library, split, operation, size, _draw_area(rng, small, largest))
        edit = _DOMAINS[domain].forge(order)
        if domain not in GLOBAL_DOMAINS:
            edit = leave_trace(rng, edit)
        edit = resample(edit, codec, size)
        if _acceptable(edit, domain, small):
            return Draft(edit, codec, domain, operation)
    raise DefakerError(
        f"pair {index} of split {split}: no {operation} forgery of the wanted area could be made in {ATTEMPTS} draws "
        "from these photographs; add larger or less uniform ones"
    )


def _check(seed: int, index: int, split: Split, size: int) -> None:
    if split not in SPLITS:
        raise DefakerError(f"split: {one_of(split, SPLITS)}")
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise DefakerError(f"size: {size} px is not in {SMALLEST_SIZE}…{LARGEST_SIZE}; choose one that is")
    if seed < 0 or index < 0:
        raise DefakerError(f"seed {seed} and index {index}: both must be 0 or more")


def _generator(seed: int, index: int, split: Split, attempt: int) -> Generator:
    return Generator(PCG64(SeedSequence([seed, SPLITS.index(split), index, attempt])))


def _draw_area(rng: Generator, small: bool, largest: float) -> float:
    if small:
        return float(rng.uniform(1.15 * SMALLEST_AREA, 0.88 * SMALL_BELOW))
    return math.exp(rng.uniform(math.log(1.15 * SMALL_BELOW), math.log(max(largest, 1.2 * SMALL_BELOW))))


def _acceptable(edit: Edit, domain: str, small: bool) -> bool:
    """The area is as wanted, and the forgery changed something."""
    area = float(edit.mask.mean())
    low, high = (SMALLEST_AREA, SMALL_BELOW) if small else (SMALL_BELOW, LARGEST_AREA)
    local = domain not in GLOBAL_DOMAINS
    if local and not low <= area < high:
        return False
    moved = np.abs(edit.forged[edit.mask].astype(np.int16) - edit.authentic[edit.mask])
    faintest = FAINTEST_LOCAL_CHANGE if local else FAINTEST_GLOBAL_CHANGE
    return float(moved.mean()) >= faintest and float((moved > 0).any(-1).mean()) >= 0.4


def digest(image: Pixels, mask: np.typing.NDArray[np.bool_]) -> str:
    """sha256 of the decoded pixels and the mask, with their shape."""
    content = hashlib.sha256(np.array(image.shape, "<i8").tobytes())
    content.update(np.ascontiguousarray(image).tobytes())
    content.update(np.packbits(mask).tobytes())
    return content.hexdigest()
