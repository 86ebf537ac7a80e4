"""The verb end to end on a few pictures: decisions as exit codes, looks, re-fit, and new builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from defaker_opt.errors import BuildError, ConfigError, DefakerError
from defaker_opt.limits import LatencyLimit, Limit, choose_latency, choose_limits
from defaker_opt.recipe import load_recipe, parse_recipe
from defaker_opt.report.refit import write_refit
from defaker_opt.report.values import Refit
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.answers import fake_probability
from defaker_opt.runtime.images import load_image
from defaker_opt.runtime.self_test import run_self_test
from tests.conftest import ROOT, defaker_opt
from tests.drift_pictures import write_pictures

PAIRS = 12
# Twelve pairs without a flip show that a drop is below 1 − 0.05^(1/12) = 0.22.
LOOSE = ["--max-drop", "verdict_accuracy=0.3", "--max-drop", "mask_iou=0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decisions")
    write_pictures(folder / "suite", PAIRS)
    write_pictures(folder / "calibration", 4, first_seed=60)
    return folder


def validate(folder: Path, build: Path, reference: Path, *words: object) -> tuple[int, dict[str, Any], str]:
    done = defaker_opt(
        "validate", build, "--reference", reference, "--suite", folder / "suite" / "suite.csv", "--calibration",
        folder / "calibration" / "calibration.csv", "--cache", folder / "cache", "--report", folder / "report",
        "--noise-images", 4, "--workers", 1, "--json", *words,
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_an_identical_build_is_accepted(folder: Path, float_build: Path) -> None:
    code, report, text = validate(folder, float_build, float_build, *LOOSE)
    assert code == 0
    assert report["decision"] == "ACCEPT"
    assert report["pooled"]["flips"]["flips"] == 0
    assert text.startswith("ACCEPT: float32 against float32\n")
    assert f"report: {folder / 'report' / 'report.html'}" in text
    assert report["noise"]["images"] == 4
    assert (folder / "report" / "report.html").stat().st_size > 50_000


def test_a_broken_limit_is_one(folder: Path, float_build: Path, untaught_build: Path) -> None:
    code, report, text = validate(folder, untaught_build, float_build, "--max-drop", "mask_agreement=0.0001")
    assert code == 1
    assert report["decision"] == "REJECT"
    assert "REJECT" in text.splitlines()[0]


def test_the_limits_of_the_build_are_its_recipes_and_need_more_images(folder: Path, float_build: Path) -> None:
    code, report, text = validate(folder, float_build, float_build)
    assert code == 3
    checks = {each["metric"]: each["check"] for each in report["pooled"]["figures"] if each["check"]}
    assert {name: check["max_drop"] for name, check in checks.items()} == {"verdict_accuracy": 0.005, "mask_iou": 0.005}
    for check in checks.values():
        assert f"about {check['more']:,} more images would give ACCEPT" in text


def test_rows_are_kept_unless_they_shall_be_fresh(folder: Path, float_build: Path) -> None:
    tables = []
    for way in ("--resume", "--resume", "--fresh"):
        assert validate(folder, float_build, float_build, *LOOSE, way)[0] == 0
        tables.append((folder / "report" / "rows.csv").read_text())
    # Times are kept with their rows, and no picture takes as long twice.
    assert tables[0] == tables[1] != tables[2]


def test_a_build_that_is_too_slow_is_rejected(folder: Path, float_build: Path) -> None:
    code, report, text = validate(folder, float_build, float_build, *LOOSE, "--max-latency", "0.01")
    assert (code, report["decision"]) == (1, "REJECT")
    assert all(each["check"]["decision"] == "ACCEPT" for each in report["pooled"]["figures"] if each["check"])
    latency = report["latency"]
    assert latency["max_ms"] == 0.01 < latency["median_ms"] and latency["images"] == 20
    assert "limit 0.01 ms: REJECT" in text and report["summary"].startswith("Too slow: ")
    assert "judged alone with" in (folder / "report" / "report.html").read_text()
    code, report, _ = validate(folder, float_build, float_build, *LOOSE, "--max-latency", "1e9")
    assert (code, report["decision"]) == (0, "ACCEPT")


def test_looks_stop_early(folder: Path, float_build: Path) -> None:
    code, report, text = validate(
        folder, float_build, float_build, "--sequential", "--max-drop", "verdict_accuracy=0.6"
    )
    assert code == 0
    looks = report["sequential"]["looks"]
    assert looks[-1]["finished"]
    assert looks[-1]["decision"] == "ACCEPT"
    assert report["sequential"]["judged"] == looks[-1]["images"] == report["pooled"]["images"] < 2 * PAIRS
    assert report["sequential"]["planned"] == 2 * PAIRS
    assert f"stopped after {looks[-1]['images']} of {2 * PAIRS} images" in text
    assert any(line.startswith("Sequential: ") for line in report["methods"])


def test_a_refit_makes_a_new_build(folder: Path, float_build: Path, int8_build: Path) -> None:
    before = (int8_build / "manifest.json").read_bytes()
    output = folder / "refitted"
    calibration = folder / "calibration" / "calibration.csv"
    _, report, _ = validate(folder, int8_build, float_build, *LOOSE, "--refit", calibration, "--write-refit", output)
    fit = report["refit"]
    assert (fit["suite"], fit["images"], fit["written"]) == ("calibration", 8, str(output))
    new = open_build(output).manifest.data
    assert new["thresholds"]["fake_probability"] == fit["threshold"]
    assert new["thresholds"]["temperature"] == fit["temperature"]
    assert new["refit"]["of"] == open_build(int8_build).digest
    assert (int8_build / "manifest.json").read_bytes() == before
    assert {path.name for path in output.iterdir()} == {path.name for path in int8_build.iterdir()}
    with pytest.raises(BuildError, match="already there, and a build is never changed"):
        write_refit(open_build(int8_build), Refit(**fit), output)


def test_calibration_pictures_of_the_test_set_are_refused(folder: Path, float_build: Path) -> None:
    suite = folder / "suite" / "suite.csv"
    done = defaker_opt(
        "validate", float_build, "--reference", float_build, "--suite", suite, "--calibration",
        folder / "calibration" / "calibration.csv", "--refit", suite, "--cache", folder / "cache", "--workers", 1,
        "--report", folder / "refused",
    )  # fmt: skip
    assert done.returncode == 2
    assert "are in the test set suite too" in done.stderr
    assert not (folder / "refused").exists()


def test_a_temperature_changes_probabilities_and_nothing_else(float_build: Path, folder: Path, tmp_path: Path) -> None:
    build = open_build(float_build)
    fit = Refit("c", 8, 0.4, 0.5, 0, 0, 0, 2.0, "", "")
    new = write_refit(build, fit, tmp_path / "new")
    image = load_image(folder / "suite" / "000-fake.png")
    first, second = (open_session(each, 1).judge(image, gate=0.0) for each in (build, new))
    assert second.verdict_logits.tolist() == first.verdict_logits.tolist()
    assert second.mask is not None
    assert (second.mask == first.mask).all()
    odds = first.fake_probability / (1 - first.fake_probability)
    assert second.fake_probability == pytest.approx(odds**0.5 / (1 + odds**0.5))
    assert second.is_fake == (second.fake_probability > 0.4)
    assert new.manifest.data["thresholds"]["gate"] == 0.4
    assert run_self_test(open_session(new, 1)).passed
    assert new.manifest.data["plan_sha256"] != build.manifest.data["plan_sha256"]


def test_temperature_one_is_the_exact_softmax() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(50):
        logits = random.normal(0, 20, 8).astype(np.float32)
        exact = np.exp(logits.astype(np.float64) - logits.max())
        assert fake_probability(logits) == fake_probability(logits, 1.0) == exact[:4].sum() / exact.sum()
        assert fake_probability(logits, 1 + 1e-12) == pytest.approx(fake_probability(logits), abs=1e-9)


def test_every_recipe_has_limits_that_reach_the_manifest(float_build: Path) -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        assert {"verdict_accuracy", "mask_iou"} <= set(load_recipe(path.stem).accept), path
    assert choose_limits(open_build(float_build).manifest.data, []) == load_recipe("float32").accept


def test_without_any_limit_nothing_is_judged() -> None:
    with pytest.raises(DefakerError, match="no limit to judge by: the build's recipe has no `accept`"):
        choose_limits({"recipe": {}}, [])
    with pytest.raises(DefakerError, match=r"manifest\.json.*\s.*recipe\.accept: 'speed' is not one of"):
        choose_limits({"recipe": {"accept": {"speed": {"max_drop": 0.1}}}}, [])
    shipped = {"recipe": {"accept": {"mask_iou": {"max_drop": 0.1, "confidence": 0.9}}}}
    assert choose_limits(shipped, []) == {"mask_iou": Limit(0.1, 0.9)}
    assert choose_limits(shipped, ["verdict_auc=0.02"]) == {"verdict_auc": Limit(0.02)}


def test_a_latency_limit_is_the_recipes_unless_asked_for() -> None:
    accept = {"mask_iou": {"max_drop": 0.1}, "latency_ms": {"max": 400}}
    recipe = parse_recipe("x", {"description": "x", "source": "reference", "target": "cpu", "accept": accept}, "x.yaml")
    shipped = {"recipe": recipe.as_json()}
    assert choose_latency(shipped, 0.0) == LatencyLimit(400)
    assert choose_latency(shipped, 90.0) == LatencyLimit(90)
    assert choose_latency({"recipe": {}}, 0.0) is None
    assert choose_limits(shipped, []) == {"mask_iou": Limit(0.1)}


@pytest.mark.parametrize(
    ("accept", "message"),
    [
        ({"verdict_acuracy": {"max_drop": 0.1}}, "accept: 'verdict_acuracy' is not one of .*did you mean"),
        ({"mask_iou": {"max_drop": 0}}, r"accept.mask_iou.max_drop: must be above 0 and below 1, got 0"),
        ({"mask_iou": {"max_drop": 0.1, "confidence": 0.4}}, r"accept.mask_iou.confidence: must be above 0.5"),
        ({"mask_iou": {"drop": 0.1}}, r"accept.mask_iou.drop: unknown key"),
        ({"mask_iou": 0.1}, r"accept.mask_iou: must be a mapping"),
        ({"latency_ms": {"max": 0}}, r"accept.latency_ms.max: must be above 0 milliseconds, got 0"),
        ({"latency_ms": {"max_drop": 0.1}}, r"accept.latency_ms.max_drop: unknown key"),
        ([0.1], r"accept: must be a mapping"),
    ],
)
def test_wrong_limits_of_a_recipe_are_named(accept: object, message: str) -> None:
    data = {"description": "x", "source": "reference", "target": "cpu", "accept": accept}
    with pytest.raises(ConfigError, match=message):
        parse_recipe("x", data, "x.yaml")
