"""The whole line on the embedded detector, for every shipped recipe."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defaker_opt.catalog import yaml_names
from defaker_opt.pipeline import make_build, plan_job
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.images import load_image
from defaker_opt.runtime.self_test import run_self_test
from defaker_opt.runtime.spec import STAGES
from defaker_opt.sample import sample_image
from defaker_opt.stage_build import relative_difference
from defaker_opt.target import load_target
from tests.conftest import MODELOPT_PARAMS, MODELOPT_RECIPES, ROOT, shared_build, summary_of
from tests.conftest import make_build as build_of

DEV = ROOT.parent / "shared" / "data" / "dev"


def quiet(what: str, fraction: float) -> None:
    pass


# Apart from its target it is jetson-int8.
ALIKE = pytest.param("datacenter-int8", marks=pytest.mark.slow)
OTHERS = sorted({*yaml_names("recipes")} - {*MODELOPT_RECIPES, "datacenter-int8"})


@pytest.mark.parametrize("recipe", [*OTHERS, ALIKE, *MODELOPT_PARAMS])
def test_every_shipped_recipe_makes_a_build_that_passes_its_self_test(recipe: str, builds: Path) -> None:
    build = shared_build(builds, recipe)
    session = open_session(open_build(build))
    assert run_self_test(session).passed
    verdict = session.judge(Image.fromarray(sample_image()), gate=0.0)
    assert 0 <= verdict.fake_probability <= 1
    assert verdict.mask is not None
    assert verdict.mask.shape == sample_image().shape[:2]
    assert set(STAGES) < set(verdict.latency_ms)


def test_the_summary_says_what_the_folder_holds(any_build: Path) -> None:
    summary = summary_of(any_build)
    assert summary["build"] == str(any_build)
    assert summary["digest"] == open_build(any_build).digest
    assert summary["bytes"] == sum(path.stat().st_size for path in any_build.iterdir())
    assert summary["seconds"] > 0  # type: ignore[operator]
    assert summary["peak_memory_bytes"] > 10_000_000  # type: ignore[operator]
    stages: dict[str, dict[str, object]] = summary["stages"]  # type: ignore[assignment]
    assert set(stages) == set(STAGES)
    for stage, entry in stages.items():
        assert entry["bytes"] == sum(path.stat().st_size for path in any_build.glob(f"{stage}.onnx*"))
        assert set(entry) == {"bytes", "scheme", "parity"}
    assert "untrained" not in summary


def test_float_stages_equal_torch(float_build: Path) -> None:
    for entry in open_build(float_build).manifest.data["stages"].values():
        assert entry["scheme"] == "float"
        assert entry["parity"] < 1e-5


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_stages_are_small(recipe: str, builds: Path, float_build: Path) -> None:
    quantized = open_build(shared_build(builds, recipe)).manifest.data["stages"]
    whole = open_build(float_build).manifest.data["stages"]
    # One of the four feed-forward nets of the vision encoder stays in float.
    for stage, share in {"vision_encoder": 0.45, "language": 0.35, "mask_encoder": 0.35}.items():
        assert quantized[stage]["bytes"] <= share * whole[stage]["bytes"], stage
    if recipe == "int4":
        assert quantized["language"]["bytes"] <= 0.16 * whole["language"]["bytes"]


def test_sizes_are_predicted(any_build: Path) -> None:
    from defaker_opt.preview import preview_job

    manifest = open_build(any_build).manifest.data
    job = plan_job(load_recipe(manifest["recipe"]["name"]), load_target("cpu"), "reference")
    preview = preview_job(job, any_build)
    for stage, entry in manifest["stages"].items():
        assert preview["stages"][stage]["predicted_bytes"] == pytest.approx(entry["bytes"], rel=0.05)


def test_the_manifest_accounts_for_every_parameter(int8_build: Path) -> None:
    from defaker_opt.detector import load_detector, parameter_shapes

    manifest = open_build(int8_build).manifest.data
    notes = manifest["passes"][0]["quantize"]
    config = load_detector("reference").config
    every = {name for stage in STAGES for name in parameter_shapes(config, stage)}
    assert set(notes["quantized"]) | set(notes["left_in_float"]) == every
    assert not set(notes["quantized"]) & set(notes["left_in_float"])
    assert all(notes["left_in_float"].values())
    assert manifest["tools"]["torch"]
    assert manifest["recipe"]["name"] == "int8"


def test_two_builds_of_one_job_have_the_same_bytes(int8_build: Path, tmp_path: Path) -> None:
    # In a process of its own, as the first was: parity figures depend on how many threads torch was given.
    again = build_of("int8", tmp_path / "again")
    assert open_build(again).digest == open_build(int8_build).digest


def test_a_finished_build_is_returned_as_it_is(int8_build: Path) -> None:
    job = plan_job(load_recipe("int8"), load_target("cpu"), "reference")
    before = {path: path.stat().st_mtime_ns for path in int8_build.iterdir()}
    make_build(job, int8_build, quiet)
    assert {path: path.stat().st_mtime_ns for path in int8_build.iterdir()} == before


def photos() -> list[Path]:
    if not DEV.is_dir():
        return []
    with (DEV / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    large = [row for row in rows if row["source"] != "cifake"][::5]
    return [DEV.parent / row["image"] for row in [*large, *(row for row in rows if row["source"] == "cifake")]]


def test_int8_stays_near_float_on_real_photos(float_build: Path, int8_build: Path) -> None:
    images = photos() or [sample_image(seed) for seed in range(8)]
    exact, quantized = (open_session(open_build(build)) for build in (float_build, int8_build))
    differences = {}
    for number, each in enumerate(images):
        image = load_image(each) if isinstance(each, Path) else Image.fromarray(each)
        difference = quantized.judge(image).fake_probability - exact.judge(image).fake_probability
        differences[str(each) if isinstance(each, Path) else number] = abs(difference)
    # Where the detector is unsure, as of photographs without the grain it was taught, rounding moves its odds most: one
    # of some 227 photographs by 0.14, on average by 0.011.
    assert max(differences.values()) <= 0.2, differences
    assert np.mean(list(differences.values())) <= (0.015 if photos() else 0.03)


def test_the_prefix_cache_changes_nothing(float_build: Path) -> None:
    """Prefix once and suffixes on its key/values, against one pass over the whole prompt."""
    from defaker_opt.runtime.clock import Clock
    from defaker_opt.runtime.images import image_tiles

    session, clock = open_session(open_build(float_build)), Clock()
    facts = session.build.manifest.data["input"]
    tiles = image_tiles(Image.fromarray(sample_image(4)), facts["tile_size"], facts["min_tiles"], facts["max_tiles"])
    vision = session.run("vision_encoder", {"tiles": tiles}, clock)
    given = session.prefix_input(vision)
    for question, output in (("verdict", "verdict_logits"), ("mask", "seg_embedding")):
        embeds = np.concatenate([given["inputs_embeds"], session.prompts()[question][None]], axis=1)
        whole = {**given, "inputs_embeds": embeds, "position_ids": np.arange(embeds.shape[1])[None]}
        at_once = session.run("language", whole, clock, (output,))[output]
        cached = session.ask(question, session.read_prefix(vision, clock), clock)
        np.testing.assert_allclose(cached, at_once, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("got", "expected", "difference"),
    [([3.0, 4.0], [3.0, 4.0], 0.0), ([0.0, 0.0], [3.0, 4.0], 1.0), ([1.0], [0.0], 1.0), ([], [], 0.0)],
)
def test_relative_difference(got: list[float], expected: list[float], difference: float) -> None:
    assert relative_difference(np.array(got), np.array(expected)) == difference


def test_the_gate_decides_which_stages_run(float_build: Path) -> None:
    session = open_session(open_build(float_build))
    image = Image.fromarray(sample_image())
    probability = session.judge(image).fake_probability
    closed = session.judge(image, gate=min(1.0, probability + 1e-6))
    assert closed.mask is None
    assert closed.mask_area is None
    assert "mask_encoder" not in closed.latency_ms
    opened = session.judge(image, gate=probability)
    assert opened.mask is not None
    assert opened.mask_area == opened.mask.mean()
    assert closed.latency_ms["total"] >= sum(v for k, v in closed.latency_ms.items() if k != "total") * 0.99


def test_a_stage_that_gives_no_numbers_gives_no_verdict(float_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt.errors import BuildError

    session = open_session(open_build(float_build))
    for stage, output in (("language", "verdict_logits"), ("mask_decoder", "mask_logits")):
        opened = session.open_stage(stage)

        def broken(tensors: object, outputs: tuple[str, ...], opened: object = opened, name: str = output) -> object:
            results = opened(tensors, outputs)  # type: ignore[operator]
            return {key: value * np.nan if key == name else value for key, value in results.items()}

        monkeypatch.setitem(session._open, stage, broken)
        with pytest.raises(BuildError, match=f"{stage}: {output} is not a finite number"):
            session.judge(Image.fromarray(sample_image()), gate=0.0)
        monkeypatch.setitem(session._open, stage, opened)


def test_pruned_tokens_leave_the_questions_where_they_stood(float_build: Path) -> None:
    from defaker_opt.runtime.clock import Clock

    session = open_session(open_build(float_build))
    width = session.prompts()["before"].shape[1]
    vision = {"vision_tokens": np.zeros((1, 4, width), np.float32), "kept_positions": np.array([[0, 3, 9, 20]])}
    before, shared = len(session.prompts()["before"]), len(session.prompts()["shared"])
    positions = session.prefix_input(vision)["position_ids"][0].tolist()
    assert positions[before : before + 4] == [before, before + 3, before + 9, before + 20]
    assert session.read_prefix(vision, Clock()).next_position == before + 64 + shared


def test_manifest_is_plain_json(int8_build: Path) -> None:
    data = json.loads((int8_build / "manifest.json").read_text())
    assert data["source"]["trained"] is True
    assert data["thresholds"] == {"fake_probability": 0.5, "gate": 0.5, "mask_logit": 0.0}
    assert {path.name for path in int8_build.iterdir()} == {*data["files"], "manifest.json"}
