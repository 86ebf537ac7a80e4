"""Real builds on a few pictures: equal rows however they are judged, nothing judged twice, nothing lost or hidden."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defaker_opt.benchmarks import Benchmark
from defaker_opt.benchmarks.load import load_suite_file
from defaker_opt.drift import run as drift_run
from defaker_opt.drift.engines import find_engine, processes
from defaker_opt.drift.judge import judge_task
from defaker_opt.drift.rows import ImageRow, Problem, unpack_mask
from defaker_opt.drift.run import Crew, Run, asked_crew, fitted_crew, judge_runs, other_threads, read_task, sample_runs
from defaker_opt.errors import DefakerError, SuiteError
from defaker_opt.runtime import Build, open_build, open_session
from defaker_opt.runtime.images import full_size_mask, load_image
from tests.conftest import COMMAND, defaker_opt
from tests.drift_pictures import SIZE, write_pictures

ALONE = Crew("processes", 1, 1)


def quiet(what: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def int8(int8_build: Path) -> Build:
    return open_build(int8_build)


@pytest.fixture
def suite(tmp_path: Path) -> Benchmark:
    return load_suite_file(write_pictures(tmp_path / "suite", 3), None)


@pytest.fixture
def judged(int8: Build, suite: Benchmark, tmp_path: Path) -> list[ImageRow | Problem]:
    [rows] = judge_runs(int8, [Run(suite)], tmp_path / "alone", ALONE, quiet)
    return list(rows)


def test_a_row_says_what_the_runtime_says(int8: Build, suite: Benchmark, judged: list[ImageRow]) -> None:
    session = open_session(int8, 1)
    for item, row in zip(suite.items, judged, strict=True):
        verdict = session.judge(load_image(item.image.path), gate=0.0)
        assert verdict.mask is not None
        assert verdict.mask_logits is not None
        size = int8.manifest.data["input"]["mask_image_size"]
        np.testing.assert_array_equal(full_size_mask(verdict.mask_logits, size, *SIZE), verdict.mask)
        assert (row.key, row.label) == (item.key, item.label)
        assert row.fake_probability == verdict.fake_probability
        assert row.predicted == int(verdict.is_fake)
        np.testing.assert_array_equal(np.float32(row.verdict_logits), verdict.verdict_logits)
        np.testing.assert_array_equal(unpack_mask(row.mask), verdict.mask)
        truth = np.zeros(SIZE[::-1], bool)
        if item.mask is not None:
            truth = np.asarray(Image.open(item.mask.path)) > 127
        counts = row.mask.truth
        assert counts is not None
        assert (counts.tp, counts.fp) == ((verdict.mask & truth).sum(), (verdict.mask & ~truth).sum())
        assert (counts.fn, counts.tn) == ((~verdict.mask & truth).sum(), (~verdict.mask & ~truth).sum())
        assert (sum(counts.forged), sum(counts.authentic)) == (truth.sum(), (~truth).sum())
        assert {"vision_encoder", "mask_decoder", "total"} < set(row.latency_ms)


def test_rows_do_not_depend_on_workers_or_order(
    int8: Build, suite: Benchmark, judged: list[ImageRow], tmp_path: Path
) -> None:
    [two] = judge_runs(int8, [Run(suite)], tmp_path / "two", Crew("processes", 2, 1), quiet)
    assert list(two) == judged
    turned = dataclasses.replace(suite, items=suite.items[::-1])
    [back] = judge_runs(int8, [Run(turned)], tmp_path / "turned", Crew("processes", 3, 1), quiet)
    assert list(back)[::-1] == judged
    assert len(two) == 6


def test_ray_gives_the_same_rows(int8_build: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    table = write_pictures(tmp_path / "suite", 2)
    other = write_pictures(tmp_path / "other", 1, first_seed=50)
    files = {}
    for engine in ("processes", "ray"):
        # A cache each, so that neither reads what the other judged.
        done = defaker_opt(
            "validate", int8_build, "--reference", int8_build, "--suite", table, "--calibration", other,
            "--cache", tmp_path / engine, "--report", tmp_path / engine, "--engine", engine, "--workers", 2,
            "--noise-images", 0, env={**os.environ, "RAY_ADDRESS": ""},
        )  # fmt: skip
        assert done.returncode in (0, 3), done.stderr
        files[engine] = without_times(tmp_path / engine / "rows.csv")
    assert files["ray"] == files["processes"]
    assert len(files["ray"]) == 5


def without_times(path: Path) -> list[dict[str, str]]:
    """The cells of rows.csv that have to be the same each time; the header counts as a row."""
    import csv

    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    header = dict.fromkeys(rows[0], "")
    return [header, *({k: v for k, v in row.items() if not k.endswith("_ms")} for row in rows)]


def test_ray_says_nothing_to_its_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from defaker_opt.drift.engines import ray as engine

    told: dict[str, object] = {}

    def init(**options: object) -> None:
        told.update(options, usage=os.environ["RAY_USAGE_STATS_ENABLED"])

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with engine._cluster(2):
        pass
    assert (told["usage"], told["address"], told["include_dashboard"]) == ("0", "local", False)


def test_what_was_judged_is_not_judged_again(
    int8: Build, suite: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)
    before, latencies = list(first), [row.latency_ms for row in first]  # type: ignore[union-attr]
    counted = count_tasks(monkeypatch)
    [again] = judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)
    assert counted == []
    assert list(again) == before
    assert [row.latency_ms for row in again] == latencies  # type: ignore[union-attr]
    # A changed mask, a changed picture and another perturbation have rows of their own; others stay.
    assert suite.items[1].mask is not None
    Image.new("L", SIZE, 255).save(suite.items[1].mask.path)
    Image.new("RGB", SIZE, (7, 80, 9)).save(suite.items[2].image.path)
    [changed] = judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)
    assert counted == [suite.items[1].key, suite.items[2].key]
    assert [new == old for new, old in zip(changed, before)] == [True, False, False, True, True, True]
    judge_runs(int8, [Run(suite, "jpeg-50")], tmp_path, ALONE, quiet)
    judge_runs(int8, [Run(suite)], tmp_path, other_threads(ALONE), quiet)
    assert len(counted) == 2 + 6 + 6


def count_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the pictures that an engine is given from now on."""
    seen: list[str] = []

    class Counting:
        @staticmethod
        def judge_tasks(build: Build, workers: int, threads: int, tasks: object) -> object:
            def noted() -> object:
                for number, task in tasks:  # type: ignore[attr-defined]
                    seen.append(task.key)
                    yield number, task

            return processes.judge_tasks(build, workers, threads, noted())  # type: ignore[arg-type]

    monkeypatch.setattr(drift_run, "find_engine", lambda name: Counting)
    return seen


def test_code_that_decides_rows_is_part_of_their_owner(int8: Build) -> None:
    for pattern in drift_run._CODE:
        assert list(drift_run.PACKAGE.glob(pattern)), pattern
    owner = drift_run.row_owner(int8, 1)
    assert owner["build"] == int8.digest
    assert owner["libraries"]["onnxruntime"]
    assert owner != drift_run.row_owner(int8, 2)


def break_items(suite: Benchmark) -> list[str]:
    """Damage five of six items; what must be said about each."""
    items = suite.items
    items[0].image.path.write_bytes(b"no picture")
    items[1].image.path.write_bytes(items[1].image.path.read_bytes()[:100])
    items[2].image.path.unlink()
    assert items[3].mask is not None
    assert items[5].mask is not None
    Image.new("L", (5, 5)).save(items[3].mask.path)
    items[5].mask.path.write_bytes(b"")
    return [
        "image: not a picture",
        "image: cannot be decoded",
        "no such file|cannot be read",
        "mask: 5x5, its picture 96x64",
        "mask: not a picture",
    ]


def test_bad_pictures_are_said_and_the_others_judged(int8: Build, suite: Benchmark, tmp_path: Path) -> None:
    import re

    expected = break_items(suite)
    [rows] = judge_runs(int8, [Run(suite)], tmp_path, Crew("processes", 2, 1), quiet)
    outcomes = list(rows)
    assert [isinstance(outcome, Problem) for outcome in outcomes] == [True, True, True, True, False, True]
    for outcome, words in zip([*outcomes[:4], outcomes[5]], expected, strict=True):
        assert isinstance(outcome, Problem)
        assert re.search(words, outcome.reason), outcome
    assert sorted(rows.problems) == [0, 1, 2, 3, 5]
    # A picture that was mended is judged by the next call.
    Image.new("RGB", SIZE).save(suite.items[0].image.path)
    [mended] = judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)
    assert sorted(mended.problems) == [1, 2, 3, 5]


def test_a_suite_without_one_good_picture_is_an_error(int8: Build, suite: Benchmark, tmp_path: Path) -> None:
    break_items(suite)
    suite.items[4].image.path.write_bytes(b"")
    with pytest.raises(SuiteError, match=r"not one picture could be judged; the first: .*image: not a picture"):
        judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)


def test_a_forged_picture_without_a_mask_has_no_counts(int8: Build, suite: Benchmark) -> None:
    task = read_task(dataclasses.replace(suite.items[1], mask=None), "none")
    row = judge_task(open_session(int8, 1), task)
    assert isinstance(row, ImageRow)
    assert row.mask.truth is None
    assert (row.mask.width, row.mask.height) == SIZE


def test_perturbed_pictures_are_judged_as_they_then_are(int8: Build, suite: Benchmark, tmp_path: Path) -> None:
    plain, smaller = judge_runs(int8, [Run(suite), Run(suite, "resize-0.5")], tmp_path, ALONE, quiet)
    for row, other in zip(plain, smaller, strict=True):
        assert isinstance(row, ImageRow)
        assert isinstance(other, ImageRow)
        assert (other.mask.width, other.mask.height) == (48, 32)
        assert other.picture_hash == row.picture_hash
        assert other.verdict_logits != row.verdict_logits


def test_progress_rises_to_the_end(int8: Build, suite: Benchmark, tmp_path: Path) -> None:
    told: list[float] = []
    suite.items[1].image.path.unlink()
    judge_runs(int8, [Run(suite), Run(suite, "jpeg-50")], tmp_path, ALONE, lambda what, share: told.append(share))
    assert told == sorted(told)
    assert len(told) == 12
    assert told[-1] == 1.0


def test_a_killed_worker_is_named_and_what_is_judged_kept(
    int8: Build, suite: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = processes._start

    def remember(build: Build, threads: int) -> object:
        started.append(start(build, threads))
        return started[-1]

    monkeypatch.setattr(processes, "_start", remember)

    def kill_after_two(what: str, share: float) -> None:
        if share >= 2 / 6:
            started[0][1].kill()
            started[0][1].join()

    with pytest.raises(
        DefakerError, match=r"ended with code -9 .*run again with fewer --workers, what is judged is kept"
    ):
        judge_runs(int8, [Run(suite)], tmp_path, ALONE, kill_after_two)
    counted = count_tasks(monkeypatch)
    judge_runs(int8, [Run(suite)], tmp_path, ALONE, quiet)
    assert len(counted) == 4


def test_a_killed_run_goes_on_and_ends_with_the_same_rows(int8_build: Path, tmp_path: Path) -> None:
    table = write_pictures(tmp_path / "suite", 12)
    other = write_pictures(tmp_path / "other", 1, first_seed=50)

    def command(cache: str) -> list[str]:
        words = [
            "validate", int8_build, "--reference", int8_build, "--suite", table, "--calibration", other, "--workers", 2,
            "--cache", tmp_path / cache, "--report", tmp_path / cache, "--noise-images", 0,
        ]  # fmt: skip
        return [*COMMAND, *map(str, words)]

    with subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        kept = wait_for_rows(tmp_path / "cut" / "rows", 4)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    left = kept.read_bytes()
    assert len(workers) >= 2
    assert not (tmp_path / "cut" / "rows.csv").exists()
    end = time.monotonic() + 60
    while any(alive(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [worker for worker in workers if alive(worker)]

    for cache in ("cut", "whole"):
        done = subprocess.run(command(cache), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in (0, 3), done.stderr
    assert len(left) < 0.9 * kept.stat().st_size
    assert kept.read_bytes()[: len(left) // 2] == left[: len(left) // 2]
    assert without_times(tmp_path / "cut" / "rows.csv") == without_times(tmp_path / "whole" / "rows.csv")


def wait_for_rows(folder: Path, count: int) -> Path:
    """Until about `count` rows are there; the file that has them."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in folder.glob("*.rows"):
            if path.stat().st_size > count * 700:
                return path
        time.sleep(0.01)
    raise AssertionError("no row was kept in two minutes")


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_noise_sample_is_the_same_each_time_and_has_both_labels(tmp_path: Path) -> None:
    suite = load_suite_file(write_pictures(tmp_path / "suite", 12), None)
    [one], [other] = sample_runs([Run(suite)], 8), sample_runs([Run(suite)], 8)
    assert one == other
    assert len(one.benchmark.items) == 8
    assert {item.label for item in one.benchmark.items} == {0, 1}
    assert [item for item in suite.items if item in one.benchmark.items] == list(one.benchmark.items)
    assert sample_runs([Run(suite)], 99) == (Run(suite),)


def test_the_crew_fits_cores_and_memory(int8: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_run, "available_cores", lambda: 8)

    def fitted(workers: int, threads: int) -> tuple[int, int]:
        crew = fitted_crew(asked_crew("processes", workers, threads), [int8])
        return crew.workers, crew.threads

    assert fitted(0, 0) == (8, 1)
    assert fitted(0, 2) == (4, 2)
    assert fitted(3, 0) == (3, 1)
    assert fitted(3, 5) == (3, 5)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 300_000, "SC_PAGE_SIZE": 4096}[name])
    assert fitted(0, 0) == (2, 4)
    assert other_threads(Crew("ray", 2, 4)) == Crew("ray", 2, 1)
    assert other_threads(Crew("ray", 8, 1)) == Crew("ray", 4, 2)
    assert other_threads(Crew("ray", 1, 1)) == Crew("ray", 1, 2)
    with pytest.raises(DefakerError, match="--workers: must be 0 or more, got -1"):
        asked_crew("processes", -1, 0)
    with pytest.raises(DefakerError, match="--threads: must be 0 or more, got -2"):
        asked_crew("processes", 0, -2)
    with pytest.raises(DefakerError, match=r"--engine 'rai' is not one of processes, ray \(did you mean 'ray'\?\)"):
        asked_crew("rai", 0, 0)


def test_every_engine_is_found_by_its_file() -> None:
    from defaker_opt.catalog import module_names

    names = module_names("drift.engines")
    assert names == ["processes", "ray"]
    for name in names:
        assert callable(find_engine(name).judge_tasks)
