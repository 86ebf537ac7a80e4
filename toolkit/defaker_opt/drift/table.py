"""Pairs of rows as a CSV file, one line a picture, suite and perturbation."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.drift.validate import PairedRun
from defaker_opt.files import whole_file

_FACTS = ("benchmark", "perturbation", "key", "label", "source", "width", "height")
_SIDE = ("fake_probability", "predicted", "area", "iou", "f1", "tp", "fp", "fn", "tn", "total_ms")
_BOTH = ("flipped", "mask_agreement", "area_bias", "problem")
_LOGITS = tuple(f"verdict_logit_{index}" for index in range(8))
_SIDES = ("reference", "candidate")


def write_rows(runs: Sequence[PairedRun], path: Path) -> int:
    """Write all rows, what was left out with its problem; the number of lines. Empty cells: nothing to say.

    Raises DefakerError if the file cannot be written; then none is there.
    """
    slices = slice_names(runs)
    count = 0
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns(slices), lineterminator="\n")
        table.writeheader()
        for paired in runs:
            for row in paired:
                table.writerow(as_cells(row, paired))
                count += 1
    return count


def columns(slices: Iterable[str]) -> list[str]:
    """The header: facts, slices, both sides, what lies between them."""
    sides = [f"{side}_{name}" for side in _SIDES for name in (*_SIDE, *_LOGITS)]
    return [*_FACTS, *(f"slice_{name}" for name in slices), *sides, *_BOTH]


def slice_names(runs: Iterable[PairedRun]) -> list[str]:
    """Every slice that any picture has."""
    named = {name for paired in runs for item in paired.run.benchmark.items for name in item.slices}
    return sorted(named | {"resolution", "forged_area"})


def as_cells(row: PairRow | Problem, paired: PairedRun) -> dict[str, Any]:
    """One line."""
    run = paired.run
    if isinstance(row, Problem):
        return {
            "benchmark": run.benchmark.name,
            "perturbation": run.perturbation,
            "key": row.key,
            "problem": row.reason,
        }
    return {
        "benchmark": row.benchmark,
        "perturbation": row.perturbation,
        "key": row.key,
        "label": row.label,
        "source": row.source,
        "width": row.reference.mask.width,
        "height": row.reference.mask.height,
        **{f"slice_{name}": value for name, value in row.slices.items()},
        **_side("reference", row.reference),
        **_side("candidate", row.candidate),
        "flipped": int(row.flipped),
        "mask_agreement": row.mask_agreement,
        "area_bias": row.area_bias,
    }


def _side(side: str, row: ImageRow) -> dict[str, Any]:
    truth = row.mask.truth
    counts = {name: getattr(truth, name) for name in ("iou", "f1", "tp", "fp", "fn", "tn")} if truth else {}
    cells = {
        "fake_probability": row.fake_probability,
        "predicted": row.predicted,
        "area": row.mask.area,
        "total_ms": row.latency_ms["total"],
        **counts,
        **dict(zip(_LOGITS, row.verdict_logits, strict=True)),
    }
    return {f"{side}_{name}": value for name, value in cells.items()}
