"""What is known about each benchmark: `registry/<name>.yaml`, read strictly into a frozen value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from defaker_opt import strict
from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import Layout
from defaker_opt.benchmarks.patterns import wrong_pattern
from defaker_opt.catalog import find_module, find_yaml, module_names, yaml_names

REGISTRY = "benchmarks/registry"

Domain = Literal["aigc", "deepfake", "document", "natural"]
Metric = Literal[
    "accuracy", "balanced-accuracy", "auc", "ap", "eer", "f1", "pixel-f1", "pixel-best-f1", "pixel-iou", "pixel-auc"
]


@dataclass(frozen=True)
class Counts:
    """How many there should be, as far as anybody says so; None where nobody does.

    of: pictures, or the videos that frames come from. evidence: list (the authors' own files), paper (or a data card,
    or another project's documents), memory (nobody looked it up: a hint).
    """

    evidence: Literal["list", "paper", "memory"]
    authentic: int | None = None
    forged: int | None = None
    total: int | None = None
    of: Literal["images", "videos"] = "images"

    CHECKS: ClassVar[Mapping[str, Callable[[int | None], str | None]]] = {
        name: lambda count: None if count is None or count >= 0 else f"must be 0 or more, got {count}"
        for name in ("authentic", "forged", "total")
    }


@dataclass(frozen=True)
class Entry:
    """One benchmark. folder: below --data. layout: name → settings; `layout_of` gives the value that they make.

    label_rule: what is forged, in words; the layout's settings carry it out. masks: None where there are none.
    large_masks: forgeries do cover more than half of its pictures. known_broken: key → what is wrong in the
    authors' copy; it explains a picture that was left out, and leaves none out itself. unverified:
    statements of this entry that nobody checked against a copy or a source. name: that of the file.
    """

    title: str
    domains: tuple[Domain, ...]
    folder: str
    layout: dict[str, Any]
    label_rule: str
    metrics: tuple[Metric, ...]
    licence: str
    citation: str
    masks: MaskRule | None = None
    large_masks: bool = False
    expected: Counts | None = None
    known_broken: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    name: str = ""

    CHECKS: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {
        "folder": wrong_pattern,
        "domains": lambda domains: None if domains else "must name at least one domain",
        "metrics": lambda metrics: None if metrics else "must name at least one metric",
        "name": lambda _: "is that of the file; remove it",
    }


def entry_names() -> list[str]:
    """The benchmarks of the registry."""
    return sorted(yaml_names(REGISTRY))


def load_entry(name: str) -> Entry:
    """An entry of the registry by name, or any by path. Raises ConfigError with every problem of the file."""
    path = find_yaml(REGISTRY, name, "benchmark")
    return parse_entry(path.stem, strict.read_yaml(path), path)


def parse_entry(name: str, data: object, file: Path | str) -> Entry:
    """Check parsed YAML. Raises ConfigError with every problem."""

    def check_layout(report: strict.Report) -> None:
        setting = data.get("layout") if isinstance(data, Mapping) else None
        if isinstance(setting, Mapping):
            _parse_layout(setting, report)

    return dataclasses.replace(strict.read_value(Entry, data, file, check_layout), name=name)


def layout_of(entry: Entry) -> Layout:
    """The layout that an entry's settings make; they were checked when it was read."""
    return cast("Layout", _parse_layout(entry.layout, lambda where, what: None))


def _parse_layout(setting: Mapping[str, Any], report: strict.Report) -> object:
    known = module_names("benchmarks.layouts")
    choice = strict.Choice("layout", known, lambda name: find_module("benchmarks.layouts", name).LAYOUT)
    return strict.parse_choice(choice, setting, "layout", report)
