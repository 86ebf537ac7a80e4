"""`defaker-opt run`: judge images with a build, without torch."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN, EXIT_USER_ERROR, BuildError, DefakerError, ImageError, one_of

if TYPE_CHECKING:
    from PIL import Image

    from defaker_opt.runtime import Session, Verdict

_UNTRAINED = "untrained: this build's weights are drawn at random, so no verdict means anything"


def run(
    build: Annotated[Path, typer.Argument(help="A build folder, made by quantize.")],
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Pictures to judge.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each image.")] = False,
    mask_dir: Annotated[Path | None, typer.Option(help="Write each mask here, as PNG of the image's size.")] = None,
    overlay_dir: Annotated[Path | None, typer.Option(help="Write each image with its mask over it here.")] = None,
    gate: Annotated[float | None, typer.Option(min=0, max=1, help="Make a mask from this fake probability on.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also answer in words (recipe explain).")] = False,
    backend: Annotated[str, typer.Option(help="Run with this backend, such as torch_cuda; default: the build's.")] = "",
    threads: Annotated[
        int, typer.Option(min=0, help="Threads for each stage on the CPU; 0 means one for each core.")
    ] = 0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Pictures judged at once, sharing the cores: more an hour, each one slower.")
    ] = 1,
    batch_wait: Annotated[
        float,
        typer.Option(help="Milliseconds a picture waits at most for others, to share a call with them; 0: never."),
    ] = 0.0,
    self_test: Annotated[bool, typer.Option("--self-test", help="Check the build on this machine instead.")] = False,
) -> None:
    """Judge images: real or fake, and where. One bad image does not stop the others; it makes the exit code 2."""
    from defaker_opt.catalog import module_names
    from defaker_opt.runtime import open_build, open_session
    from defaker_opt.runtime.at_once import check_wait, session_at_once
    from defaker_opt.runtime.backends import Choice

    if backend and backend not in module_names("runtime.backends"):
        raise DefakerError(f"run: --backend: {one_of(backend, module_names('runtime.backends'))}")
    if bool(images) == self_test:
        raise DefakerError("run: give either images or --self-test")
    if self_test and concurrency > 1:
        raise DefakerError(f"--concurrency {concurrency}: --self-test judges one picture; leave one of them out")
    check_wait(batch_wait, concurrency)
    session = open_session(open_build(build), _threads_each(threads, concurrency), Choice(backend) if backend else None)
    if concurrency > 1:
        session = session_at_once(session, concurrency, batch_wait)
    if not session.build.manifest.trained:
        print(_UNTRAINED, file=sys.stderr)
    if self_test:
        _self_test(session, as_json)
        return
    assert images is not None
    words = _explanation_words(session) if explain else 0
    places = [Place(name, mask_dir, overlay_dir) for name in _output_names(images)]
    _refuse_overwriting(images, places)
    for folder in (mask_dir, overlay_dir):
        _make_folder(folder)
    _show_any_name()
    failed = 0
    wish = Wish(gate, words, concurrency)
    for row in _with_progress(_judge_all(session, list(zip(images, places)), wish), len(images)):
        failed += "error" in row
        _print_row(row, as_json)
    if failed:
        raise typer.Exit(EXIT_USER_ERROR)


def _threads_each(threads: int, concurrency: int) -> int:
    """Threads of each stage: those asked for, or a share of the cores; 0 is one for each core."""
    from defaker_opt.machine import available_cores

    return threads if threads or concurrency == 1 else max(1, available_cores() // concurrency)


@dataclass(frozen=True)
class Wish:
    """How pictures are judged. gate: see `Session.judge`; words: of an explanation; concurrency: pictures at once."""

    gate: float | None
    words: int
    concurrency: int


@dataclass(frozen=True)
class Place:
    """Where the results of one image go, `<name>_mask.png` and `<name>_overlay.png`, if they have a folder."""

    name: str
    mask_dir: Path | None
    overlay_dir: Path | None

    @property
    def mask(self) -> Path | None:
        """The file for the mask."""
        return self.mask_dir and self.mask_dir / f"{self.name}_mask.png"

    @property
    def overlay(self) -> Path | None:
        """The file for the picture with its mask over it."""
        return self.overlay_dir and self.overlay_dir / f"{self.name}_overlay.png"


def _explanation_words(session: Session) -> int:
    """The most tokens of an explanation. Raises BuildError if the build has no words."""
    from defaker_opt.runtime.answers import explanation_facts

    return int(explanation_facts(session.build)["max_tokens"])


# A picture with its place, or the row of one that could not be judged.
Loaded = tuple["Image.Image", str, Place] | dict[str, Any]
Judged = tuple["Image.Image", "Verdict", str, Place] | dict[str, Any]


def _judge_all(session: Session, images: list[tuple[str, Place]], wish: Wish) -> Iterator[dict[str, Any]]:
    """A row for each image, in their order: the next are decoded, and the last are written, while some are judged."""
    from defaker_opt.runtime.images import load_image
    from defaker_opt.runtime.in_order import in_order

    def load(item: tuple[str, Place]) -> Loaded:
        path, place = item
        try:
            return load_image(path), path, place
        except ImageError as error:
            return {"image": path, "error": str(error), **_identity(session)}

    def judge(loaded: Loaded) -> Judged:
        if isinstance(loaded, dict):
            return loaded
        image, path, place = loaded
        try:
            return image, session.judge(image, wish.gate, wish.words), path, place
        except BuildError as error:
            return {"image": path, "error": str(error), **_identity(session)}

    ahead = wish.concurrency + 1
    # As many decode as judge: where a GPU judges, one alone would keep it waiting.
    loaded = in_order(load, images, wish.concurrency, ahead)
    for judged in in_order(judge, loaded, wish.concurrency, ahead):
        yield judged if isinstance(judged, dict) else _write(session, *judged)


def _write(session: Session, image: Image.Image, verdict: Verdict, path: str, place: Place) -> dict[str, Any]:
    """Write what was asked for; the row."""
    mask = _write_mask(verdict, place.mask)
    if place.overlay:
        from defaker_opt.runtime.overlay import draw_overlay

        _save_png(draw_overlay(image, verdict, session.build.manifest.trained), place.overlay)
    return {
        "image": path,
        "verdict": "fake" if verdict.is_fake else "real",
        "fake_probability": verdict.fake_probability,
        "mask_area": verdict.mask_area,
        "mask": mask,
        **({} if verdict.explanation is None else {"explanation": verdict.explanation}),
        "latency_ms": dict(verdict.latency_ms),
        **_identity(session),
    }


def _print_row(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
    elif "error" in row:
        print(f"error: {row['error']}", file=sys.stderr, flush=True)
    else:
        area = "no mask" if row["mask_area"] is None else f"tampered area {row['mask_area']:.1%}"
        untrained = "  (untrained)" if "untrained" in row else ""
        print(
            f"{row['image']}: {row['verdict'].upper()}  fake probability {row['fake_probability']:.1%}  {area}  "
            f"{row['latency_ms']['total']:.0f} ms{untrained}",
            flush=True,
        )
        if "explanation" in row:
            print(f"  {row['explanation']}", flush=True)


def _identity(session: Session) -> dict[str, Any]:
    """Which build speaks, and whether it may be believed."""
    notice = {} if session.build.manifest.trained else {"untrained": True}
    return {"build": session.build.digest, **notice}


def _self_test(session: Session, as_json: bool) -> None:
    import dataclasses

    from defaker_opt.runtime.self_test import run_self_test

    result = run_self_test(session)
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "passed": result.passed, **_identity(session)}))
    else:
        print(
            f"{'passed' if result.passed else 'FAILED'}: "
            f"fake probability differs by {result.probability_difference:.1e} "
            f"(at most {result.probability_tolerance:.1e}), mask on {result.mask_disagreement:.2%} of the pixels "
            f"(at most {result.mask_tolerance:.2%})"
        )
    if not result.passed:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def _output_names(images: list[str]) -> Iterator[str]:
    """A file name for each image's results: its stem, numbered where two are alike."""
    taken: set[str] = set()
    for image in images:
        stem = Path(image).stem
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([stem], numbered) if name not in taken)
        taken.add(name)
        yield name


def _write_mask(verdict: Verdict, path: Path | None) -> str | None:
    if path is None or verdict.mask is None:
        return None
    import numpy as np
    from PIL import Image

    _save_png(Image.fromarray(verdict.mask.astype(np.uint8) * 255), path)
    return str(path)


def _save_png(image: Image.Image, path: Path) -> None:
    """Write under a temporary name first, so that nobody ever sees half a picture."""
    from defaker_opt.errors import write_failure

    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise write_failure(path, error) from error


def _refuse_overwriting(images: list[str], places: list[Place]) -> None:
    """Raise DefakerError if a result would take the place of a picture that is to be judged."""
    inputs = {Path(image).resolve() for image in images}
    for path in (path for place in places for path in (place.mask, place.overlay) if path):
        if path.resolve() in inputs:
            raise DefakerError(f"{path}: would overwrite an image to be judged; choose another folder for results")


def _show_any_name() -> None:
    """A file name need not be text that the terminal can show; what it cannot is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _make_folder(folder: Path | None) -> None:
    from defaker_opt.errors import write_failure

    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(folder, error) from error


def _with_progress(rows: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The rows as they come, with a bar if there are several and somebody is looking."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if count > 1 and console.is_terminal:
        yield from track(rows, description="judge", total=count, console=console, transient=True)
    else:
        yield from rows
