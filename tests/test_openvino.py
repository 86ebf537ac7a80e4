"""The backend OpenVINO: the small detector's whole line, its numbers beside ONNX Runtime's, threads and mistakes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from defaker_opt.errors import BuildError
from defaker_opt.graph.product import write_product
from defaker_opt.machine import read_machine
from defaker_opt.methods import Scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.planning.fit import plan_recipe
from defaker_opt.profiles.operators import measure_operators
from defaker_opt.runtime import Session, open_build, open_session
from defaker_opt.runtime.backends import find_backend
from defaker_opt.runtime.backends.openvino import open_stage
from defaker_opt.runtime.recording import record_calls
from defaker_opt.sample import sample_image
from tests.conftest import ROOT, defaker_opt, shared_build

RECIPES = ("float32", "int8", "int8-static")


@pytest.fixture(scope="module")
def made(builds: Path) -> dict[str, Path]:
    return {recipe: shared_build(builds, recipe, "x86-openvino") for recipe in RECIPES}


def session_of(build: Path, **options: object) -> Session:
    from defaker_opt.runtime.backends import Choice

    return dataclasses.replace(open_session(open_build(build)), choice=Choice("openvino", options))


@pytest.mark.parametrize(("recipe", "nearness"), [("float32", 0.05), ("int8", 0.15), ("int8-static", 0.3)])
def test_verdict_and_mask_are_near_those_of_float(
    recipe: str, nearness: float, made: dict[str, Path], float_build: Path
) -> None:
    image = Image.fromarray(sample_image())
    ours, whole = (open_session(open_build(build)).judge(image, gate=0.0) for build in (made[recipe], float_build))
    assert np.abs(ours.verdict_logits - whole.verdict_logits).max() < nearness
    assert ours.mask is not None and whole.mask is not None
    assert (ours.mask != whole.mask).mean() < 0.02


def test_float32_computes_what_onnx_runtime_does(float_build: Path) -> None:
    image = Image.fromarray(sample_image())
    exact = open_session(open_build(float_build)).judge(image, gate=0.0)
    ours = session_of(float_build, compute="float32").judge(image, gate=0.0)
    np.testing.assert_allclose(ours.verdict_logits, exact.verdict_logits, rtol=1e-3, atol=1e-3)
    assert exact.mask is not None and ours.mask is not None
    assert (ours.mask != exact.mask).sum() <= 3


@pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & set(read_machine().instructions), reason="this processor has no bfloat16"
)
def test_the_manifest_says_how_stages_were_computed(made: dict[str, Path]) -> None:
    stages = open_build(made["float32"]).manifest.data["stages"]
    # Float stages compute in bfloat16 here, which is no mistake, and are measured all the same.
    assert all(entry["parity_tolerance"] == 0.05 and 1e-4 < entry["parity"] < 0.05 for entry in stages.values())


def test_codes_are_those_of_the_other_backends_builds(made: dict[str, Path], int8_build: Path) -> None:
    for stage in ("vision_encoder", "language", "mask_encoder"):
        ours, other = (codes_in(build / f"{stage}.onnx") for build in (made["int8"], int8_build))
        assert ours.keys() == other.keys() and ours
        assert all(np.array_equal(ours[name], other[name]) for name in ours)


def codes_in(path: Path) -> dict[str, np.ndarray]:
    tensors = onnx.load(path).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in tensors if t.name.endswith((".codes", ".scale"))}


@pytest.mark.parametrize("columns", [64, 96, 192, 1024, 3072])
def test_activations_that_meet_codes_alone_are_rounded_by_token(columns: int, tmp_path: Path) -> None:
    """A token's error must not depend on what other tokens there are, and is that of 8 bits: not 0, and not large."""
    generator = np.random.default_rng(columns)
    weight = generator.standard_normal((48, columns)).astype(np.float32)
    codes = RoundToNearest().quantize(weight, Scheme(8, activations="token"))
    spec = write_product(tmp_path / "product.onnx", weight, codes, {"int8-token": "dq_int8"})
    run = open_stage(tmp_path / "product.onnx", spec, {"threads": 1})
    x = generator.standard_normal((33, columns)).astype(np.float32)
    x[5] *= 1000
    x[7] = 0
    exact = x.astype(np.float64) @ codes.dequantize().T.astype(np.float64)
    error = np.linalg.norm(run({"x": x}, ("y",))["y"] - exact, axis=1) / np.maximum(np.linalg.norm(exact, axis=1), 1e-9)
    assert error.max() < 0.02
    assert np.median(error) > 5e-4, "activations were not rounded, so products are not of 8 bits"
    assert error[7] == 0


def test_weights_alone_as_written_are_exact_in_onnx_runtime(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    codes = RoundToNearest().quantize(weight, Scheme(8))
    spec = write_product(tmp_path / "product.onnx", weight, codes, {"int8": "dq_int8"})
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    y = find_backend("onnx_runtime").open_stage(tmp_path / "product.onnx", spec, {"as_written": True})(
        {"x": x}, ("y",)
    )["y"]
    np.testing.assert_allclose(y, x @ codes.dequantize().T, rtol=1e-5, atol=1e-5)


def test_pictures_at_once_are_judged_as_one_by_one(made: dict[str, Path]) -> None:
    session = open_session(open_build(made["int8"]))
    images = [Image.fromarray(np.roll(sample_image(), 40 * turn, axis=turn % 2)) for turn in range(6)]
    alone = [session.judge(image, gate=0.0) for image in images]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda image: session.judge(image, gate=0.0), images))
    for one, other in zip(alone, together):
        assert np.array_equal(one.verdict_logits, other.verdict_logits)
        assert one.mask is not None and other.mask is not None and np.array_equal(one.mask, other.mask)


def test_a_result_outlives_the_next_call(made: dict[str, Path]) -> None:
    session = open_session(open_build(made["int8-static"]))
    spec = session.spec("mask_encoder")
    run = session.open_stage("mask_encoder")
    size = spec.inputs[0].shape[-1]
    first = run({"image": np.zeros((1, 3, size, size), np.float32)}, ("image_embed",))["image_embed"]
    kept = first.copy()
    run({"image": np.ones((1, 3, size, size), np.float32)}, ("image_embed",))
    assert np.array_equal(first, kept)


def test_operators_are_named_after_modules(made: dict[str, Path]) -> None:
    build = open_build(made["int8-static"])
    calls = list(record_calls(build, Image.fromarray(sample_image()), gate=0.0))
    stages = {stage.stage: stage for stage in measure_operators(open_session(build), calls, repeat=3)}
    assert set(stages) == {"vision_encoder", "language", "mask_encoder", "mask_decoder"}
    modules = {operator.module for operator in stages["vision_encoder"].operators}
    assert any(module.endswith("mlp.fc1") for module in modules)
    # How large a share depends on what else runs; that all of them were traced, and none twice, does not.
    assert all(0 < stage.covered <= 1.0 for stage in stages.values())
    assert all(each.module.startswith(name) for name, stage in stages.items() for each in stage.operators)


def test_the_command_line_runs_a_build(made: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(sample_image()).save(tmp_path / "one.png")
    Image.fromarray(sample_image()[::-1]).save(tmp_path / "two.png")
    done = defaker_opt("run", made["int8"], tmp_path / "one.png", tmp_path / "two.png", "--json", "--concurrency", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"verdict"') == 2
    tested = defaker_opt("run", made["int8"], "--self-test")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_what_is_planned_is_near_what_was_measured() -> None:
    measured: dict[str, float] = {}
    for run in json.loads((ROOT / "profiling/results/peers_full_size.json").read_text())["runs"]:
        for stage, forms in run["stages"].items():  # the last run of a stage is the one that nothing disturbed
            measured[stage] = forms["ours, int8-static, OpenVINO"]["latency_ms"]
    planned = plan_recipe("int8-static", "defakerone-2b:random", "x86-openvino", 13).forecast.latency.stages
    assert 0.5 < planned["vision_encoder"] / (13 * measured["vision_encoder"]) < 2
    assert 0.5 < planned["mask_encoder"] / measured["mask_encoder"] < 2


def test_a_graph_that_it_cannot_read_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "language.onnx"
    broken.write_bytes(b"no graph")
    spec = open_session(open_build(made["int8"])).spec("language")
    with pytest.raises(BuildError, match=r"language\.onnx: openvino 2026\S* cannot open it"):
        open_stage(broken, spec, {})


def test_an_unknown_compute_type_is_refused(float_build: Path) -> None:
    spec = open_session(open_build(float_build)).spec("mask_decoder")
    with pytest.raises(BuildError, match=r"session\.compute: 'float61' is not one of"):
        open_stage(float_build / "mask_decoder.onnx", spec, {"compute": "float61"})


def test_opening_it_reports_to_nobody() -> None:
    """Importing openvino sends an event to an analytics service, unless its package for that cannot be imported."""
    code = (
        "import sys, defaker_opt.runtime.backends.openvino; "
        "print(sorted(name for name in sys.modules if 'telemetry' in name))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "openvino.tools.ovc.telemetry_stub" in said and "'openvino_telemetry" not in said
    import openvino_telemetry

    assert openvino_telemetry, "the rest of the process may have it"


def test_without_the_package_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "defaker_opt.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BuildError, match=r"backend openvino needs the package 'openvino'; install it"):
        find_backend("openvino")


@pytest.mark.parametrize("recipe", ["int4", "datacenter-fp8"])
def test_codes_that_it_does_not_run_are_refused_before_work(recipe: str, tmp_path: Path) -> None:
    done = defaker_opt("quantize", "--recipe", recipe, "--target", "x86-openvino", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "cannot run on target x86-openvino, which runs float, int8, int8-token, int8-static" in done.stderr
    assert not (tmp_path / "out").exists()
