"""Builds that were damaged on the way, and output folders that are something else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from defaker_opt.errors import BuildError
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.backends import find_backend
from defaker_opt.runtime.self_test import run_self_test
from defaker_opt.runtime.spec import STAGES
from tests.conftest import defaker_opt

HASHED = (*(f"{stage}.onnx{end}" for stage in STAGES for end in ("", ".data")), "prompts.npz", "self_test.npz")
FILES = ("manifest.json", *HASHED)


@pytest.fixture
def build(int8_build: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(int8_build, tmp_path / "build")
    return tmp_path / "build"


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    rewrite(path, bytes(data))


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    Image.new("RGB", (64, 48), (200, 30, 90)).save(path)
    return path


def error_of(*arguments: object) -> str:
    """The one line on standard error of a command that must end with exit code 2."""
    done = defaker_opt(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.stderr.endswith(f"{errors[0]}\n")
    return errors[0]


def test_the_files_of_a_build_are_all_known_here(int8_build: Path) -> None:
    assert {path.name for path in int8_build.iterdir()} == set(FILES)


def test_an_undamaged_copy_is_accepted(build: Path) -> None:
    open_build(build)


@pytest.mark.parametrize("name", HASHED)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_one_flipped_bit_is_found_in_every_file(name: str, share: float, build: Path) -> None:
    flip(build / name, round(share * ((build / name).stat().st_size - 1)))
    with pytest.raises(BuildError, match=f"{name}: .*copy the build again"):
        open_build(build)


def test_one_flipped_bit_is_found_anywhere_in_the_manifest(build: Path) -> None:
    manifest = build / "manifest.json"
    whole, unnoticed = manifest.read_bytes(), []
    for place in range(0, len(whole), 499):
        rewrite(manifest, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            open_build(build)
        except BuildError as error:
            assert "manifest.json" in str(error)
        else:
            unnoticed.append(place)
    assert not unnoticed, f"flipped bits at {unnoticed} went unnoticed"


@pytest.mark.parametrize("name", FILES)
def test_the_command_names_the_file_with_the_flipped_bit(name: str, build: Path) -> None:
    flip(build / name, (build / name).stat().st_size // 2)
    assert name in error_of("run", build, photo(build.parent))


def test_a_changed_threshold_is_found(build: Path) -> None:
    """A flip that leaves valid JSON behind, and would quietly turn verdicts around."""
    text = (build / "manifest.json").read_text()
    assert text.count('"fake_probability": 0.5') == 1
    rewrite(build / "manifest.json", text.replace('"fake_probability": 0.5', '"fake_probability": 0.9').encode())
    with pytest.raises(BuildError, match=r"manifest\.json"):
        open_build(build)


@pytest.mark.parametrize("name", HASHED)
def test_a_missing_file_is_named(name: str, build: Path) -> None:
    (build / name).unlink()
    with pytest.raises(BuildError, match=f"{name}: missing"):
        open_build(build)


@pytest.mark.parametrize("name", HASHED)
@pytest.mark.parametrize("left", [0, -1], ids=["emptied", "one byte short"])
def test_a_truncated_file_is_named(name: str, left: int, build: Path) -> None:
    rewrite(build / name, (build / name).read_bytes()[:left])
    with pytest.raises(BuildError, match=f"{name}: .* bytes where .* were written"):
        open_build(build)


def test_a_file_that_became_a_folder_is_named(build: Path) -> None:
    (build / "prompts.npz").unlink()
    (build / "prompts.npz").mkdir()
    with pytest.raises(BuildError, match=r"prompts\.npz"):
        open_build(build)


def test_a_file_that_cannot_be_read_is_named(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("defaker_opt.runtime.build.file_sha256", fail)
    with pytest.raises(BuildError, match=r"language\.onnx"):
        open_build(build)


@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_the_command_says_what_happened_to_a_file(change: str, build: Path) -> None:
    whole = (build / "language.onnx.data").read_bytes()
    (build / "language.onnx.data").unlink()
    if change == "truncated":
        (build / "language.onnx.data").write_bytes(whole[:1000])
    message = error_of("run", build, photo(build.parent))
    assert "language.onnx.data: " in message
    assert ("missing" if change == "missing" else "1,000 bytes") in message


@pytest.mark.parametrize("arguments", [("--self-test",), ("--self-test", "--json")], ids=" ".join)
def test_the_self_test_finds_damage_too(arguments: tuple[str, ...], build: Path) -> None:
    flip(build / "mask_encoder.onnx.data", 5000)
    assert "mask_encoder.onnx.data: " in error_of("run", build, *arguments)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00\x01" * 50, b"null", b"[]", b"7", b"{}", b'{"format": 2}', b"[" * 50_000],
    ids=["empty", "cut", "binary", "null", "list", "number", "no keys", "one key", "nested"],
)
def test_a_damaged_manifest_is_named(content: bytes, build: Path) -> None:
    rewrite(build / "manifest.json", content)
    with pytest.raises(BuildError, match=r"manifest\.json: damaged .*copy the build again|manifest\.json: damaged,"):
        open_build(build)


@pytest.mark.parametrize("content", [b"{", b"{}"], ids=["cut", "no keys"])
def test_the_command_names_a_damaged_manifest(content: bytes, build: Path) -> None:
    rewrite(build / "manifest.json", content)
    assert "manifest.json: damaged" in error_of("run", build, photo(build.parent))


@pytest.mark.parametrize("found", [0, 1, "2", None])
def test_another_format_says_which_one_is_read(found: object, build: Path) -> None:
    data = json.loads((build / "manifest.json").read_text())
    rewrite(build / "manifest.json", json.dumps({**data, "format": found}).encode())
    with pytest.raises(BuildError, match=r"manifest\.json: format .*, but this version reads format 2; install"):
        open_build(build)


Change = Callable[[dict[str, Any]], object]

# What a hand or a broken tool may do to a manifest: still JSON, still every key at the top.
EDITS: dict[str, Change] = {
    "files is a list": lambda data: data.update(files=[]),
    "files is empty": lambda data: data.update(files={}),
    "a stage is not hashed": lambda data: data["files"].pop("language.onnx.data"),
    "an entry is a number": lambda data: data["files"].update({"language.onnx": 7}),
    "an entry has no sha256": lambda data: data["files"]["language.onnx"].pop("sha256"),
    "an entry has no bytes": lambda data: data["files"]["language.onnx"].pop("bytes"),
    "a file outside the folder": lambda data: data["files"].update({"../photo.png": {"bytes": 0, "sha256": ""}}),
    "stages is a list": lambda data: data.update(stages=[]),
    "a stage is missing": lambda data: data["stages"].pop("mask_encoder"),
    "an unknown stage": lambda data: data["stages"].update(extra={}),
    "a stage has no spec": lambda data: data["stages"]["language"].pop("spec"),
    "source does not say whether it is trained": lambda data: data["source"].pop("trained"),
    "target names no backend": lambda data: data["target"].pop("backend"),
    "target has no session": lambda data: data["target"].pop("session"),
    "no tile size": lambda data: data["input"].pop("tile_size"),
    "no gate": lambda data: data["thresholds"].pop("gate"),
    "no tolerances": lambda data: data.pop("self_test"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_an_error_that_names_it(edit: str, build: Path) -> None:
    data = json.loads((build / "manifest.json").read_text())
    EDITS[edit](data)
    rewrite(build / "manifest.json", json.dumps(data, indent=1).encode())
    with pytest.raises(BuildError, match=r"manifest\.json"):
        run_self_test(open_session(open_build(build), threads=1))


def test_the_command_names_an_edited_manifest(build: Path) -> None:
    data = json.loads((build / "manifest.json").read_text())
    del data["stages"]["mask_encoder"]
    rewrite(build / "manifest.json", json.dumps(data, indent=1).encode())
    assert "manifest.json" in error_of("run", build, photo(build.parent))


@pytest.mark.parametrize("what", ["nothing", "empty folder", "other folder", "file"])
def test_what_is_no_build_is_said_to_be_none(what: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if what.endswith("folder"):
        place.mkdir()
    if what == "other folder":
        photo(place)
    if what == "file":
        place.write_text("a build")
    message = error_of("run", place, photo(tmp_path))
    assert str(place) in message
    assert ("manifest.json" if what.endswith("folder") else "defaker-opt quantize") in message


def test_a_file_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        open_build(photo(tmp_path))
    assert "no such folder" not in str(caught.value)


def test_a_backend_this_version_lacks_is_not_a_package_to_install() -> None:
    with pytest.raises(BuildError, match="abacus") as caught:
        find_backend("abacus")
    assert "pip install defaker_opt" not in str(caught.value)


def test_a_graph_that_the_backend_cannot_open_is_a_build_error(build: Path) -> None:
    (build / "unreadable.onnx").write_bytes(b"\x08\x07garbage" * 20)
    with pytest.raises(BuildError, match=r"unreadable\.onnx"):
        find_backend("onnx_runtime").open_stage(
            build / "unreadable.onnx", open_build(build).manifest.spec("language"), {}
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos")
    before = contents(tmp_path)
    message = error_of("quantize", "--recipe", "int8", "-o", tmp_path / "photos")
    assert str(tmp_path / "photos") in message
    assert "choose another --output" in message
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def unplanned_job() -> Any:
    """Enough of a job for everything before the work begins; touching more of it fails the test."""
    return SimpleNamespace(key="a key no build has")


def make(output: Path, replace: bool) -> object:
    from defaker_opt.pipeline import make_build

    return make_build(unplanned_job(), output, lambda what, fraction: None, replace)


@pytest.mark.parametrize("what", ["photos", "photos and a stranger's manifest.json", "file"])
def test_replace_replaces_builds_and_nothing_else(what: str, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    if what == "file":
        output.write_text("thesis")
    else:
        output.mkdir()
        photo(output)
    if "manifest" in what:
        (output / "manifest.json").write_text('{"name": "a web page"}')
    before = contents(tmp_path)
    with pytest.raises(BuildError, match="precious"):
        make(output, replace=True)
    assert contents(tmp_path) == before


def test_another_build_is_not_replaced_unasked(build: Path) -> None:
    before = contents(build)
    with pytest.raises(BuildError, match="is another build; choose another --output, or replace it with --replace"):
        make(build, replace=False)
    assert contents(build.parent) == {f"build/{name}": data for name, data in before.items()}


def test_a_damaged_build_in_the_way_is_named(build: Path) -> None:
    flip(build / "prompts.npz", 100)
    with pytest.raises(BuildError, match=r"is a damaged build .*prompts\.npz"):
        make(build, replace=False)


@pytest.mark.parametrize("output", [".", ".."])
@pytest.mark.parametrize("replace", [False, True], ids=["", "--replace"])
def test_a_folder_one_stands_in_is_no_output(
    output: str, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(BuildError):
        make(Path(output), replace)
    assert contents(tmp_path) == {}


def test_the_same_job_finds_its_build_finished(int8_build: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in int8_build.iterdir()}
    done = defaker_opt("quantize", "--recipe", "int8", "-o", int8_build, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == open_build(int8_build).digest
    assert {path.name: path.stat().st_mtime_ns for path in int8_build.iterdir()} == before
