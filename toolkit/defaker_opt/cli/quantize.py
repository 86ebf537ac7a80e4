"""`defaker-opt quantize`: a recipe and a detector → a build."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defaker_opt.errors import DefakerError

if TYPE_CHECKING:
    from defaker_opt.pipeline import Job
    from defaker_opt.progress import Progress
    from defaker_opt.runtime.build import Build


_UNTRAINED = "untrained: the source's weights are drawn at random, so no verdict means anything"


def quantize(
    recipe: Annotated[str, typer.Option(help="A shipped recipe (see: show recipes) or the path of a YAML file.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="Instead of the recipe's: reference, a detector folder, or PRESET:random (see: show presets)."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Instead of the recipe's: see show targets.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: exported/<source>-<recipe>.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another build at the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with sizes; write nothing.")
    ] = False,
    never_slower: Annotated[
        bool,
        typer.Option("--never-slower", help="Time quantized stages here, and keep in float what is not faster."),
    ] = False,
    locked: Annotated[
        Path | None,
        typer.Option(metavar="BUILD", help="Refuse unless recipe, source, pictures and tools are those of this build."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Make a compact build of a detector; a rerun goes on from the stages that are finished."""
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.recipe import load_recipe
    from defaker_opt.target import load_target

    if locked and never_slower:
        raise DefakerError("--locked, --never-slower: times decide what the second makes; give one of them")
    started = time.perf_counter()
    loaded = load_recipe(recipe)
    aim = load_target(target or loaded.target)

    if never_slower:
        _refuse_untimed(aim.name, aim.backend)
    with progress_bar() as report:
        report("load torch", 0.0)
        from defaker_opt.detector import write_source
        from defaker_opt.locked import check_locked
        from defaker_opt.pipeline import make_build, plan_job

        if not dry_run:
            write_source(source or loaded.source, lambda part, total: report("draw weights", part / total))
        job = plan_job(loaded, aim, source or loaded.source, report)
        if locked:
            check_locked(job, locked)
        place = output or Path("exported") / f"{job.detector.config.name}-{loaded.name}"
        build = None if dry_run else make_build(job, place, report, replace)
        if build is not None and never_slower:
            build = _revert_slow(job, build, report)
    if build is None:
        _print_plan(job, place, as_json)
    else:
        _print_build(build, time.perf_counter() - started, as_json)


def _revert_slow(job: Job, build: Build, report: Progress) -> Build:
    """Time the build, write the times beside it, and make it anew without what does not pay."""
    from defaker_opt.files import write_json
    from defaker_opt.never_slower import keep_float, time_stages
    from defaker_opt.pipeline import make_build, plan_job

    timings = time_stages(job, build, report)
    write_json(
        build.folder.with_name(f"{build.folder.name}.timing.json"), {"stages": [each.as_json() for each in timings]}
    )
    if all(timing.pays for timing in timings):
        return build
    recipe = keep_float(job.recipe, job.detector, timings)
    return make_build(plan_job(recipe, job.target, job.source, report), build.folder, report, replace=True)


def _print_plan(job: Job, place: Path, as_json: bool) -> None:
    from defaker_opt.preview import preview_job

    preview = preview_job(job, place)
    if as_json:
        print(json.dumps(preview))
        return
    import yaml
    from rich.console import Console
    from rich.table import Table

    console = Console()
    print(yaml.safe_dump(preview["recipe"], sort_keys=False, width=120))
    table = Table(title=f"{job.detector.config.name} → {place} (nothing is written)")
    for column in ("stage", "linear layers", "float32 MB", "predicted MB", "share"):
        table.add_column(column, justify="left" if column in ("stage", "linear layers") else "right")
    for name, stage in preview["stages"].items():
        schemes = ", ".join(f"{count} {scheme}" for scheme, count in stage["schemes"].items())
        sizes = (stage["float32_bytes"], stage["predicted_bytes"])
        table.add_row(name, schemes, *(f"{size / 1e6:.2f}" for size in sizes), f"{sizes[1] / sizes[0]:.0%}")
    console.print(table)
    if "untrained" in preview:
        print(_UNTRAINED)


def _print_build(build: Build, seconds: float, as_json: bool) -> None:
    from defaker_opt.pipeline import build_bytes
    from defaker_opt.preview import peak_memory_bytes

    stages: dict[str, Any] = {
        name: {key: entry[key] for key in ("bytes", "scheme", "parity")}
        for name, entry in build.manifest.data["stages"].items()
    }
    if as_json:
        summary = {
            "build": str(build.folder),
            "digest": build.digest,
            "bytes": build_bytes(build),
            "stages": stages,
            "reverted": build.manifest.data["recipe"].get("reverted", {}),
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        print(json.dumps(summary if build.manifest.trained else {**summary, "untrained": True}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{build.folder}: {build_bytes(build) / 1e6:.1f} MB in {seconds:.0f} s")
    for column in ("stage", "scheme", "MB", "difference to torch"):
        table.add_column(column, justify="left" if column in ("stage", "scheme") else "right")
    for name, stage in stages.items():
        table.add_row(name, stage["scheme"], f"{stage['bytes'] / 1e6:.2f}", f"{stage['parity']:.1e}")
    console = Console()
    console.print(table)
    for stage, reason in build.manifest.data["recipe"].get("reverted", {}).items():
        console.print(f"{stage} stays in float: {reason}", highlight=False)
    if not build.manifest.trained:
        print(_UNTRAINED)
    console.print(f"next: defaker-opt run {build.folder} PHOTO --overlay-dir .", highlight=False, soft_wrap=True)


def _refuse_untimed(target: str, backend: str) -> None:
    """Raise DefakerError where stages cannot be timed one by one while a build is made."""
    from defaker_opt.runtime.engines import BACKEND, TORCH

    if backend == BACKEND:
        raise DefakerError(
            f"--never-slower: target {target} runs engines, which are timed where they are made: "
            "defaker-opt compile BUILD --never-slower"
        )
    if backend == TORCH:
        raise DefakerError(
            f"--never-slower: target {target} runs on a GPU, which works on while the next stage begins; "
            "make the build without it, and measure whole pictures: defaker-opt profile BUILD"
        )
