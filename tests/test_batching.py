"""Pictures that share calls of the vision encoder: who waits for whom, whose error is whose, and that nothing changes.

Times are never measured: a wait is so long that it would be noticed, or is read off the condition it is given to.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.errors import EXIT_INTERRUPTED, BuildError, DefakerError
from defaker_opt.methods import parse_scheme
from defaker_opt.runtime import Session, Verdict, open_build, open_session
from defaker_opt.runtime.at_once import BY_ROW, session_at_once
from defaker_opt.runtime.backends import Choice, OpenStage, Tensors
from defaker_opt.runtime.backends.onnx_runtime import open_stage
from defaker_opt.runtime.batching import BatchingSession, Company, Meeting
from defaker_opt.runtime.build import MANIFEST, SEAL, Build, Manifest, json_text, seal
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.images import image_tiles
from defaker_opt.sample import sample_image
from defaker_opt.target import ENCODINGS, load_target
from tests.conftest import COMMAND, defaker_opt, shared_build
from tests.test_graphs import OneLayer, outliers, written

# Nobody waits so long unless something is wrong, and then the test says so.
LONG_MS = 60_000.0
LONG_S = LONG_MS / 1e3


class Doubling:
    """A stage that doubles its rows, notes its calls, and refuses what is not finite."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, Any]:
        tiles = tensors["tiles"]
        self.calls.append(len(tiles))
        if not np.isfinite(tiles).all():
            raise BuildError("not finite")
        return {name: {"twice": 2 * tiles, "same": tiles}[name] for name in outputs}


def tiles_of(value: float, count: int) -> dict[str, Any]:
    return {"tiles": np.full((count, 2), value, np.float32)}


def ended(futures: Sequence[Future[Any]]) -> list[Any]:
    """Results, or the errors in their place."""
    return [future.exception(LONG_S) or future.result() for future in futures]


def until_gathered(meeting: Meeting, calls: int) -> None:
    """Wait until so many calls wait for others."""
    for _ in range(int(LONG_MS)):
        batch = meeting._gathering
        if batch is not None and len(batch.calls) == calls:
            return
        time.sleep(0.001)
    raise AssertionError(f"{calls} calls never met")


def call_at_once(meeting: Meeting, stage: Callable[..., Any], given: Sequence[Mapping[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(given)) as threads:
        return ended([threads.submit(meeting.call, stage, each, ("twice",)) for each in given])


def test_when_all_are_there_one_call_is_made_and_each_gets_its_rows() -> None:
    stage, meeting = Doubling(), Meeting(Company(LONG_MS, pictures=4, tiles=100))
    results = call_at_once(meeting, stage, [tiles_of(number, number + 1) for number in range(4)])
    assert stage.calls == [1 + 2 + 3 + 4]
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result["twice"], np.full((number + 1, 2), 2 * number))


def test_each_gets_the_outputs_it_asked_for() -> None:
    stage, meeting = Doubling(), Meeting(Company(LONG_MS, pictures=2, tiles=100))
    with ThreadPoolExecutor(2) as threads:
        wanted = (("twice",), ("same", "twice"))
        results = ended([threads.submit(meeting.call, stage, tiles_of(1, 1), names) for names in wanted])
    assert [tuple(result) for result in results] == list(wanted)
    assert stage.calls == [2]


class Watched(threading.Condition):
    """A condition that notes how long somebody may wait, and lets the test decide when that time is over."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.timeouts: list[float | None] = []
        self.waiting = threading.Event()
        self.over = threading.Event()
        self.error = error

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        self.timeouts.append(timeout)
        self.waiting.set()
        self.release()
        try:
            assert self.over.wait(LONG_S)
        finally:
            self.acquire()
        if self.error:
            raise self.error
        return predicate()


def leader_and_follower(
    threads: ThreadPoolExecutor, meeting: Meeting, changed: Watched, opened: OpenStage, given: tuple[Tensors, Tensors]
) -> list[Future[dict[str, Any]]]:
    """Two calls of which the second meets the first while that waits; then its time is over."""
    leader = threads.submit(meeting.call, opened, given[0], ("twice",))
    assert changed.waiting.wait(LONG_S)
    follower = threads.submit(meeting.call, opened, given[1], ("twice",))
    until_gathered(meeting, 2)
    changed.over.set()
    return [leader, follower]


def test_alone_a_picture_waits_as_long_as_allowed_and_goes() -> None:
    stage, changed = Doubling(), Watched()
    changed.over.set()
    result = Meeting(Company(7.0, pictures=4, tiles=100), changed).call(stage, tiles_of(3, 2), ("twice",))
    np.testing.assert_array_equal(result["twice"], np.full((2, 2), 6))
    assert changed.timeouts == [0.007] and stage.calls == [2]


def test_those_who_came_until_then_go_together_and_the_next_begins_anew() -> None:
    stage, changed = Doubling(), Watched()
    meeting = Meeting(Company(7.0, pictures=4, tiles=100), changed)
    with ThreadPoolExecutor(2) as threads:
        ended(leader_and_follower(threads, meeting, changed, stage, (tiles_of(1, 1), tiles_of(2, 2))))
    meeting.call(stage, tiles_of(3, 3), ("twice",))
    assert stage.calls == [3, 3]
    assert changed.timeouts == [0.007, 0.007], "only those who came first wait, and a follower's wait ends with theirs"


def test_a_call_never_takes_more_tiles_than_allowed() -> None:
    """Whoever finds no room lets the others go, and begins the next batch."""
    stage, meeting = Doubling(), Meeting(Company(LONG_MS, pictures=3, tiles=4))
    with ThreadPoolExecutor(3) as threads:
        futures = []
        for value, count in ((1, 2), (2, 3), (3, 1)):
            futures.append(threads.submit(meeting.call, stage, tiles_of(value, count), ("twice",)))
            if value == 1:
                until_gathered(meeting, 1)
        results = ended(futures)
    assert sorted(stage.calls) in ([2, 4], [3, 3]) and max(stage.calls) <= 4
    assert [float(result["twice"][0, 0]) for result in results] == [2, 4, 6]


def test_what_fills_a_call_goes_at_once_and_leaves_those_who_wait() -> None:
    stage, meeting = Doubling(), Meeting(Company(LONG_MS, pictures=3, tiles=4))
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(meeting.call, stage, tiles_of(1, 2), ("twice",))
        until_gathered(meeting, 1)
        meeting.call(stage, tiles_of(2, 9), ("twice",))
        assert stage.calls == [9] and not waits.done()
        meeting.call(stage, tiles_of(3, 2), ("twice",))
        waits.result(LONG_S)
    assert stage.calls == [9, 4]


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("place", [0, 2])
def test_the_guilty_one_fails_alone(width: int, place: int) -> None:
    """Also where the tiles are of another size, so that they cannot even be put together."""
    given = [tiles_of(number, 1) for number in range(4)]
    given[place] = {"tiles": np.full((1, width), np.nan, np.float32)}
    results = call_at_once(Meeting(Company(LONG_MS, pictures=4, tiles=100)), Doubling(), given)
    assert [isinstance(result, BuildError) for result in results] == [number == place for number in range(4)]
    good = [number for number in range(4) if number != place]
    assert [float(results[number]["twice"][0, 0]) for number in good] == [2.0 * number for number in good]


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_nobody_waits_for_a_thread_that_was_interrupted(where: str) -> None:
    changed = Watched(KeyboardInterrupt if where == "waiting" else None)
    stage, interrupted = Doubling(), threading.Event()

    def interrupt_once(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, Any]:
        if where == "running" and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return stage(tensors, outputs)

    meeting = Meeting(Company(LONG_MS, pictures=3, tiles=100), changed)
    with ThreadPoolExecutor(2) as threads:
        given = (tiles_of(1, 1), tiles_of(2, 1))
        leader, follower = leader_and_follower(threads, meeting, changed, interrupt_once, given)
        assert isinstance(leader.exception(LONG_S), KeyboardInterrupt)
        assert float(follower.result(LONG_S)["twice"][0, 0]) == 4
    assert meeting._gathering is None and stage.calls == [1]


def test_many_threads_get_their_own_rows_whoever_they_meet() -> None:
    stage, meeting = Doubling(), Meeting(Company(1.0, pictures=8, tiles=9))

    def work(thread: int) -> None:
        for number in range(40):
            value, count = 1000 * thread + number, 1 + (thread * 7 + number) % 5
            got = meeting.call(stage, tiles_of(value, count), ("twice",))["twice"]
            np.testing.assert_array_equal(got, np.full((count, 2), 2 * value))

    with ThreadPoolExecutor(8) as threads:
        assert ended([threads.submit(work, thread) for thread in range(8)]) == [None] * 8
    assert max(stage.calls) <= 9 and sum(stage.calls) == sum(1 + (t * 7 + n) % 5 for t in range(8) for n in range(40))


# What cannot be tried here is read by engines, or by OpenVINO.
@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((name, "cpu") for name in ("float", "int8", "int8-token", "int8-static", "int8-outlier", "nf4-g64")),
        *((name, "cpu") for name in ("int4-g32", "int4-asym-g32", "int4-sym-g64", "int2-asym-g32")),
        *((name, "h200") for name in ("int8-static", "fp8-static", "int4-sym-g64")),
    ],
)
def test_encodings_that_are_allowed_round_a_row_whatever_is_beside_it(
    scheme: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are not, do not: one row of the company is thirty times larger than the others."""
    weight = np.random.default_rng(2).standard_normal((24, 192)).astype(np.float32)
    parsed = parse_scheme(scheme)
    detector = OneLayer(weight, parsed)
    for name, codes in detector.codes.items():
        if parsed is not None and parsed.activations == "static":
            detector.codes[name] = dataclasses.replace(codes, input_scale=20 / parsed.largest_code)
    path, graph = written(detector, weight.shape, tmp_path, monkeypatch, target)  # type: ignore[arg-type]
    opened = open_stage(path, graph.spec, {"threads": 1, **({"as_written": True} if target == "h200" else {})})
    together = outliers(19, 192)
    alone, joint = (opened({"x": x}, ("y",))["y"][:9] for x in (together[:9].copy(), together))
    change = np.linalg.norm(joint - alone) / np.linalg.norm(alone)
    kind = "float" if parsed is None else parsed.kind
    if load_target(target).encodings[kind] in BY_ROW:
        assert change <= 1e-6
    else:
        assert change >= 1e-4


def test_every_encoding_is_judged_and_those_that_find_scales_in_a_call_are_not_allowed() -> None:
    known = {name for names in ENCODINGS.values() for name in names}
    assert known - set(BY_ROW) == {"matmul_integer", "llm_int8"} and set(BY_ROW) <= known


def with_tiles(folder: Path, tiles: int) -> Build:
    """A build as if its target took so many tiles a call."""
    build = open_build(folder)
    data: dict[str, Any] = copy.deepcopy(dict(build.manifest.data))
    data["target"]["session"]["tiles"] = tiles
    return dataclasses.replace(build, manifest=Manifest(data))


def write_with_tiles(folder: Path, copied: Path, tiles: int) -> Path:
    """The same on disk."""
    shutil.copytree(folder, copied)
    data = dict(with_tiles(folder, tiles).manifest.data)
    (copied / MANIFEST).write_text(json_text({**data, SEAL: seal(data)}))
    return copied


def pictures() -> list[Image.Image]:
    """Of 1, 3, 4, 5 and 5 tiles."""
    drawn = np.random.default_rng(0).integers(0, 255, (400, 1100, 3), dtype=np.uint8)
    photo = sample_image()
    sizes = [photo[:64, :64], photo[:200, :440], drawn, photo, drawn[:, :400]]
    return [Image.fromarray(np.ascontiguousarray(each)) for each in sizes]


def judge_at_once(session: Session, images: Sequence[Image.Image]) -> list[Verdict]:
    with ThreadPoolExecutor(len(images)) as threads:
        return list(threads.map(lambda image: session.judge(image, gate=0.0), images))


def counting(session: Session) -> list[int]:
    """Notes how many tiles each call of the vision encoder has."""
    counts: list[int] = []
    opened = session.open_stage("vision_encoder")

    def count(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, Any]:
        counts.append(len(tensors["tiles"]))
        return opened(tensors, outputs)

    session._open["vision_encoder"] = count
    return counts


# Rows of a product are summed in the same order however many there are, on the machines this was tried on: no number
# differed. It is not promised by the libraries, and sums in another order are off by some 1e-7 of them.
CLOSE = 1e-4


@pytest.mark.parametrize(
    ("recipe", "choice"),
    [
        ("float32", None),
        ("int8-static", None),
        ("float32", Choice("torch_cuda", {"device": "cpu"})),
        pytest.param("datacenter-int8", Choice("torch_cuda", {"device": "cpu"}), marks=pytest.mark.slow),
    ],
    ids=["float32", "int8-static", "float32-torch", "datacenter-int8-torch"],
)
def test_pictures_that_share_calls_get_the_verdicts_they_get_alone(
    recipe: str, choice: Choice | None, builds: Path
) -> None:
    images = pictures()
    plain = open_session(with_tiles(shared_build(builds, recipe), 0), 1, choice)
    alone = [plain.judge(image, gate=0.0) for image in images]
    counts = counting(plain)
    shared = session_at_once(plain, len(images), LONG_MS)
    together = judge_at_once(shared, images)
    assert len(counts) == 1, "five pictures, one call"
    for one, other in zip(alone, together):
        np.testing.assert_allclose(other.verdict_logits, one.verdict_logits, atol=CLOSE)
        assert one.mask is not None and other.mask is not None
        assert (one.mask != other.mask).mean() <= CLOSE
        assert other.latency_ms.keys() == one.latency_ms.keys() | ({"load"} & other.latency_ms.keys())


def test_a_target_with_fewer_tiles_a_call_gets_no_more(float_build: Path) -> None:
    plain = open_session(with_tiles(float_build, 4), 1)
    images = pictures()
    alone = [plain.judge(image).fake_probability for image in images]
    counts = counting(plain)
    shared = session_at_once(plain, len(images), 50.0)
    assert [verdict.fake_probability for verdict in judge_at_once(shared, images)] == pytest.approx(alone, abs=CLOSE)
    assert max(counts) <= 4


def test_a_picture_whose_tiles_fail_does_not_spoil_the_others(float_build: Path) -> None:
    plain = open_session(with_tiles(float_build, 0), 1)
    images = pictures()[1:4]
    alone = [plain.judge(image).fake_probability for image in images]
    opened = plain.open_stage("vision_encoder")
    guilty = Image.new("RGB", (64, 64), (255, 0, 255))

    def refuse(tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, Any]:
        if any(np.ptp(tile, axis=(1, 2)).max() == 0 for tile in tensors["tiles"]):
            raise BuildError("a tile of one colour")
        return opened(tensors, outputs)

    plain._open["vision_encoder"] = refuse
    shared = session_at_once(plain, 4, LONG_MS)
    with ThreadPoolExecutor(4) as threads:
        results = ended([threads.submit(shared.judge, image) for image in [images[0], guilty, *images[1:]]])
    assert isinstance(results.pop(1), BuildError)
    assert [verdict.fake_probability for verdict in results] == pytest.approx(alone, abs=CLOSE)


def test_run_gives_the_same_rows_in_the_same_order(float_build: Path, tmp_path: Path) -> None:
    build = write_with_tiles(float_build, tmp_path / "build", 0)
    for number, image in enumerate(pictures()):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("no picture")
    images = sorted(tmp_path.glob("*.png"))
    rows = []
    for options in ([], ["--concurrency", "4", "--batch-wait", "20"]):
        done = defaker_opt("run", build, *images, "--json", "--gate", "0", "--threads", "1", *options)
        assert done.returncode == 2, done.stderr
        rows.append([json.loads(line) for line in done.stdout.splitlines()])
    assert [row["image"] for row in rows[1]] == [str(path) for path in images]
    for alone, shared in zip(*rows):
        assert shared.pop("fake_probability", None) == pytest.approx(alone.pop("fake_probability", None), abs=CLOSE)
        assert shared.pop("mask_area", None) == pytest.approx(alone.pop("mask_area", None), abs=CLOSE)
        assert shared.pop("latency_ms", {}).keys() | {"load"} == alone.pop("latency_ms", {}).keys() | {"load"}
        assert shared == alone


def test_ctrl_c_ends_a_run_whose_pictures_wait_for_others(float_build: Path, tmp_path: Path) -> None:
    build = write_with_tiles(float_build, tmp_path / "build", 0)
    pictures()[0].save(tmp_path / "one.png")
    images = [tmp_path / "one.png"] * 1000
    command = [*COMMAND, "run", build, *images, "--threads", "1", "--concurrency", "3", "--batch-wait", "1000"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "one.png" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == EXIT_INTERRUPTED and "Traceback" not in errors


def test_without_a_wait_nothing_is_shared(float_build: Path) -> None:
    session = open_session(with_tiles(float_build, 0))
    assert session_at_once(session, 4, 0.0) is session
    assert isinstance(session_at_once(session, 4, 5.0), BatchingSession)


def test_what_is_refused_would_depend_on_the_company(int8_build: Path) -> None:
    session = open_session(with_tiles(int8_build, 0), 1)
    facts = session.build.manifest.data["input"]
    tiles = [image_tiles(image, facts["tile_size"], 1, facts["max_tiles"]) for image in pictures()]
    alone = session.see(tiles[0], Clock())["vision_tokens"]
    beside = session.see(np.concatenate(tiles), Clock())["vision_tokens"][: len(alone)]
    assert np.linalg.norm(beside - alone) > 1e-3 * np.linalg.norm(alone)


def test_a_build_whose_rounding_depends_on_the_call_is_refused(int8_build: Path) -> None:
    with pytest.raises(DefakerError) as raised:
        session_at_once(open_session(with_tiles(int8_build, 0)), 4, 5.0)
    message = str(raised.value)
    assert message.startswith(f"--batch-wait 5: {int8_build}") and "matmul_integer" in message
    assert "leave --batch-wait out" in message and "--recipe int8-static" in message


def test_a_target_that_takes_one_tile_a_call_is_refused(float_build: Path) -> None:
    with pytest.raises(DefakerError, match=r"--batch-wait 5: .*takes one tile a call.*tiles: 0"):
        session_at_once(open_session(open_build(float_build)), 4, 5.0)


@pytest.mark.parametrize(
    ("target_tiles", "backend", "most"), [(0, "onnx_runtime", 20), (3, "onnx_runtime", 3), (0, "tensor_rt", 5)]
)
def test_a_call_takes_what_the_target_and_its_engines_are_made_for(
    float_build: Path, target_tiles: int, backend: str, most: int
) -> None:
    """The embedded detector has 4 tiles and a thumbnail at most."""
    session = open_session(with_tiles(float_build, target_tiles), 0, Choice(backend))
    shared = session_at_once(session, 4, 5.0)
    assert isinstance(shared, BatchingSession) and shared.meeting._company == Company(5.0, 4, most)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-wait", "5"], ["--batch-wait 5", "one by one", "--concurrency 2"]),
        (["--batch-wait", "-1", "--concurrency", "2"], ["--batch-wait -1", "0 (each picture alone) … 1000", "try 5"]),
        (["--batch-wait", "1001", "--concurrency", "2"], ["--batch-wait 1001", "1000 milliseconds", "try 5"]),
        (["--batch-wait", "nan", "--concurrency", "2"], ["--batch-wait nan", "1000 milliseconds", "try 5"]),
        (["--backend", "torch_cuda", "--concurrency", "2"], ["--concurrency 2", "torch_cuda", "--batch-wait 5"]),
    ],
)
def test_what_cannot_be_is_said_before_any_picture(float_build: Path, options: list[str], expected: list[str]) -> None:
    done = defaker_opt("run", float_build, "absent.png", *options)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert all(words in said for words in expected), said
