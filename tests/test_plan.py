"""Forecasts against builds that were made, and what is said where something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defaker_opt.detector import linear_weights, load_detector
from defaker_opt.errors import DefakerError, PassError
from defaker_opt.files import default_cache_folder
from defaker_opt.planning.fit import plan_recipe
from defaker_opt.planning.formulas import language_counts, mask_encoder_counts, vision_counts
from defaker_opt.runtime import open_build
from defaker_opt.samples import load_samples
from tests.conftest import ROOT, defaker_opt, summary_of


def test_sizes_are_those_of_the_build(any_build: Path) -> None:
    data = open_build(any_build).manifest.data
    planned = plan_recipe(data["recipe"]["name"], None, None).forecast
    actual = sum(path.stat().st_size for path in any_build.iterdir())
    assert planned.sizes.total == pytest.approx(actual, rel=0.02)
    for stage, entry in data["stages"].items():
        assert planned.sizes.stages[stage] == pytest.approx(entry["bytes"], rel=0.05), stage


def test_memory_for_making_it_was_foreseen(any_build: Path) -> None:
    recipe = open_build(any_build).manifest.data["recipe"]["name"]
    planned = plan_recipe(recipe, None, None).forecast
    here = [step for step in planned.steps if step.where == "this machine"]
    assert [step.name for step in here] == ["look at pictures", "quantize and export"][-len(here) :]
    peak = summary_of(any_build)["peak_memory_bytes"]
    assert max(step.memory_bytes for step in here) == pytest.approx(peak, rel=0.15)


def test_memory_for_running_it_was_foreseen(any_build: Path, tmp_path: Path) -> None:
    from PIL import Image

    from defaker_opt.profiles.fresh import measure_fresh
    from defaker_opt.sample import sample_image

    recipe = open_build(any_build).manifest.data["recipe"]["name"]
    Image.fromarray(sample_image()).save(tmp_path / "image.png")
    fresh = measure_fresh(any_build, tmp_path / "image.png", 0.0, threads=2, processes=1)
    assert plan_recipe(recipe, None, None).forecast.run_memory_bytes == pytest.approx(fresh.peak_memory_bytes, rel=0.15)


# From published sizes: methods' table of operations, in 10¹².
def test_full_sizes_count_as_published() -> None:
    config = load_detector("defakerone-2b:random").config
    vision = vision_counts(config, 1)
    layers = 24 * (2 * 1025 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 1025**2 * 1024)
    projector = 2 * 256 * (4096 * 2048 + 2048**2)
    assert layers / 1e12 == pytest.approx(0.724, rel=0.005)
    assert vision.total - vision.convolution - projector == pytest.approx(layers, rel=1e-9)
    assert mask_encoder_counts(config).total / 1e12 == pytest.approx(1.812, rel=0.1)
    tokens = 1000
    parameters = 24 * (2048 * (2048 + 2 * 1024) + 2048**2 + 3 * 2048 * 8192)
    full = 2 * parameters * tokens + 4 * tokens**2 * 2048 * 24
    assert language_counts(config, tokens).total == pytest.approx(full, rel=0.001)


def test_a_2b_detector_fits_a_nano_in_int4_only() -> None:
    source, target = "defakerone-2b:random", "orin-nano-super-8gb"
    fits = plan_recipe("jetson-int4", source, target)
    assert fits.forecast.fits
    assert fits.nearest == ""
    assert any("budget" in line for line in fits.forecast.warnings)
    whole = plan_recipe("float32", source, target)
    assert not whole.forecast.fits
    assert "of the 5.6 GB" in whole.forecast.why
    assert whole.nearest == "jetson-int4"
    with pytest.raises(
        PassError, match="cannot run on target orin-nano-super-8gb, which runs float, int8-static, int4"
    ):
        plan_recipe("int8", source, target)


# Measured by profiling/full_size.py: profiling/results/full_size_2b.json.
MEASURED = json.loads((ROOT / "profiling" / "results" / "full_size_2b.json").read_text())["builds"]


@pytest.mark.parametrize("recipe", MEASURED)
def test_a_2b_detector_costs_what_was_measured(recipe: str) -> None:
    planned = plan_recipe(recipe, "defakerone-2b:random", "cpu").forecast
    measured = MEASURED[recipe]
    make, run = planned.steps
    assert planned.sizes.total == pytest.approx(measured["bytes"], rel=0.02)
    assert make.memory_bytes == pytest.approx(measured["made_peak_memory_bytes"], rel=0.15)
    assert run.memory_bytes == pytest.approx(measured["run_peak_memory_bytes"], rel=0.15)


def test_ranges_alone_are_seen_while_calls_pass() -> None:
    from defaker_opt.machine import read_machine
    from defaker_opt.planning.fit import machine_device
    from defaker_opt.planning.looking import looking_cost

    detector, here = load_detector("reference"), machine_device(read_machine())
    names = linear_weights(detector.config, "language")
    once, twice, thrice = (
        looking_cost(detector, dict.fromkeys(names, wanted), "embedded", here).seconds
        for wanted in (("histogram",), ("histogram", "mean_abs"), ("histogram", "shift"))
    )
    # The vision encoder, which feeds it and is not looked at, is passed once.
    assert once < twice < thrice


def test_looking_at_pictures_is_a_step_of_its_own() -> None:
    small, large = (plan_recipe("int4", source, None).forecast for source in (None, "defakerone-2b:random"))
    assert [step.name for step in small.steps] == ["look at pictures", "quantize and export", "run"]
    assert large.steps[0].seconds > 100 * small.steps[0].seconds
    assert plan_recipe("int4-data-free", None, None).forecast.steps[0].name == "quantize and export"


def test_tiles_of_calibration_pictures_are_about_as_many_as_there_are() -> None:
    from defaker_opt.planning.formulas import tile_count
    from defaker_opt.planning.looking import picture_tiles

    images = load_samples("embedded", default_cache_folder(), lambda what, part: None).images()
    sizes = [image.size for image in images]
    for source in ("reference", "defakerone-2b:random"):
        config = load_detector(source).config
        real = sum(tile_count(config, *size) for size in sizes) / len(sizes)
        assert 0.6 * real < picture_tiles(config, 256) < 1.7 * real


def test_a_recipe_that_names_no_pictures_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((ROOT / "recipes" / "int8-static.yaml").read_text().replace("calibration: embedded\n", ""))
    with pytest.raises(PassError, match=r"ranges of activations for .* must look at pictures, and none are named"):
        plan_recipe(str(recipe), None, None)


def test_what_no_recipe_makes_fit_is_said() -> None:
    planned = plan_recipe("float32", "sa2va-8b:random", "orin-nano-super-8gb")
    assert planned.forecast.engines.keys() == planned.forecast.sizes.stages.keys()
    assert not planned.forecast.fits
    assert planned.nearest == ""


def test_the_command_says_it_and_ends_with_one() -> None:
    done = defaker_opt(
        "plan", "--recipe", "float32", "--source", "defakerone-2b:random", "--target", "orin-nano-super-8gb"
    )
    assert done.returncode == 1, done.stderr
    assert "does not fit: " in done.stdout
    assert "nearest recipe that does: jetson-int4" in done.stdout
    done = defaker_opt("plan", "--recipe", "int8", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [step["name"] for step in data["forecast"]["steps"]] == ["quantize and export", "run"]
    assert not any("random" in note for note in data["notes"])


def test_more_tiles_take_longer_and_too_many_are_refused() -> None:
    most = load_detector("reference").config.tiling.max_tiles + 1
    few, many = (plan_recipe("int8", None, None, tiles).forecast.latency.total_ms for tiles in (1, most))
    assert few < many
    with pytest.raises(DefakerError, match=f"at most {most}; give 1 to {most}"):
        plan_recipe("int8", None, None, most + 1)


def test_a_recipe_the_target_cannot_run_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "small.yaml"
    target.write_text("description: mine\nbackend: onnx_runtime\nencodings: {float: matmul}\n")
    with pytest.raises(PassError, match=r"(?s)recipe int8: .*cannot run on target small"):
        plan_recipe("int8", None, str(target))
