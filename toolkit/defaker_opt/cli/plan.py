"""`defaker-opt plan`: what a job will cost, before any of it is done."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN

if TYPE_CHECKING:
    from defaker_opt.planning.forecast import Forecast

Recipe_ = Annotated[str, typer.Option(help="A shipped recipe (see: show recipes) or the path of a YAML file.")]
Source_ = Annotated[str | None, typer.Option(help="Instead of the recipe's; a PRESET:random needs no weights.")]
Target_ = Annotated[str | None, typer.Option(help="Instead of the recipe's: see show targets.")]
Tiles_ = Annotated[int, typer.Option(min=0, help="Tiles of a picture with its thumbnail; 0: as many as there can be.")]
Json_ = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def plan(
    recipe: Recipe_,
    source: Source_ = None,
    target: Target_ = None,
    tiles: Tiles_ = 0,
    as_json: Json_ = False,
) -> None:
    """Forecast sizes, memory, time and latency of a job. Exit code 1 if it does not fit the target."""
    from defaker_opt.planning.fit import plan_recipe

    planned = plan_recipe(recipe, source, target, tiles)
    if as_json:
        print(json.dumps(dataclasses.asdict(planned)))
    else:
        _print(planned.forecast, f"{planned.source} for {planned.target}, {planned.tiles} tiles")
        if not planned.forecast.fits:
            print(f"does not fit: {planned.forecast.why}")
            nearest = f"nearest recipe that does: {planned.nearest}" if planned.nearest else "no shipped recipe fits"
            print(f"{nearest}; smaller detectors: defaker-opt show presets" if not planned.nearest else nearest)
        for note in planned.notes:
            print(note)
    if not planned.forecast.fits:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def _print(found: Forecast, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{found.recipe}[/]: {title}; nothing is written", highlight=False)
    table = Table()
    of_engines = ("engine MB",) if found.engines else ()
    for column in ("stage", "MB", *of_engines, "ms an image"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, size in found.sizes.stages.items():
        spent = found.latency.stages.get(name)
        engine = [f"{found.engines[name] / 1e6:.1f}"] if found.engines else []
        table.add_row(name, f"{size / 1e6:.1f}", *engine, "not forecast" if spent is None else f"{spent:.1f}")
    table.add_row("preprocess", "", *([""] if found.engines else []), f"{found.latency.stages['preprocess']:.1f}")
    engines = [f"{sum(found.engines.values()) / 1e6:.1f}"] if found.engines else []
    table.add_row("together", f"{found.sizes.total / 1e6:.1f}", *engines, f"{found.latency.total_ms:.1f}")
    console.print(table)
    steps = Table()
    for column in ("step", "where", "seconds", "memory GB"):
        steps.add_column(column, justify="left" if column in ("step", "where") else "right")
    for step in found.steps:
        steps.add_row(
            step.name,
            step.where,
            f"{step.seconds:,.0f}" if step.seconds >= 10 else f"{step.seconds:.2g}",
            f"{step.memory_bytes / 1e9:.2f}",
        )
    console.print(steps)
    limit = f"{found.memory_limit_bytes / 1e9:.1f} GB"
    print(f"at best {found.latency.floor_ms:.1f} ms an image by the device's stated rates; a detector may take {limit}")
    for warning in found.warnings:
        print(f"note: {warning}")
