"""`defaker-opt quantize`: a recipe and a detector → a build."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defaker_opt.errors import DefakerError

if TYPE_CHECKING:
    from defaker_opt.pipeline import Job
    from defaker_opt.progress import Progress
    from defaker_opt.runtime.build import Build
    from defaker_opt.target import Target


_UNTRAINED = "untrained: the source's weights are drawn at random, so no verdict means anything"


Recipe_ = Annotated[
    str, typer.Option(help="A shipped recipe (see: show recipes), the path of a YAML file, or auto: search for one.")
]
Source_ = Annotated[
    str | None,
    typer.Option(help="Instead of the recipe's: reference, a detector folder, or PRESET:random (see: show presets)."),
]
Target_ = Annotated[str | None, typer.Option(help="Instead of the recipe's: see show targets.")]
Output_ = Annotated[Path | None, typer.Option("--output", "-o", help="Default: exported/<source>-<recipe>.")]
Replace_ = Annotated[bool, typer.Option("--replace", help="Replace another build at the output folder.")]
DryRun_ = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, with sizes; write nothing.")]
NeverSlower_ = Annotated[
    bool, typer.Option("--never-slower", help="Time quantized stages here, and keep in float what is not faster.")
]
Locked_ = Annotated[
    Path | None,
    typer.Option(metavar="BUILD", help="Refuse unless recipe, source, pictures and tools are those of this build."),
]
Gptq_ = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Write the language part as a GPTQ checkpoint too, from the same codes."),
]
MaxDrop_ = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC=DROP", help="auto: what may be lost, such as verdict_accuracy=0.005."),
]
Budget_ = Annotated[
    list[str] | None, typer.Option(metavar="NAME=MOST", help="auto: size_mb=… or latency_ms=… here, or both.")
]
Suite_ = Annotated[list[str] | None, typer.Option(help="auto: what builds are judged on, as for validate.")]
Data_ = Annotated[Path | None, typer.Option(help="auto: the folder in which the suites' pictures lie.")]
Calibration_ = Annotated[str, typer.Option(help="auto: pictures to look at, embedded (the default) or a CSV table.")]
Json_ = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


@dataclass(frozen=True)
class Asked:
    """The options that decide about a build of a given recipe."""

    recipe: str
    source: str | None
    target: str | None
    output: Path | None
    replace: bool
    dry_run: bool
    never_slower: bool
    gptq: Path | None
    locked: Path | None


def quantize(
    recipe: Recipe_,
    source: Source_ = None,
    target: Target_ = None,
    output: Output_ = None,
    replace: Replace_ = False,
    dry_run: DryRun_ = False,
    never_slower: NeverSlower_ = False,
    gptq: Gptq_ = None,
    locked: Locked_ = None,
    max_drop: MaxDrop_ = None,
    budget: Budget_ = None,
    suite: Suite_ = None,
    data: Data_ = None,
    calibration: Calibration_ = "",
    as_json: Json_ = False,
) -> None:
    """Make a compact build of a detector; a rerun goes on from the stages that are finished."""
    from defaker_opt.cli import auto

    searching = auto.Asked(max_drop, budget, suite, data, calibration)
    if recipe == "auto":
        unfit = {"--dry-run": dry_run, "--never-slower": never_slower, "--gptq": gptq, "--locked": locked}
        auto.refuse_with_auto(unfit)
        auto.quantize_auto(searching, auto.Place(source, target, output, replace), as_json)
        return
    auto.refuse_without_auto(searching.given())
    started = time.perf_counter()
    job, place, build = _make(Asked(recipe, source, target, output, replace, dry_run, never_slower, gptq, locked))
    if build is None:
        _print_plan(job, place, as_json)
    else:
        _print_build(build, time.perf_counter() - started, gptq, as_json)


def _make(asked: Asked) -> tuple[Job, Path, Build | None]:
    """The job, where its build goes, and the build, if that is not a dry run."""
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.recipe import load_recipe
    from defaker_opt.target import load_target

    loaded = load_recipe(asked.recipe)
    aim, source = load_target(asked.target or loaded.target), asked.source or loaded.source
    if asked.never_slower:
        _check_alone(aim, asked.locked, asked.gptq)
    with progress_bar() as report:
        report("load torch", 0.0)
        from defaker_opt.detector import write_source
        from defaker_opt.locked import check_locked
        from defaker_opt.pipeline import check_gptq, make_build, plan_job

        if not asked.dry_run:
            write_source(source, lambda part, total: report("draw weights", part / total))
        job = plan_job(loaded, aim, source, report)
        if asked.locked:
            check_locked(job, asked.locked)
        place = asked.output or Path("exported") / f"{job.detector.config.name}-{loaded.name}"
        if asked.gptq:
            check_gptq(job, asked.gptq, place)
        build = None if asked.dry_run else make_build(job, place, report, asked.replace, asked.gptq)
        if build is not None and asked.never_slower:
            build = _revert_slow(job, build, report)
    return job, place, build


def _check_alone(aim: Target, locked: Path | None, gptq: Path | None) -> None:
    """Raise DefakerError for what does not go with --never-slower."""
    if locked:
        raise DefakerError("--locked, --never-slower: times decide what the second makes; give one of them")
    if gptq:
        raise DefakerError("--gptq, --never-slower: the second may leave no codes to write; give one of them")
    _refuse_untimed(aim.name, aim.backend)


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


def _print_build(build: Build, seconds: float, gptq: Path | None, as_json: bool) -> None:
    from defaker_opt.gptq_folder import gptq_facts
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
            **({"gptq": gptq_facts(gptq)} if gptq else {}),
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
    if gptq:
        facts = gptq_facts(gptq)
        console.print(
            f"{gptq}: {facts['bytes'] / 1e6:.1f} MB, the language part with {facts['bits']} bits in groups of "
            f"{facts['group_size']}, format {facts['checkpoint_format']}; float16 scales change its weights by "
            f"{facts['largest_float16_difference']:.1e} at most",
            highlight=False,
            soft_wrap=True,
        )
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
