"""Targets: every shipped one is read strictly, says where its figures come from, and is honest about its backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from defaker_opt.catalog import module_names, yaml_names
from defaker_opt.detector import load_detector
from defaker_opt.errors import ConfigError, PassError
from defaker_opt.recipe import load_recipe
from defaker_opt.target import Target, load_target
from tests.conftest import defaker_opt

NAMES = list(yaml_names("profiling/targets"))
ASKED_FOR = {
    *("cpu", "orin-nano-super-8gb", "orin-nx-16gb", "agx-orin-64gb", "agx-thor", "l4", "a10", "a100", "h100", "h200"),
    *("x86-avx2", "x86-vnni", "x86-amx", "x86-openvino", "arm-cpu", "browser-wasm"),
}


def test_every_device_that_was_asked_for_is_there() -> None:
    assert set(NAMES) >= ASKED_FOR


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_target_is_sound(name: str) -> None:
    target = load_target(name)
    assert target.available == (target.backend in module_names("runtime.backends"))
    assert target.available == bool(target.encodings)
    if target.device is None:
        assert name == "cpu"
        return
    device = target.device
    if target.backend in ("tensor_rt", "torch_cuda"):
        # FP8 products came with SM 8.9, and codes go where FP8 does.
        assert ("fp8-static" in target.encodings) == (int(device.versions["sm"]) >= 89)
        # Engines have FP4 from SM 10.0 on; torch decodes it by itself.
        assert ("nvfp4" in target.encodings) == (
            int(device.versions["sm"]) >= (100 if target.backend == "tensor_rt" else 89)
        )
        assert target.encodings["int8-static"] == "qdq_int8" and target.encodings["int4-sym"] == "dq_int4"
        # FP4 came with an opset of its own.
        assert target.graph is not None and target.graph.opset == (23 if "nvfp4" in target.encodings else 21)
    facts = [device.memory, device.bandwidth, *device.peaks.values()]
    assert all(len(fact.source) > 4 for fact in facts)
    assert set(target.kinds) >= {"float"} and {"int8", "int8-static"} & set(target.kinds)
    if device.kind == "jetson":
        assert {"jetpack", "tensorrt", "sm"} <= set(device.versions)
        assert device.shared_memory
        assert device.engine_build_memory >= 3
        assert len(device.power_modes) >= 3
    if device.kind == "gpu":
        assert "sm" in device.versions
        assert device.power_modes[0].watts


@pytest.mark.parametrize("name", [name for name in NAMES if "orin" in name or name in ("a10", "a100")])
def test_devices_before_sm89_have_no_fp8(name: str) -> None:
    device = load_target(name).device
    assert device is not None
    assert int(device.versions["sm"]) < 89
    assert not {"fp8", "fp4"} & {*device.formats, *device.peaks}


def test_peaks_are_dense_and_eight_bit_is_twice_sixteen() -> None:
    for name in NAMES:
        device = load_target(name).device
        if device and device.kind in ("jetson", "gpu"):
            assert device.peaks["int8"].value == pytest.approx(2 * device.peaks["fp16"].value, rel=0.01), name


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_no_build_is_made_for_a_backend_that_is_only_planned(options: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = defaker_opt("quantize", "--recipe", "int8", "--target", "browser-wasm", "--output", out, *options)
    assert done.returncode == 2
    assert "target browser-wasm: backend onnx_runtime_web is not available in this version, which has" in done.stderr
    assert "defaker-opt plan --target browser-wasm" in done.stderr
    assert not out.exists()


def test_a_planned_target_still_knows_which_codes_its_device_runs() -> None:
    target = load_target("browser-wasm")
    recipe = load_recipe("int8")
    config = load_detector("reference").config
    for each in recipe.passes:
        each.check(config, target)
    no_eights = Target("mine", "", "onnx_runtime_web", {}, device=_without(target, "int8"))
    with pytest.raises(PassError, match=r"int8 .* cannot run on target mine, which runs float"):
        recipe.passes[0].check(config, no_eights)


def _without(target: Target, name: str) -> Any:
    import dataclasses

    assert target.device is not None
    return dataclasses.replace(target.device, peaks={k: v for k, v in target.device.peaks.items() if k != name})


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "peak without its format": (
        "peaks.fp8",
        {"value": 1, "source": "none", "evidence": "computed"},
        "not among formats",
    ),
    "evidence": ("memory.evidence", "hearsay", "device.memory.evidence: 'hearsay' is not one of"),
    "value": ("bandwidth.value", 0, "device.bandwidth.value: must be above 0, got 0"),
    "no source": ("bandwidth", {"value": 1, "evidence": "computed"}, "device.bandwidth.source: missing"),
    "format": ("formats", ["fp16", "int9"], "'int9' is not one of .*did you mean 'int"),
    "share": ("budget", {"memory_share": 1.5}, "memory_share must be above 0 and at most 1, got 1.5"),
    "efficiency": ("efficiency.compute.value", 2, "compute is a share, at most 1, got 2"),
    "no float": ("formats", ["int8"], "formats must have fp32 or fp16"),
    "no jetpack": ("versions", {"sm": "87"}, "versions.jetpack: missing"),
    "unknown": ("colour", "green", "device.colour: unknown key"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_device_is_told_with_its_place(mistake: str, tmp_path: Path) -> None:
    where, value, words = MISTAKES[mistake]
    data = yaml.safe_load(yaml_names("profiling/targets")["orin-nano-super-8gb"].read_text())
    inner = data["device"]
    *path, last = where.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=words):
        load_target(str(file))


@pytest.mark.parametrize(
    ("backend", "encodings", "words"),
    [
        ("onnx_runtime_web", "{float: matmul}", "encodings: must be empty"),
        ("onnx_runtime_web", "{}", "device: missing"),
        ("tensor_rtx", "{}", "backend: 'tensor_rtx' .*did you mean 'tensor_rt'"),
    ],
)
def test_a_planned_backend_has_a_device_and_no_encodings(
    backend: str, encodings: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"description: mine\nbackend: {backend}\nencodings: {encodings}\n")
    with pytest.raises(ConfigError, match=words):
        load_target(str(file))


def test_facts_of_a_device_decide_no_byte_of_a_build() -> None:
    assert "device" not in load_target("x86-vnni").as_json()


def test_show_targets_says_what_is_planned_and_what_is_unverified() -> None:
    done = defaker_opt("show", "targets")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line and not line.startswith(" ")}
    assert set(lines) == set(NAMES)
    assert "backend onnx_runtime_web, not in this version" in done.stdout
    assert "unverified: bandwidth, peaks.fp16, peaks.int8" in done.stdout
    rows = [json.loads(line) for line in defaker_opt("show", "targets", "--json").stdout.splitlines()]
    orin = next(row for row in rows if row["name"] == "orin-nano-super-8gb")
    assert orin["available"] is True
    assert orin["device"]["peaks"]["int8"]["value"] == 33.4


def test_a_provider_that_is_not_there_is_said_and_never_replaced(float_build: Path) -> None:
    from defaker_opt.errors import BuildError
    from defaker_opt.runtime import open_build
    from defaker_opt.runtime.backends.onnx_runtime import open_stage

    spec, file = open_build(float_build).manifest.spec("mask_decoder"), float_build / "mask_decoder.onnx"
    open_stage(file, spec, {"providers": ["CPUExecutionProvider"]})
    with pytest.raises(
        BuildError, match=r"CUDAExecutionProvider is not in this onnxruntime, which has .*onnxruntime-gpu"
    ):
        open_stage(file, spec, {"providers": ["CUDAExecutionProvider"]})


@pytest.mark.parametrize(("base", "backend"), [("cpu", "onnx_runtime"), ("h200", "tensor_rt")])
def test_a_type_that_the_backend_would_ignore_is_refused(base: str, backend: str, tmp_path: Path) -> None:
    data = yaml.safe_load(yaml_names("profiling/targets")[base].read_text())
    file = tmp_path / "mine.yaml"
    for compute in ("float32", "bfloat16"):
        data["session"] = {**data.get("session", {}), "compute": compute}
        file.write_text(yaml.safe_dump(data))
        if compute == "float32":
            assert load_target(str(file)).backend == backend
    words = rf"bfloat16 is chosen with the backends torch_cuda and openvino alone, and backend is {backend}; leave it"
    with pytest.raises(ConfigError, match=words):
        load_target(str(file))


def test_a_target_may_name_providers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (
        yaml_names("profiling/targets")["cpu"]
        .read_text()
        .replace("session:", "session:\n  providers: [CUDAExecutionProvider]")
    )
    file.write_text(text)
    target = load_target(str(file))
    assert target.session.providers == ("CUDAExecutionProvider",)
    assert list(target.as_json()["session"]["providers"]) == ["CUDAExecutionProvider"]
