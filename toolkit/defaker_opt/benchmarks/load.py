"""Benchmarks by name, by entry, or from a table of one's own; and what of the registry is present."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from defaker_opt.benchmarks import Benchmark, Item, MaskRule
from defaker_opt.benchmarks.entries import Counts, Entry, layout_of, load_entry
from defaker_opt.benchmarks.layouts.csv import Csv
from defaker_opt.benchmarks.read import mean_mask_area
from defaker_opt.errors import AbsentError, SuiteError

# Forgeries that cover more than this on average are rather masks whose polarity is the other one.
LARGEST_MEAN_AREA = 0.5


def load_benchmark(name: str, data_root: Path) -> Benchmark:
    """A benchmark of the registry, or that of an entry's path, with its pictures below data_root.

    Raises DefakerError if it is not there, does not have the entry's layout, or its masks seem to be inverted.
    """
    return find_benchmark(load_entry(name), data_root)


def find_benchmark(entry: Entry, data_root: Path) -> Benchmark:
    """List the pictures of an entry. Raises SuiteError."""
    folder = data_root / entry.folder
    if not folder.is_dir():
        raise AbsentError(
            f"benchmark {entry.name}: no folder {folder}; put the data there or link to it, "
            "or give a copy of the entry with another `folder`"
        )
    scan = layout_of(entry).find(folder, entry.masks or MaskRule())
    if not entry.large_masks:
        _check_area(entry.name, scan.items, "`masks.polarity` or `large_masks: true` of the entry")
    items = scan.items
    if len(entry.domains) == 1:
        domain = {"domain": str(entry.domains[0])}
        items = tuple(dataclasses.replace(item, slices={**domain, **item.slices}) for item in items)
    return Benchmark(entry.name, items, tuple(_explain(entry, line) for line in scan.problems))


def load_suite_file(csv_path: Path, data_root: Path | None) -> Benchmark:
    """A table with the columns image, label, mask, and others for slices; its paths are relative to data_root or to it.

    The first row's picture decides which. Raises SuiteError with the lines that are wrong.
    """
    layout = Csv(str(csv_path.absolute()))
    first = layout.first_image(csv_path)
    roots = [root for root in (data_root, csv_path.absolute().parent) if root is not None]
    root = next((root for root in roots if (root / first).is_file()), None)
    if root is None:
        looked = " or ".join(map(str, roots))
        raise SuiteError(f"{csv_path}: no {first} in {looked}; say with --data where its paths begin")
    scan = layout.find(root, MaskRule())
    _check_area(str(csv_path), scan.items, "the masks, or write an entry for the table with `large_masks: true`")
    return Benchmark(csv_path.stem, scan.items, scan.problems)


def _explain(entry: Entry, problem: str) -> str:
    """Say of a picture that is left out that it is broken for everybody."""
    key = next((key for key in entry.known_broken if problem.startswith(f"{key}: ")), None)
    return f"{problem} (known: {entry.known_broken[key]})" if key else problem


def _check_area(name: str, items: tuple[Item, ...], change: str) -> None:
    area, count = mean_mask_area(items)
    if area > LARGEST_MEAN_AREA:
        raise SuiteError(
            f"{name}: forgeries cover {area:.0%} on average of {count} masks, so black and white are probably "
            f"swapped; change {change}"
        )


@dataclass(frozen=True)
class Presence:
    """What of a benchmark is there. authentic and forged: pictures, or videos if that is what the entry counts.

    left_out: pictures that cannot be used. detail: what is wrong or differs, "" if nothing.
    """

    status: Literal["found", "not found", "differs", "unusable"]
    authentic: int = 0
    forged: int = 0
    left_out: int = 0
    detail: str = ""


def find_presence(entry: Entry, data_root: Path) -> Presence:
    """Look for a benchmark below data_root and compare what is there with what should be."""
    try:
        benchmark = find_benchmark(entry, data_root)
    except AbsentError as error:
        return Presence("not found", detail=str(error))
    except SuiteError as error:
        return Presence("unusable", detail=str(error))
    counts = _count(benchmark, entry.expected)
    found = Presence("found", counts[0], counts[1], len(benchmark.problems))
    differences = _differences(counts, entry.expected)
    return dataclasses.replace(found, status="differs", detail=differences) if differences else found


def _count(benchmark: Benchmark, expected: Counts | None) -> Counter[int]:
    if expected is not None and expected.of == "videos":
        return Counter(label for label, _ in {(item.label, item.source) for item in benchmark.items})
    return Counter(int(item.label) for item in benchmark.items)


def _differences(counts: Counter[int], expected: Counts | None) -> str:
    if expected is None:
        return ""
    pairs = (("authentic", counts[0]), ("forged", counts[1]), ("total", counts[0] + counts[1]))
    told = [
        f"{found:,} {what} {expected.of}, expected {wanted:,}"
        for what, found in pairs
        if (wanted := getattr(expected, what)) is not None and wanted != found
    ]
    hint = " (from memory)" if expected.evidence == "memory" else ""
    return "; ".join(told) + hint if told else ""
