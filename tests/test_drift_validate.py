"""The verb: suites, references, leakage, noise and the table of rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from defaker_opt.benchmarks import Benchmark
from defaker_opt.benchmarks.load import load_suite_file
from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.reference import open_reference
from defaker_opt.drift.rows import Problem
from defaker_opt.drift.run import Crew
from defaker_opt.drift.suites import codec_slice, load_suite
from defaker_opt.drift.table import as_cells, columns, slice_names, write_rows
from defaker_opt.drift.validate import Comparison, Plan, compare_builds
from defaker_opt.errors import DefakerError, SuiteError
from defaker_opt.files import default_cache_folder
from defaker_opt.runtime import open_build
from tests.conftest import defaker_opt
from tests.drift_pictures import write_pictures

CREW = Crew("processes", 2, 1)


def quiet(what: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validate")


@pytest.fixture(scope="module")
def suite(folder: Path) -> Benchmark:
    suite = load_suite_file(write_pictures(folder / "suite", 4), None)
    suite.items[3].image.path.write_bytes(b"")
    return suite


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Benchmark:
    return load_suite_file(write_pictures(folder / "calibration", 2, first_seed=60), None)


@pytest.fixture(scope="module")
def comparison(
    float_build: Path, int8_build: Path, suite: Benchmark, calibration: Benchmark, folder: Path
) -> Comparison:
    plan = Plan((suite,), ("resize-0.5",), calibration, noise_images=6)
    return compare_builds(open_build(float_build), open_build(int8_build), plan, folder / "cache", CREW, quiet)


def test_all_runs_are_paired_in_order(comparison: Comparison, suite: Benchmark) -> None:
    assert [paired.run.perturbation for paired in comparison.runs] == ["none", "resize-0.5"]
    for paired in comparison.runs:
        rows = list(paired)
        assert [row.key for row in rows] == [item.key for item in suite.items]
        assert [row.key for row in rows if isinstance(row, Problem)] == [suite.items[3].key]
        pairs = [row for row in rows if isinstance(row, PairRow)]
        assert any(row.reference.verdict_logits != row.candidate.verdict_logits for row in pairs)
        assert {row.source for row in pairs} == {"000", "001", "002", "003"}
        assert {row.slices["domain"] for row in pairs} == {"drawn"}
        assert list(paired) == rows


def test_noise_is_the_reference_against_itself(comparison: Comparison) -> None:
    [noise] = comparison.noise
    assert comparison.noise_threads == 2
    assert noise.reference.cache.path != noise.candidate.cache.path
    rows = [row for row in noise if isinstance(row, PairRow)]
    assert 5 <= len(rows) <= 6
    for row in rows:
        assert row.reference.fake_probability == pytest.approx(row.candidate.fake_probability, abs=1e-4)


def test_what_was_left_out_is_said_once(comparison: Comparison, suite: Benchmark) -> None:
    problems = comparison.problems()
    assert len(problems) == 2
    for problem, perturbation in zip(problems, ("none", "resize-0.5"), strict=True):
        assert problem.startswith(f"suite ({perturbation}): {suite.items[3].key}: image: not a picture")
    inherited = dataclasses.replace(comparison.runs[0].reference.run.benchmark, problems=("x.png: no mask",))
    run = dataclasses.replace(comparison.runs[0].reference.run, benchmark=inherited)
    judged = dataclasses.replace(comparison.runs[0].reference, run=run, problems={})
    paired = dataclasses.replace(comparison.runs[0], reference=judged, candidate=judged)
    assert dataclasses.replace(comparison, runs=(paired,)).problems() == ("suite: x.png: no mask",)


def test_the_table_holds_every_row_and_cell(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    assert write_rows(comparison.runs, path) == 16
    with path.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == columns(slice_names(comparison.runs))
    expected = [as_cells(row, paired) for paired in comparison.runs for row in paired]
    for line, cells in zip(lines, expected, strict=True):
        assert {name: value for name, value in line.items() if value} == {
            name: str(value) for name, value in cells.items() if value is not None
        }
    judged = next(line for line in lines if line["label"] == "1")
    for side in ("reference", "candidate"):
        tp, fp, fn = (int(judged[f"{side}_{name}"]) for name in ("tp", "fp", "fn"))
        assert float(judged[f"{side}_iou"]) == pytest.approx(tp / (tp + fp + fn))
        assert float(judged[f"{side}_verdict_logit_7"])
    assert [path.name for path in path.parent.iterdir()] == ["rows.csv"]


def test_a_table_that_cannot_be_written_is_named(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DefakerError, match=r"rows\.csv: cannot be written"):
        write_rows(comparison.runs, tmp_path / "file" / "rows.csv")


def test_a_calibration_picture_among_the_tested_ends_it(
    float_build: Path, suite: Benchmark, folder: Path, tmp_path: Path
) -> None:
    with Image.open(suite.items[2].image.path) as image:
        image.resize((72, 48), Image.Resampling.BICUBIC).save(tmp_path / "again.jpg", quality=70)
    (tmp_path / "taught.csv").write_text("image,label,mask\nagain.jpg,0,\n")
    plan = Plan((suite,), (), load_suite_file(tmp_path / "taught.csv", None), 0)
    build = open_build(float_build)
    with pytest.raises(SuiteError, match=rf"taught are in the test set suite too.*again\.jpg is {suite.items[2].key}"):
        compare_builds(build, build, plan, folder / "cache", CREW, quiet)


def test_suites_and_pictures_must_have_names_of_their_own(float_build: Path, suite: Benchmark, tmp_path: Path) -> None:
    build = open_build(float_build)
    with pytest.raises(SuiteError, match="--suite suite: given twice"):
        compare_builds(build, build, Plan((suite, suite), (), suite, 0), tmp_path, CREW, quiet)
    twice = Benchmark("twice", (suite.items[0], suite.items[1], suite.items[0]))
    with pytest.raises(SuiteError, match=f"twice: 2 pictures have the key {suite.items[0].key}; give each its own"):
        compare_builds(build, build, Plan((twice,), (), suite, 0), tmp_path, CREW, quiet)


def test_our_sets_are_suites(tmp_path: Path) -> None:
    quick = load_suite("quick", None, tmp_path, quiet)
    assert quick.name == "quick"
    assert len(quick.items) == 120
    assert {item.label for item in quick.items} == {0, 1}
    assert {item.slices["domain"] for item in quick.items} == {"natural", "document", "deepfake", "aigc"}
    for real, fake in zip(quick.items[::2], quick.items[1::2], strict=True):
        assert (real.label, fake.label) == (0, 1)
        assert real.source == fake.source != ""
        assert real.key[:-1] == fake.key[:-1]
        assert real.mask is None
        assert fake.mask is not None
        assert fake.mask.path.is_file()
        assert set(fake.slices) == {"domain", "operation", "codec"}


@pytest.mark.parametrize(
    ("codec", "quality", "expected"),
    [
        ("jpeg", 74, "jpeg<75"),
        ("jpeg", 75, "jpeg75-89"),
        ("jpeg", 90, "jpeg>=90"),
        ("png", 0, "png"),
        ("webp", 80, "webp"),
    ],
)
def test_codecs_are_sliced_by_quality(codec: str, quality: int, expected: str) -> None:
    assert codec_slice(codec, quality) == expected


def test_suites_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"--suite casia: say with --data where .* embedded, quick"):
        load_suite("casia", None, tmp_path, quiet)
    with pytest.raises(DefakerError, match="no-such-benchmark"):
        load_suite("no-such-benchmark", tmp_path, tmp_path, quiet)
    with pytest.raises(DefakerError, match=r"missing\.csv"):
        load_suite(str(tmp_path / "missing.csv"), None, tmp_path, quiet)


def test_a_detector_becomes_a_float_build_once(tmp_path: Path, float_build: Path) -> None:
    first = open_reference("reference", tmp_path, quiet)
    assert first.folder.parent == tmp_path / "builds"
    assert {stage["scheme"] for stage in first.manifest.data["stages"].values()} == {"float"}
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    assert open_reference("reference", tmp_path, quiet).digest == first.digest
    assert (first.folder / "manifest.json").stat().st_mtime_ns == written
    assert open_reference(str(float_build), tmp_path, quiet).folder == float_build
    with pytest.raises(DefakerError, match="nowhere"):
        open_reference(str(tmp_path / "nowhere"), tmp_path, quiet)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    monkeypatch.delenv("DEFAKER_CACHE_DIR", raising=False)
    assert default_cache_folder() == Path("xdg/defaker-opt")
    monkeypatch.setenv("DEFAKER_CACHE_DIR", "mine")
    assert default_cache_folder() == Path("mine")
    monkeypatch.delenv("DEFAKER_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "defaker-opt"


def test_the_verb_ends_with_its_counts(
    int8_build: Path, suite: Benchmark, folder: Path, comparison: Comparison
) -> None:
    done = defaker_opt(
        "validate", int8_build, "--reference", int8_build, "--suite", folder / "suite" / "suite.csv", "--calibration",
        folder / "calibration" / "calibration.csv", "--cache", folder / "cache", "--report", folder / "report",
        "--noise-images", 0, "--workers", 2, "--json",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["decision"] == "UNDECIDED"
    assert result["pooled"]["images"] == 7
    assert len(result["problems"]) == 1
    assert result["build"]["digest"] == comparison.candidate.digest
    assert result["build"]["trained"] is True
    assert not any(line.startswith("untrained: ") for line in result["warnings"])
    assert len((folder / "report" / "rows.csv").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--perturb", "jpg-70"], "perturbation 'jpg-70' is not one of"),
        (["--engine", "rai"], "--engine 'rai' is not one of"),
        (["--workers", "-1"], "--workers: must be 0 or more"),
        (["--suite", "casia"], "--suite casia: say with --data"),
        (["--max-drop", "verdict_acuracy=0.01"], "'verdict_acuracy' is not one of"),
        (["--max-drop", "mask_iou"], "--max-drop mask_iou: must be METRIC=DROP"),
        (["--max-drop", "mask_iou=5"], "--max-drop mask_iou=5: must be above 0 and below 1, got 5"),
        (["--max-drop", "mask_iou=x"], "--max-drop mask_iou=x: must be above 0 and below 1"),
        (["--max-drop", "mask_iou=0.1", "--max-drop", "mask_iou=0.2"], "mask_iou given twice"),
        (["--write-refit", "new"], "--write-refit new: nothing to write; say with --refit"),
        (["--refit", "calibration", "--write-refit", "."], ".: already there, and a build is never changed"),
    ],
)
def test_mistakes_end_with_one_line(words: list[str], message: str, int8_build: Path, tmp_path: Path) -> None:
    done = defaker_opt(
        "validate", int8_build, "--reference", int8_build, "--cache", tmp_path / "cache", *words, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_the_extra_that_brings_it(int8_build: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['scipy'] = None; sys.argv[0] = 'defaker-opt'; from defaker_opt.cli import main; main()"
    )
    words = ["validate", int8_build, "--reference", int8_build, "--cache", tmp_path]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: this needs scipy; install it with: pip install 'defaker-opt[validate]'" in done.stderr
    assert "Traceback" not in done.stderr
