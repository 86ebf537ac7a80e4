"""What does not pay is taken back: the decision is in the recipe, the times are not in the build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from defaker_opt.detector import linear_weights, load_detector
from defaker_opt.never_slower import WORTH, Timing, keep_float, time_stages
from defaker_opt.pipeline import make_build, plan_job
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime import open_build
from defaker_opt.runtime.build import MANIFEST
from defaker_opt.target import load_target


def timing(stage: str, share: float) -> Timing:
    return Timing(stage, "int8", (10.0, 1000.0, 12.0), (10.0 * share, 5000.0, 12.0 * share))


def test_a_disturbed_round_does_not_decide() -> None:
    assert timing("language", 0.5).share == pytest.approx(0.5)
    assert timing("language", 0.5).pays
    assert timing("language", WORTH - 0.01).pays
    assert not timing("language", WORTH + 0.01).pays


def test_slow_stages_become_float_and_say_why() -> None:
    recipe, detector = load_recipe("int8"), load_detector("reference")
    kept = keep_float(recipe, detector, [timing("vision_encoder", 0.4), timing("language", 1.2)])
    assert list(kept.reverted) == ["language"]
    assert "not faster than float32" in kept.reverted["language"]
    (quantize,) = kept.passes
    # A rule that no layer is left for would be an error of the recipe.
    schemes = quantize.check(detector.config, load_target("cpu")).schemes
    assert {schemes[name] for name in linear_weights(detector.config, "language")} == {"float"}
    assert {schemes[name] for name in linear_weights(detector.config, "vision_encoder")} == {"int8", "float"}
    assert kept.as_json()["reverted"] == dict(kept.reverted)


def test_all_stages_may_become_float() -> None:
    recipe, detector = load_recipe("int8"), load_detector("reference")
    slow = [timing(stage, 2.0) for stage in ("vision_encoder", "language", "mask_encoder")]
    (quantize,) = keep_float(recipe, detector, slow).passes
    assert set(quantize.check(detector.config, load_target("cpu")).schemes.values()) == {"float"}


def test_what_pays_leaves_the_recipe_as_it_is() -> None:
    recipe = load_recipe("int8")
    assert keep_float(recipe, load_detector("reference"), [timing("language", 0.5)]) == recipe


def test_a_reverted_build_is_an_ordinary_one_and_says_which_stage(int8_build: Path, tmp_path: Path) -> None:
    job = plan_job(load_recipe("int8"), load_target("cpu"), "reference")
    measured = time_stages(job, open_build(int8_build), lambda what, fraction: None, rounds=1)
    assert [each.stage for each in measured] == ["vision_encoder", "language", "mask_encoder"]
    assert all(len(each.float_ms) == len(each.quantized_ms) == 1 for each in measured)
    slow = [replace(measured[1], quantized_ms=(2 * measured[1].float_ms[0],))]
    recipe = keep_float(job.recipe, job.detector, slow)
    build = make_build(plan_job(recipe, job.target, "reference"), tmp_path / "build", lambda what, fraction: None)
    manifest = json.loads((build.folder / MANIFEST).read_text())
    assert manifest["recipe"]["reverted"] == dict(recipe.reverted)
    assert manifest["stages"]["language"]["scheme"] == "float"
    assert manifest["stages"]["vision_encoder"]["scheme"] == "int8+float"
    assert "_ms" not in json.dumps(manifest["stages"])
