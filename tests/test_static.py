"""The recipe `int8-static` on the small detector, from pictures to a verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from defaker_opt.planning.fit import plan_recipe
from defaker_opt.runtime import open_build, open_session
from defaker_opt.sample import sample_image
from tests.conftest import shared_build, summary_of


@pytest.fixture(scope="module")
def static_build(builds: Path) -> Path:
    return shared_build(builds, "int8-static")


def test_verdict_and_mask_are_near_those_of_float(static_build: Path, float_build: Path) -> None:
    image = Image.fromarray(sample_image())
    static, whole = (open_session(open_build(build)).judge(image, gate=0.0) for build in (static_build, float_build))
    assert np.abs(static.verdict_logits - whole.verdict_logits).max() < 0.3
    assert static.mask is not None and whole.mask is not None
    assert (static.mask != whole.mask).mean() < 0.01


def test_every_range_is_a_number_of_the_graph(static_build: Path) -> None:
    manifest = open_build(static_build).manifest.data
    quantized = manifest["passes"][0]["quantize"]["quantized"]
    assert set(quantized.values()) == {"int8-static"} and manifest["calibration"]["images"] == 128
    for stage in ("vision_encoder", "language", "mask_encoder"):
        graph = onnx.load(static_build / f"{stage}.onnx", load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        assert "DynamicQuantizeLinear" not in kinds
        # Layers that read the same activations share one QuantizeLinear, as queries, keys and values of the decoder do.
        layers = sum(name.startswith(f"{stage}.") for name in quantized)
        assert 0 < kinds.count("QuantizeLinear") <= layers - 2 * (stage == "language")


def test_what_it_costs_to_make_was_foreseen(static_build: Path) -> None:
    here = [step for step in plan_recipe("int8-static", None, None).forecast.steps if step.where == "this machine"]
    assert max(step.memory_bytes for step in here) == pytest.approx(
        summary_of(static_build)["peak_memory_bytes"], rel=0.15
    )
