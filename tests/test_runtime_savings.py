"""What the runtime leaves out or gives back by itself: masks below the gate, unread outputs, stages of other phases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native
from PIL import Image

from defaker_opt.runtime import Build, Manifest, open_build, open_session
from defaker_opt.runtime import session as session_module
from defaker_opt.runtime.backends import onnx_runtime
from defaker_opt.runtime.backends.onnx_runtime import open_stage
from defaker_opt.runtime.prompts import extend_
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.sample import sample_image
from tests.conftest import shared_build

MASK_STAGES = {"mask_encoder", "mask_decoder"}


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(5).integers(0, 256, (150, 90, 3), dtype=np.uint8)
    return [Image.fromarray(sample_image(7)), Image.fromarray(noise), Image.fromarray(sample_image()[:224, :300])]


def edited(build: Build, **parts: Mapping[str, Any]) -> Build:
    """The same files with another manifest: keys of `parts` are updated."""
    data = copy.deepcopy(dict(build.manifest.data))
    for name, values in parts.items():
        data[name].update(values)
    return Build(build.folder, Manifest(data), build.digest)


def test_a_gate_holds_back_masks_and_changes_nothing_else(float_build: Path) -> None:
    """The gate stands between the pictures' own probabilities, so that some are above and some below it."""
    build, every = open_build(float_build), open_session(open_build(float_build))
    ungated = [every.judge(image, gate=0.0) for image in pictures()]
    gate = float(np.median([verdict.fake_probability for verdict in ungated]))
    gated = open_session(edited(build, thresholds={"gate": gate, "fake_probability": gate}))
    held_back = 0
    for image, expected in zip(pictures(), ungated):
        verdict = gated.judge(image)
        np.testing.assert_array_equal(verdict.verdict_logits, expected.verdict_logits)
        if expected.fake_probability < gate:
            held_back += 1
            assert verdict.mask is None
            assert verdict.mask_area is None
            assert not verdict.is_fake
            assert not MASK_STAGES & set(verdict.latency_ms)
        else:
            np.testing.assert_array_equal(verdict.mask, expected.mask)
            np.testing.assert_array_equal(verdict.mask_logits, expected.mask_logits)
    assert 0 < held_back < len(ungated)


def graph_that_breaks(path: Path) -> StageSpec:
    """`good` is x + 1; `bad` fails whenever it is computed, as 3 numbers have no shape [7]."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    seven = helper.make_tensor("seven", TensorProto.INT64, [1], [7])
    nodes = [helper.make_node("Add", ["x", "one"], ["good"]), helper.make_node("Reshape", ["x", "seven"], ["bad"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("good", "bad")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [one, seven])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    tensors = {name: TensorSpec(name, "float32", ("n",)) for name in ("x", "good", "bad")}
    return StageSpec("s", (tensors["x"],), (tensors["good"], tensors["bad"]))


def test_outputs_that_nobody_reads_are_not_computed(tmp_path: Path) -> None:
    spec = graph_that_breaks(tmp_path / "s.onnx")
    given = {"x": np.zeros(3, np.float32)}
    skipping = open_stage(tmp_path / "s.onnx", spec, {"skip_unread": True})
    np.testing.assert_array_equal(skipping(given, ("good",))["good"], np.ones(3, np.float32))
    with pytest.raises(native.Fail, match="Reshape"):
        skipping(given, ("good", "bad"))
    with pytest.raises(native.Fail, match="Reshape"):
        open_stage(tmp_path / "s.onnx", spec, {"skip_unread": False})(given, ("good",))


@pytest.mark.parametrize("saves", [True, False])
def test_unread_outputs_are_skipped_where_the_last_layer_is(
    saves: bool, float_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, given = open_build(float_build), []
    build.manifest.data["recipe"]["savings"]["last_layer_rows"] = saves

    class Backend:
        def open_stage(self, file: Path, spec: StageSpec, options: Mapping[str, Any]) -> Any:
            given.append(options["skip_unread"])
            return onnx_runtime.open_stage(file, spec, options)

    monkeypatch.setattr(session_module, "find_backend", lambda name: Backend())
    open_session(build).open_stage("language")
    assert given == [saves]


@pytest.mark.parametrize("recipe", ["float32", "plain"])
def test_stages_that_take_turns_give_the_same_bits(recipe: str, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = open_build(shared_build(builds, recipe))
    size_mb = sum(entry["bytes"] for entry in build.manifest.data["stages"].values()) / 1e6
    roomy, short = (
        open_session(edited(build, target={"session": {**build.manifest.data["target"]["session"], "open_mb": limit}}))
        for limit in (int(size_mb) + 1, 1)
    )
    monkeypatch.setattr(session_module, "_CORES_FOR_TWO", 1)
    opened: list[set[str]] = []
    open_one = short.open_stage

    def watch(stage: str) -> Any:
        fresh, result = stage not in short._open, open_one(stage)
        if fresh:
            opened.append(set(short._open))
        return result

    monkeypatch.setattr(short, "open_stage", watch)
    language = [{"language"}] if recipe == "float32" else [{"language"}, {"language", "vocabulary_head"}]
    for image in pictures()[:2]:
        opened.clear()
        expected, verdict = roomy.judge(image, gate=0.0), short.judge(image, gate=0.0)
        np.testing.assert_array_equal(verdict.verdict_logits, expected.verdict_logits)
        np.testing.assert_array_equal(verdict.mask_logits, expected.mask_logits)
        assert opened == [{"vision_encoder"}, *language, {"mask_encoder"}, MASK_STAGES]
    assert set(roomy._open) == set(build.manifest.data["stages"])


def test_key_values_grow_one_tensor_at_a_time() -> None:
    generator = np.random.default_rng(0)
    past = {f"past_{kind}_0": generator.standard_normal((1, 2, 3, 4)) for kind in ("key", "value")}
    present = {f"present_{kind}_0": generator.standard_normal((1, 2, 5, 4)) for kind in ("key", "value")}
    expected = {
        name: np.concatenate([past[name], present[name.replace("past", "present")]], axis=2) for name in list(past)
    }
    rest = np.zeros(1)
    present["last_hidden"] = rest
    extend_(past, present)
    for name, array in expected.items():
        np.testing.assert_array_equal(past[name], array)
    assert list(present) == ["last_hidden"]
