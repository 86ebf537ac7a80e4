"""`defaker-opt compile`: a build's graphs → engines for the GPU of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN, DefakerError

if TYPE_CHECKING:
    from defaker_opt.compiling.compile import Compiled, Hands
    from defaker_opt.runtime import Build

# What kernels may work on unless it is said: a quarter of the memory that is free, as a Jetson's CPU shares it.
_SHARE, _MOST_MB, _LEAST_MB = 0.25, 4096, 64


def compile_(
    build: Annotated[Path, typer.Argument(help="A build folder, made by quantize for a target with a GPU.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only ask TensorRT for RTX whether it takes the graphs; needs no GPU.")
    ] = False,
    sm: Annotated[
        list[str] | None, typer.Option(help="With --check, for which GPUs: SM80, SM86, SM89. Default: all that can.")
    ] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="Memory that kernels may work on. Default: a quarter of what is free.")
    ] = None,
    never_slower: Annotated[
        bool, typer.Option("--never-slower", help="Also time each stage without codes, and keep the faster.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Build TensorRT engines here, check them, and keep them beside the build; a rerun goes on where it stopped."""
    from defaker_opt.machine import available_memory
    from defaker_opt.runtime import open_build

    if check and never_slower:
        raise DefakerError("--check, --never-slower: without a GPU nothing is timed; give one of them")
    if sm and not check:
        raise DefakerError("--sm: engines are built for the GPU that is here; with --check they are for any")
    free_mb = available_memory() // (1 << 20)
    workspace = workspace_mb or min(_MOST_MB, max(_LEAST_MB, int(free_mb * _SHARE)))
    opened = open_build(build)
    if check:
        _check(opened, tuple(sm or ()), workspace, as_json)
    else:
        _compile(opened, workspace, never_slower, as_json)


def _check(build: Build, wanted: tuple[str, ...], workspace_mb: int, as_json: bool) -> None:
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.compiling.child import build_engine
    from defaker_opt.compiling.gate import BLACKWELL, CAPABILITIES, WORDS, capabilities_of, check_graphs
    from defaker_opt.errors import one_of

    for name in wanted:
        if name not in (*CAPABILITIES, BLACKWELL):
            raise DefakerError(f"--sm: {one_of(name, (*CAPABILITIES, BLACKWELL))}")
    with progress_bar() as progress:
        rows = check_graphs(build, wanted or capabilities_of(build), workspace_mb, build_engine, progress)
    refused = [row for row in rows if row["refused"]]
    if as_json:
        print(json.dumps({"build": str(build.folder), "note": WORDS, "engines": rows, "refused": len(refused)}))
    else:
        _print_gate(rows, WORDS)
    if refused:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def _print_gate(rows: list[dict[str, Any]], words: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "GPU", "engine MB", "seconds", "answer", title=rows[0]["tensorrt"])
    for row in rows:
        size = "" if row["refused"] else f"{row['bytes'] / 1e6:.1f}"
        answer = escape(row["refused"][0]) if row["refused"] else "built"
        table.add_row(row["stage"], row["capability"], size, f"{row['seconds']:.1f}", answer)
    console = Console()
    console.print(table)
    console.print(words, highlight=False, soft_wrap=True)


def _compile(build: Build, workspace_mb: int, never_slower: bool, as_json: bool) -> None:
    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.compiling.compile import Settings, compile_build
    from defaker_opt.compiling.gate import require_engines

    require_engines(build)
    hands = _hands()
    for warning in _large_programs():
        typer.echo(warning, err=True)
    with progress_bar() as progress:
        compiled = compile_build(build, Settings(workspace_mb, never_slower), hands, progress)
    if as_json:
        print(json.dumps({"engines": str(compiled.folder), **compiled.record, "self_test": vars(compiled.self_test)}))
    else:
        _print_compiled(compiled)
    if not compiled.self_test.passed:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def _hands() -> Hands:
    """TensorRT and the GPU of this machine. Raises BuildError if either is missing."""
    from defaker_opt.compiling.child import build_engine
    from defaker_opt.compiling.compile import Hands
    from defaker_opt.runtime.backends import Choice
    from defaker_opt.runtime.backends.tensor_rt import Engine, library
    from defaker_opt.runtime.cuda import read_gpu
    from defaker_opt.runtime.engines import BACKEND
    from defaker_opt.runtime.recording import RecordingSession

    trt = library()
    return Hands(
        f"{trt.__name__} {trt.__version__}",
        read_gpu(),
        build_engine,
        lambda path, spec: Engine(trt, path.read_bytes(), spec, str(path)),
        lambda build, engines: RecordingSession(
            build, choice=Choice(BACKEND, {"record": engines}) if engines else None
        ),
    )


def _large_programs() -> list[str]:
    """A line for each other program that holds a tenth of the memory: on a Jetson the builder needs it."""
    from defaker_opt.machine import large_programs

    return [
        f"warning: {name} (process {number}) holds {size / 1e9:.1f} GB; end it if the builder runs out of memory"
        for number, name, size in large_programs()
    ]


def _print_compiled(compiled: Compiled) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    gpu = compiled.record["gpu"]
    title = f"{compiled.folder}: {compiled.record['tensorrt']}, SM {gpu['sm']}, driver for CUDA {gpu['driver']}"
    table = Table("stage", "form", "MB", "ms", "difference to ONNX Runtime", "not taken", title=title)
    for stage, entry in compiled.record["stages"].items():
        why = "\n".join(f"{each['precision']}: {each['why']}" for each in entry["tried"])
        numbers = (f"{entry['bytes'] / 1e6:.1f}", f"{entry['milliseconds']:.2f}", f"{entry['difference']:.1e}")
        table.add_row(stage, entry["precision"], *numbers, escape(why))
    console = Console()
    console.print(table)
    agreement = compiled.record["agreement"]
    passed = "passed" if compiled.self_test.passed else "FAILED, so the build goes on without engines"
    console.print(
        f"self-test {passed}; with the graphs' own results: verdict logits within "
        f"{agreement['verdict_logit_difference']:.4f}, [SEG] cosine {agreement['seg_cosine']:.6f}, "
        f"mask IoU {agreement['mask_iou']:.4f}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
