"""`defaker-opt quantize --recipe auto`: search the number format of every layer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN, EXIT_UNDECIDED, DefakerError

if TYPE_CHECKING:
    from defaker_opt.search.run import Found

# What may be lost unless it is said.
_LIMITS = ("verdict_accuracy=0.01", "mask_iou=0.01")

_EXIT = {"REJECT": EXIT_LIMIT_BROKEN, "UNDECIDED": EXIT_UNDECIDED}


@dataclass(frozen=True)
class Asked:
    """The options that only a search takes, as they were typed."""

    max_drop: list[str] | None
    budget: list[str] | None
    suite: list[str] | None
    data: Path | None
    calibration: str

    def given(self) -> dict[str, object]:
        """By the names of the options."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Place:
    """Source, target and output as for any recipe; None for the defaults."""

    source: str | None
    target: str | None
    output: Path | None
    replace: bool


def quantize_auto(asked: Asked, place: Place, as_json: bool) -> None:
    """Search, build and judge. Exit code 0: accepted and within the budget; 1 beyond it; 1 and 3 as `validate`."""
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.files import default_cache_folder
    from defaker_opt.limits import choose_limits
    from defaker_opt.search import parse_budget
    from defaker_opt.target import load_target

    started = time.perf_counter()
    budget = parse_budget(asked.budget or [])
    limits = choose_limits({"recipe": {}}, asked.max_drop or list(_LIMITS))
    aim = load_target(place.target or "cpu")
    with progress_bar() as report:
        report("load torch", 0.0)
        from defaker_opt.detector import load_detector, write_source
        from defaker_opt.report.validation import Hands, Request
        from defaker_opt.samples import EMBEDDED, suite_of
        from defaker_opt.search.run import NAME, Wish, search

        origin = place.source or "reference"
        write_source(origin, lambda part, total: report("draw weights", part / total))
        output = place.output or Path("exported") / f"{load_detector(origin).config.name}-{NAME}"
        suites = tuple(asked.suite or ["embedded"])
        calibration = asked.calibration or EMBEDDED
        # None of the pictures that formats are chosen on may be judged.
        request = Request(suites, asked.data, (), suite_of(calibration), 0, "", default_cache_folder())
        wish = Wish(origin, aim, limits, budget, calibration, request, Hands("processes", 0, 0))
        found = search(wish, output, place.replace, report)
    _print(found, time.perf_counter() - started, as_json)
    if not found.search.accepted:
        raise typer.Exit(_EXIT[found.search.trials[-1].decision])
    if not found.search.within_budget:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def refuse_without_auto(options: Mapping[str, object]) -> None:
    """Raise DefakerError for an option that only a search takes."""
    for option, value in options.items():
        if value:
            raise DefakerError(f"{option}: only a search takes it; give --recipe auto, or leave it out")


def refuse_with_auto(options: Mapping[str, object]) -> None:
    """Raise DefakerError for an option that a search does not take."""
    for option, value in options.items():
        if value:
            raise DefakerError(f"{option}: a search does not take it; leave it out, or give another --recipe than auto")


def _print(found: Found, seconds: float, as_json: bool) -> None:
    from defaker_opt.search.run import NAME, PAGE

    last = found.search.trials[-1]
    if as_json:
        summary = {
            "build": str(found.build.folder),
            "digest": found.build.digest,
            "recipe": str(found.folder / f"{NAME}.yaml"),
            "decision": last.decision,
            "within_budget": found.search.within_budget,
            "size_mb": last.measured[0],
            "latency_ms": last.measured[1],
            "trials": len(found.search.trials),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary if found.build.manifest.trained else {**summary, "untrained": True}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found.build.folder}: {last.decision} after {len(found.search.trials)} trials in {seconds:.0f} s"
    )
    for column in ("trial", "decision", "harm", "MB", "predicted", "ms", "predicted"):
        table.add_column(column, justify="left" if column == "decision" else "right")
    for index, trial in enumerate(found.search.trials, 1):
        sizes = (trial.measured[0], trial.predicted[0], trial.measured[1], trial.predicted[1])
        table.add_row(str(index), trial.decision, f"{trial.harm:.2g}", *(f"{each:.2f}" for each in sizes))
    console = Console()
    console.print(table)
    console.print(last.summary, highlight=False)
    if not found.search.within_budget:
        console.print(f"beyond the budget ({found.search.budget}): what keeps it lost too much", highlight=False)
    console.print(f"recipe: {found.folder / f'{NAME}.yaml'}", highlight=False, soft_wrap=True)
    console.print(f"page: {found.folder / PAGE}", highlight=False, soft_wrap=True)
