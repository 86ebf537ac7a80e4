"""Work that is cut short: Ctrl-C, a killed process, a full disk. What is finished stays, nothing half-written shows."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.runtime import open_build
from tests.conftest import COMMAND, defaker_opt, golden_folders


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that must have ended with exit code 2."""
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.stderr.endswith(f"{errors[0]}\n")
    return errors[0]


def stop_at(words: str, stop: signal.Signals, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command until it says `words`, then send a signal."""
    command = [*COMMAND, *map(str, arguments)]
    seen: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if words in line:
                process.send_signal(stop)
                break
        seen += process.stdout
        process.wait(60)
    assert any(words in line for line in seen), "".join(seen)
    return subprocess.CompletedProcess(command, process.returncode, "", "".join(seen))


@dataclass(frozen=True)
class CutShort:
    """One build made in three goes over an older one: Ctrl-C, SIGKILL, and at last the end."""

    output: Path
    partial: Path
    interrupted: subprocess.CompletedProcess[str]
    killed: subprocess.CompletedProcess[str]
    finished: subprocess.CompletedProcess[str]
    old_digests: tuple[str, str]
    listings: tuple[list[str], list[str]]
    written_at: dict[str, tuple[int, int, int]]


def times(folder: Path) -> tuple[int, int]:
    return tuple((folder / f"{stage}.onnx.data").stat().st_mtime_ns for stage in ("vision_encoder", "language"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def cut_short(float_build: Path, tmp_path_factory: pytest.TempPathFactory) -> CutShort:
    folder = tmp_path_factory.mktemp("cut_short")
    output, partial = folder / "build", folder / ".build.partial" / "build"
    shutil.copytree(float_build, output)
    arguments = ("quantize", "--recipe", "int8", "--output", output, "--replace")
    interrupted = stop_at("export mask_encoder", signal.SIGINT, *arguments)
    listing, digest, time = [p.name for p in folder.iterdir()], open_build(output).digest, times(partial)
    killed = stop_at("export mask_decoder", signal.SIGKILL, *arguments)
    written = {"interrupted": time, "killed": times(partial)}
    listings, digests = (listing, [p.name for p in folder.iterdir()]), (digest, open_build(output).digest)
    finished = defaker_opt(*arguments, "--json")
    written["finished"] = times(output) if finished.returncode == 0 else (0, 0)
    return CutShort(output, partial, interrupted, killed, finished, digests, listings, written)  # type: ignore[arg-type]


def test_ctrl_c_ends_with_130_and_says_that_a_rerun_goes_on(cut_short: CutShort) -> None:
    assert cut_short.interrupted.returncode == 130
    assert "Traceback" not in cut_short.interrupted.stderr
    assert re.search("^interrupted.* goes on", cut_short.interrupted.stderr, re.MULTILINE)


def test_a_kill_really_was_one(cut_short: CutShort) -> None:
    assert cut_short.killed.returncode == -signal.SIGKILL


def test_a_build_that_is_to_be_replaced_stays_until_the_new_one_is_complete(
    cut_short: CutShort, float_build: Path
) -> None:
    assert set(cut_short.old_digests) == {open_build(float_build).digest}
    for listing in cut_short.listings:
        assert sorted(set(listing) - {".build.partial.lock"}) == [".build.partial", "build"]


def test_the_rerun_finishes_and_leaves_nothing_else_behind(cut_short: CutShort) -> None:
    assert cut_short.finished.returncode == 0, cut_short.finished.stderr
    assert [path.name for path in cut_short.output.parent.iterdir()] == ["build"]


def test_the_rerun_reuses_finished_stages(cut_short: CutShort) -> None:
    assert len(set(cut_short.written_at.values())) == 1, cut_short.written_at


def test_the_manifest_is_that_of_an_uninterrupted_build(cut_short: CutShort, int8_build: Path) -> None:
    assert (cut_short.output / "manifest.json").read_bytes() == (int8_build / "manifest.json").read_bytes()


def test_ctrl_c_before_the_first_stage_leaves_no_build(tmp_path: Path) -> None:
    done = stop_at("load torch", signal.SIGINT, "quantize", "--recipe", "int8", "--output", tmp_path / "build")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists()


def test_ctrl_c_while_judging_leaves_only_whole_masks(int8_build: Path, tmp_path: Path) -> None:
    images = [tmp_path / f"{index}.png" for index in range(40)]
    for image in images:
        Image.new("RGB", (900, 700), "teal").save(image)
    masks = tmp_path / "masks"
    done = stop_at("2.png: ", signal.SIGINT, "run", int8_build, *images, "--gate", 0, "--mask-dir", masks)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert 3 <= len(list(masks.iterdir())) < len(images)
    for mask in masks.iterdir():
        assert not mask.name.startswith(".")
        with Image.open(mask) as image:
            assert np.asarray(image).shape == (700, 900)


def at_most(file_bytes: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return limit


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_a_build_with_one_line_that_says_so(tiny_disk: Path) -> None:
    message = error_of(defaker_opt("quantize", "--recipe", "float32", "--output", tiny_disk / "build"))
    assert str(tiny_disk) in message
    assert "no space left" in message
    assert not (tiny_disk / "build").exists()


def test_a_write_that_fails_ends_a_build_with_one_line_and_keeps_a_sound_plan(tmp_path: Path) -> None:
    arguments = ("quantize", "--recipe", "float32", "--output", tmp_path / "build")
    message = error_of(defaker_opt(*arguments, preexec_fn=at_most(60_000)))
    assert str(tmp_path) in message
    assert "no space left" in message
    assert not (tmp_path / "build").exists()
    assert json.loads((tmp_path / ".build.partial" / "plan.json").read_text())["key"]


def first_golden() -> Path:
    found = golden_folders()
    if not found:
        pytest.skip("no released checkpoint at hand; set DEFAKER_GOLDEN_DIR")
    return found[0]


def test_a_full_disk_ends_a_conversion_with_one_line_and_leaves_nothing(tiny_disk: Path) -> None:
    message = error_of(defaker_opt("convert", first_golden(), "--output", tiny_disk / "detector"))
    assert str(tiny_disk / "detector") in message
    assert "no space left" in message
    assert list(tiny_disk.iterdir()) == []


def test_ctrl_c_during_a_conversion_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = first_golden()
    done = stop_at("load torch", signal.SIGINT, "convert", checkpoint, "--output", tmp_path / "detector")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize("option", ["--mask-dir", "--overlay-dir"])
def test_a_full_disk_ends_judging_with_one_line_and_no_half_picture(
    option: str, int8_build: Path, photo: Path, tiny_disk: Path
) -> None:
    with (tiny_disk / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space"):
        while True:
            fill.write(bytes(4096))
    message = error_of(defaker_opt("run", int8_build, photo, "--gate", 0, option, tiny_disk))
    assert str(tiny_disk) in message
    assert "no space left" in message
    assert [path.name for path in tiny_disk.iterdir()] == ["fill"]


@pytest.mark.parametrize("option", ["--mask-dir", "--overlay-dir"])
def test_a_result_that_cannot_be_written_leaves_no_half_picture(option: str, int8_build: Path, photo: Path) -> None:
    folder = photo.parent / "results"
    done = defaker_opt("run", int8_build, photo, "--gate", 0, option, folder, preexec_fn=at_most(60))
    assert "no space left" in error_of(done)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("option", ["--mask-dir", "--overlay-dir"])
@pytest.mark.parametrize("place", ["photo.png", "photo.png/masks", "/proc/masks"])
def test_a_place_that_cannot_be_written_is_named(option: str, place: str, int8_build: Path, photo: Path) -> None:
    folder = photo.parent / place
    message = error_of(defaker_opt("run", int8_build, photo, "--gate", 0, option, folder))
    assert re.search(f"{re.escape(str(folder))}: cannot be written .*choose another", message)


def test_a_build_that_cannot_be_written_names_its_place(photo: Path) -> None:
    message = error_of(defaker_opt("quantize", "--recipe", "int8", "--output", photo / "build"))
    assert str(photo) in message
    assert "choose another output folder" in message


class ReachedError(Exception):
    """The work went on past what was left behind."""


def reached(*_: object) -> Any:
    raise ReachedError


LEFT_BEHIND = ["", "{", "[]", "null", '{"key": "anoth', "\0" * 40]


@pytest.mark.parametrize("left", LEFT_BEHIND, ids=["empty", "cut", "list", "null", "cut text", "zeros"])
def test_half_a_plan_is_started_over(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt import pipeline

    partial = tmp_path / ".build.partial"
    partial.mkdir()
    (partial / "plan.json").write_text(left)
    (partial / "language.json").write_text("{}")
    monkeypatch.setattr(pipeline, "_apply_passes", reached)
    job: Any = SimpleNamespace(key="this job")
    with pytest.raises(ReachedError):
        pipeline.make_build(job, tmp_path / "build", lambda what, fraction: None)
    assert json.loads((partial / "plan.json").read_text())["key"] == "this job"
    assert sorted(path.name for path in partial.rglob("*")) == ["build", "plan.json"]


@pytest.mark.parametrize("left", LEFT_BEHIND, ids=["empty", "cut", "list", "null", "cut text", "zeros"])
def test_half_a_receipt_makes_its_stage_anew(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt import stage_build
    from defaker_opt.runtime.build import Build, Manifest

    receipt = tmp_path / "language.json"
    receipt.write_text(left)
    monkeypatch.setattr(stage_build, "traced_stage", reached)
    detector: Any = SimpleNamespace()
    target: Any = SimpleNamespace()
    with pytest.raises(ReachedError):
        stage_build.build_stage(detector, target, "language", Build(tmp_path, Manifest({}), ""), receipt)
