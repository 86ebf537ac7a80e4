"""`defaker-opt validate`: has accuracy drifted between a reference and a build?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN, EXIT_OK, EXIT_UNDECIDED, DefakerError

if TYPE_CHECKING:
    from defaker_opt.report.validation import Validated
    from defaker_opt.report.values import DriftReport
    from defaker_opt.runtime import Build

_EXIT = {"ACCEPT": EXIT_OK, "REJECT": EXIT_LIMIT_BROKEN, "UNDECIDED": EXIT_UNDECIDED}

Build_ = Annotated[Path, typer.Argument(metavar="BUILD", help="The build to be judged.")]
Reference_ = Annotated[
    str, typer.Option(help="What it is compared with: a build, a detector folder, or reference (the embedded one).")
]
Suite_ = Annotated[
    list[str] | None,
    typer.Option(help="embedded (the default), quick, a CSV file, or a benchmark's name; may be repeated."),
]
Data_ = Annotated[Path | None, typer.Option(help="The folder in which benchmarks, or paths of a CSV, lie.")]
MaxDrop_ = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC=DROP", help="A limit, such as verdict_accuracy=0.005, instead of the build's own."),
]
Perturb_ = Annotated[
    list[str] | None, typer.Option(help="Also judge perturbed pictures: all, jpeg, jpeg-70, resize-0.5, …")
]
Sequential_ = Annotated[bool, typer.Option("--sequential", help="Stop at one of ten looks when the answer is clear.")]
Refit_ = Annotated[
    str, typer.Option(metavar="SUITE", help="Fit threshold and temperature to this calibration suite, never the test.")
]
WriteRefit_ = Annotated[Path | None, typer.Option(help="Write the fitted thresholds into a new build here.")]
Calibration_ = Annotated[
    str, typer.Option(help="A suite that shares no picture with those judged: what builds were calibrated on.")
]
Noise_ = Annotated[
    int, typer.Option(min=0, help="Images of each suite on which the reference is judged twice, for the noise.")
]
Report_ = Annotated[Path | None, typer.Option(help="Folder for results; default: reports/<build>.")]
Cache_ = Annotated[Path | None, typer.Option(help="Where rows are kept; default: DEFAKER_CACHE_DIR or ~/.cache/…")]
Engine_ = Annotated[str, typer.Option(help="processes, or ray (RAY_ADDRESS names a cluster).")]
Workers_ = Annotated[int, typer.Option(help="Pictures judged at once; 0 means one for each core.")]
Threads_ = Annotated[int, typer.Option(help="Threads of each worker; 0 means one where memory allows.")]
MaxLatency_ = Annotated[
    float, typer.Option(min=0, metavar="MS", help="Limit of the median image, instead of the build's own `latency_ms`.")
]
Resume_ = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on from rows that earlier runs kept, or judge everything anew.")
]
Json_ = Annotated[bool, typer.Option("--json", help="End with the report as one JSON object on standard output.")]


def validate(
    build: Build_,
    reference: Reference_,
    suite: Suite_ = None,
    data: Data_ = None,
    max_drop: MaxDrop_ = None,
    perturb: Perturb_ = None,
    sequential: Sequential_ = False,
    refit: Refit_ = "",
    write_refit: WriteRefit_ = None,
    calibration: Calibration_ = "calibration",
    noise_images: Noise_ = 100,
    report: Report_ = None,
    cache: Cache_ = None,
    engine: Engine_ = "processes",
    workers: Workers_ = 0,
    threads: Threads_ = 0,
    max_latency: MaxLatency_ = 0.0,
    resume: Resume_ = True,
    as_json: Json_ = False,
) -> None:
    """Judge pictures with both builds, and decide: exit code 0 ACCEPT, 1 REJECT, 3 UNDECIDED, 2 for a mistake.

    What was judged once is kept, so a killed run goes on where it stopped.
    """
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.files import default_cache_folder
    from defaker_opt.limits import choose_latency, choose_limits
    from defaker_opt.report.validation import Hands, Request, validate_build, validate_early
    from defaker_opt.runtime import open_build

    candidate = open_build(build)
    limits = choose_limits(candidate.manifest.data, max_drop or [])
    _check_refit(refit, write_refit)
    kept = cache or default_cache_folder()
    latency = choose_latency(candidate.manifest.data, max_latency)
    rows: Literal["kept", "fresh"] = "kept" if resume else "fresh"
    suites, perturbations = tuple(suite or ["embedded"]), tuple(perturb or ())
    request = Request(suites, data, perturbations, calibration, noise_images, refit, kept, rows, latency)
    way = validate_early if sequential else validate_build
    with progress_bar() as progress:
        done = way(candidate, reference, request, Hands(engine, workers, threads), limits, progress)
    done = _with_written_refit(done, candidate, write_refit)
    page = _write(done, report or Path("reports") / build.resolve().name)
    _print_answer(done.report, page, as_json)
    raise typer.Exit(_EXIT[done.report.decision])


def _check_refit(refit: str, output: Path | None) -> None:
    if output is None:
        return
    from defaker_opt.report.refit import check_new_build

    if not refit:
        raise DefakerError(
            f"--write-refit {output}: nothing to write; say with --refit which calibration suite to fit to"
        )
    check_new_build(output)


def _with_written_refit(done: Validated, candidate: Build, output: Path | None) -> Validated:
    if output is None:
        return done
    from defaker_opt.report.refit import write_refit

    fit = done.report.refit
    assert fit is not None
    write_refit(candidate, fit, output)
    written = dataclasses.replace(fit, written=str(output))
    return dataclasses.replace(done, report=dataclasses.replace(done.report, refit=written))


def _write(done: Validated, folder: Path) -> Path:
    from defaker_opt.report.gallery import pick_pictures
    from defaker_opt.report.write import write_report

    return write_report(done.report, done.comparison, pick_pictures(done.comparison.runs), folder)


def _print_answer(report: DriftReport, page: Path, as_json: bool) -> None:
    from defaker_opt.report.as_json import json_line
    from defaker_opt.report.words import answer_lines

    for line in answer_lines(report):
        print(line)
    print(f"report: {page}")
    if as_json:
        print(json_line(report))
