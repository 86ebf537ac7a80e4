"""`profile` on a real build: what it measures, keeps, shows and refuses."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from defaker_opt.profiles.measure import Sample, judge_in_turns
from defaker_opt.profiles.operators import category_of, measure_operators, module_of, summarize_operators
from defaker_opt.profiles.profile import summarize
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.backends import Operator, Trace
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.recording import record_calls
from defaker_opt.runtime.spec import STAGES
from defaker_opt.sample import sample_image
from tests.conftest import defaker_opt

IMAGE = Image.fromarray(sample_image())


@pytest.fixture(scope="module")
def profiled(int8_build: Path, float_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The folder of a report, and the finished command."""
    folder = tmp_path_factory.mktemp("profile")
    options = ("--repeat", "2", "--compare", float_build, "--target", "orin-nano-super-8gb", "--report", folder)
    yield folder, defaker_opt("profile", int8_build, *options, "--json")


def test_one_json_object_ends_the_output(profiled: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = profiled
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data == json.loads((folder / "profile.json").read_text())
    assert len(data["samples"]) == 2
    assert set(data["measured"]["stages"]) == {*STAGES, "preprocess", "mask_resize"}
    assert data["measured"]["covered"] <= 1
    assert data["fresh"]["peak_memory_bytes"] > data["fresh"]["base_memory_bytes"] > 1e7
    assert data["throughput"][0]["concurrency"] == 1
    assert {"fp32", "int8", "int4"} == set(data["peaks"]["rates"])
    assert data["energy"]["measured"] or data["energy"]["joules_per_image"] is None
    stages = {row["stage"]: row for row in data["roofline"]}
    assert set(stages) == set(STAGES)
    assert stages["vision_encoder"]["work"]["operations"]["int8"] > 1e9
    assert stages["vision_encoder"]["target"]["ms"] > 0
    assert data["comparison"]["total"]["ratio"]["pairs"] == 2
    assert data["missing"] == []


def test_operators_carry_the_names_of_modules(profiled: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    data = json.loads((profiled[0] / "profile.json").read_text())
    modules = {row["module"] for stage in data["operators"] for row in stage["operators"]}
    for name in ("vision_encoder.tower.encoder.layer.0.mlp.fc1", "language.layers.1.mlp.down_proj"):
        assert name in modules
    assert "mask_encoder.trunk.blocks.0.attn" in modules
    for stage in data["operators"]:
        assert sum(stage["categories"].values()) <= stage["stage_ms"] * 1.0001
    quantize = next(s for s in data["operators"] if s["stage"] == "language")["categories"]["quantize and dequantize"]
    assert quantize > 0


def test_the_page_stands_alone(profiled: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (profiled[0] / "profile.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=", page)
    for name in ("waterfall", "samples", "roofline", "categories"):
        assert f'aria-label="{name}"' in page
    assert "float32 against int8" in page
    assert not {path.name for path in profiled[0].iterdir()} - {"profile.html", "profile.json"}


def test_a_kept_result_is_compared_with_a_slower_one(
    profiled: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    data = json.loads((profiled[0] / "profile.json").read_text())
    first, second = copy.deepcopy(data), copy.deepcopy(data)
    for result, factor in ((first, 1.0), (second, 1.5)):
        row = data["samples"][0]["latency_ms"]
        slow = {**row, "mask_encoder": row["mask_encoder"] * factor}
        result["samples"] = [{"round": n, "image": 0, "latency_ms": slow} for n in range(20)]
    for name, result in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    done = defaker_opt("profile", "--diff", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 1, done.stderr
    assert "slower: mask_encoder" in done.stdout
    done = defaker_opt("profile", "--diff", tmp_path / "a.json", tmp_path / "a.json", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["regressed"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either a build, or --diff A B"),
        (("BUILD", "--diff", "a", "b"), "give either a build, or --diff A B"),
        (("--diff", "MISSING", "MISSING"), "not a profile of this version; write one with"),
        (("BUILD", "--images", "MISSING"), "no picture there"),
        (("BUILD", "--target", "cpu"), "has no facts of a device"),
        (("BUILD", "--target", "orin"), "is not one of"),
        (("MISSING",), "no such folder"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], words: str, int8_build: Path, tmp_path: Path) -> None:
    places = {"BUILD": str(int8_build), "MISSING": str(tmp_path / "missing")}
    done = defaker_opt("profile", *(places.get(each, each) for each in arguments))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_builds_take_turns_and_every_sample_is_kept(int8_build: Path) -> None:
    sessions = [open_session(open_build(int8_build), 1) for _ in range(2)]
    told: list[tuple[str, float]] = []
    taken = judge_in_turns(sessions, [IMAGE, IMAGE], 0.0, 1, 2, lambda what, part: told.append((what, part)))
    assert [(s.round, s.image) for s in taken[0]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [what for what, _ in told] == ["warm up", "measure", "measure"]
    found = summarize(sessions[0].build, taken[0])
    assert found.total.n == 4
    assert set(found.stages) == {*STAGES, "preprocess", "mask_resize"}
    spans = [name for name, _, _ in found.timeline if name != "load"]
    # Three times its input is put together, and then it runs.
    assert spans.count("language") == 6
    assert spans[-2:] == ["mask_decoder", "mask_resize"]


def test_who_comes_first_comes_last_in_the_next_round() -> None:
    came: list[tuple[str, Image.Image]] = []

    def judging(name: str) -> Any:
        def judge(image: Image.Image, gate: float) -> SimpleNamespace:
            came.append((name, image))
            return SimpleNamespace(latency_ms={"total": 1.0}, timeline=())

        return SimpleNamespace(judge=judge)

    pictures = [IMAGE.copy(), IMAGE.copy()]
    judge_in_turns([judging(name) for name in "abc"], pictures, 0.0, 1, 10, lambda what, part: None)
    measured = came[len(pictures) * 3 :]
    for picture in pictures:
        order = [name for name, image in measured if image is picture]
        rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
        assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
        for names, following in zip(rounds[::2], rounds[1::2], strict=True):
            assert following == names[::-1]


def test_the_operators_of_a_run_fit_into_it(int8_build: Path) -> None:
    session = open_session(open_build(int8_build), 1)
    calls = record_calls(session.build, IMAGE, 0.0, 1)
    assert [call.stage for call in calls][-2:] == ["mask_encoder", "mask_decoder"]
    for stage in measure_operators(session, calls, repeat=3):
        assert 0 < stage.covered <= 1
        assert stage.between_ms >= 0
        assert stage.operators[0].milliseconds == max(row.milliseconds for row in stage.operators)
        assert sum(row.milliseconds for row in stage.operators) <= stage.stage_ms * (1 + 1e-9)


def test_what_tracing_adds_is_taken_off_every_call() -> None:
    took = {"language.a/Add_0": 9.0, "language.b/Add_0": 3.0, "language.c/Add_0": 0.5}
    operators = tuple(Operator(run, name, "Add", ms) for run in range(3) for name, ms in took.items())
    # 12.5 ms traced and 8.5 plain: the shortest has only 0.5 ms to give, so each of the other two gives 1.75.
    found = summarize_operators("language", Trace((8.5, 8.5, 20.0), operators), calls=1)
    assert found.stage_ms == 8.5
    assert [row.milliseconds for row in found.operators] == pytest.approx([7.25, 1.25, 0.0])
    assert found.tracing_ms == pytest.approx(1.75) and found.covered == pytest.approx(1)


def test_operators_that_take_less_than_their_stage_keep_their_time() -> None:
    operators = (Operator(0, "language/MatMul_0", "MatMul", 6.0),)
    found = summarize_operators("language", Trace((8.0,), operators), calls=1)
    assert (found.tracing_ms, found.between_ms, found.covered) == (0.0, 2.0, 0.75)


def test_spans_that_overlap_count_once() -> None:
    timeline = (("vision_encoder", 0.0, 6.0), ("mask_encoder", 2.0, 9.0))
    sample = Sample(0, 0, {"vision_encoder": 6.0, "mask_encoder": 7.0, "total": 10.0}, timeline)
    from defaker_opt.profiles.profile import _covered

    assert _covered(sample) == pytest.approx(0.9)


def test_a_clock_knows_what_ran_when() -> None:
    clock, other = Clock(), Clock()
    with clock("a"):
        pass
    with other("b"):
        pass
    clock.add(other)
    (first, begin, end), (second, _, last) = clock.timeline()
    assert (first, second) == ("a", "b")
    assert 0 <= begin <= end <= last
    assert set(clock.finish()) == {"a", "b", "total"}


@pytest.mark.parametrize(
    ("name", "kind", "module", "category"),
    [
        ("language.layers.0.mlp.up_proj.weight", "MatMulInteger", "language.layers.0.mlp.up_proj", "products"),
        (
            "language.layers.0.mlp.up_proj.weight.ratio",
            "Div",
            "language.layers.0.mlp.up_proj",
            "quantize and dequantize",
        ),
        ("language.layers.0.mlp/Mul_3", "Mul", "language.layers.0.mlp", "other"),
        ("language._empty_nn_module_stack_from_metadata_hook/Shape_0", "Shape", "language", "memory movement"),
        ("Transpose_token_4", "Transpose", "language (added by the runtime)", "memory movement"),
    ],
)
def test_nodes_are_sorted_by_module_and_purpose(name: str, kind: str, module: str, category: str) -> None:
    assert module_of(name, "language") == module
    assert category_of(name, kind) == category
