"""Labelled pictures to judge builds on: what a benchmark is, however it lies on disk.

registry/<name>.yaml ─► layouts/<layout>.py ─► Benchmark(items, problems) ─► drift
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Polarity = Literal["white-is-forged", "black-is-forged"]


@dataclass(frozen=True)
class Locator:
    """Where an encoded picture lies: a file, or the entry `member` of an archive or database at `path`."""

    path: Path
    member: str = ""


@dataclass(frozen=True)
class MaskRule:
    """How a mask file says "forged". threshold: 0…255, above it (below it for black-is-forged) is forged.

    channel: which one of the decoded RGB counts, "grey" for their luma.
    """

    polarity: Polarity = "white-is-forged"
    threshold: int = 127
    channel: Literal["grey", "red", "green", "blue"] = "grey"


@dataclass(frozen=True)
class Item:
    """One picture. key: unique in its benchmark and the same on every machine; label: 1 forged, 0 authentic.

    mask: None where no mask is given; an authentic picture without one has an empty mask. source: the photograph or
    video it was made from, "" if unknown; pictures of one source are not independent. pair: what twins that differ in
    one forgery share, "" without a twin. slices: further columns, such as domain, generator, operation.
    """

    key: str
    image: Locator
    label: Literal[0, 1]
    mask: Locator | None = None
    mask_rule: MaskRule = MaskRule()
    source: str = ""
    slices: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    pair: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Items in a fixed order. problems: what was left out and why, one line a picture, shown in every report."""

    name: str
    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()
