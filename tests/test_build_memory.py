"""Making a build takes the memory of a layer, not of a stage; codes wait on disk, and outlive a killed process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defaker_opt.detector import linear_weights, load_detector
from defaker_opt.methods import QuantizedWeight, Scheme, Statistics
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.runtime.spec import STAGES, VOCABULARY_HEAD
from defaker_opt.spool import SpooledCodes

# A decoder layer of this width has 4.2 million parameters: 16.8 MB in torch, 4.2 MB of codes.
LAYER_MB = 16.8
SMALL, LARGE = 2, 10

# All of making a stage but running the written graph, in which onnxruntime holds the codes.
MAKE = """
import dataclasses, sys
from pathlib import Path
import torch
from defaker_opt.detector import Detector, load_detector, stored_shapes
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.write import check_decoded, write_graph
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.spool import SpooledCodes
from defaker_opt.target import load_target
from defaker_opt.weights import DrawnWeights

scheme, layers, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
config = load_detector("reference").config
sizes = {"hidden_size": 512, "intermediate_size": 2048, "heads": 8, "kv_heads": 8, "layers": layers}
config = dataclasses.replace(config, language=dataclasses.replace(config.language, **sizes))
detector = Detector(config, DrawnWeights(stored_shapes(config), 0), CODES)
rules = (Rule("language.*", scheme), Rule("*", "float"))
Quantize(rules).apply(detector, lambda what, fraction: None)
graph = export_stage(detector, "language")
fill_weights_(graph, detector, load_target("cpu").encodings)
check_decoded(write_graph(graph, folder)[0], detector, "language")
stage = detector.LOAD("language")
with torch.inference_mode():
    stage(torch.ones(1, 3, 512), torch.arange(3)[None], *[torch.zeros(1, 8, 0, 64)] * (2 * layers))
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak where Linux tells it")


def peak_mb(code: str, *arguments: object) -> float:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def growth_mb(code: str, scheme: str, folder: Path) -> float:
    peaks = []
    for layers in (SMALL, LARGE):
        place = folder / str(layers)
        place.mkdir()
        peaks.append(peak_mb(code, scheme, layers, place))
    return peaks[1] - peaks[0]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("scheme", ["int8-token", "int4-g128"])
def test_memory_does_not_grow_with_the_layers(scheme: str, tmp_path: Path) -> None:
    code = MAKE.replace("CODES", 'SpooledCodes(folder / "codes")').replace("LOAD", "stream_stage")
    assert growth_mb(code, scheme, tmp_path) < (LARGE - SMALL) * LAYER_MB / 4


@pytest.mark.slow
@linux
def test_the_measurement_sees_a_stage_that_is_held(tmp_path: Path) -> None:
    """The twin of the test above: codes in memory and the stage loaded whole take that much more."""
    code = MAKE.replace("CODES", "{}").replace("LOAD", "load_stage")
    assert growth_mb(code, "int8-token", tmp_path) > (LARGE - SMALL) * LAYER_MB * 0.75


def example_inputs(stage: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = {"tiles": 2, "tokens": 5, "past": 3}
    for tensor in load_detector("reference").spec(stage).inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        yield torch.arange(5)[None] if tensor.dtype == "int64" else torch.randn(shape, generator=generator)


@pytest.mark.parametrize("stage", [*STAGES, VOCABULARY_HEAD])
def test_a_streamed_stage_computes_what_a_loaded_one_does(stage: str) -> None:
    detector, inputs = load_detector("reference"), list(example_inputs(stage))
    streamed = detector.stream_stage(stage)
    with torch.inference_mode():
        expected = detector.load_stage(stage)(*inputs)
        for _ in range(2):
            for got, want in zip(streamed(*inputs), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_streamed_stage_holds_little_between_its_blocks(stage: str) -> None:
    detector = load_detector("reference")
    streamed = detector.stream_stage(stage)
    with torch.inference_mode():
        streamed(*example_inputs(stage))
    held = sum(parameter.numel() for parameter in streamed.parameters() if parameter.device.type != "meta")
    whole = sum(parameter.numel() for parameter in streamed.parameters())
    assert held < 0.5 * whole


@pytest.mark.parametrize(
    "scheme",
    [Scheme(8), Scheme(8, activations="token"), Scheme(8, activations="static"), Scheme(4, 32, "block")],
    ids=str,
)
def test_spooled_codes_come_back_as_they_were(scheme: Scheme, tmp_path: Path) -> None:
    weight = RoundToNearest().quantize(np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32), scheme)
    if scheme.activations == "static":
        weight = replace(weight, input_scale=0.1)
    spooled = SpooledCodes(tmp_path)
    assert "a.b.weight" not in spooled
    spooled["a.b.weight"] = weight
    for codes in (spooled, SpooledCodes(tmp_path)):
        assert list(codes) == ["a.b.weight"]
        again = codes["a.b.weight"]
        np.testing.assert_array_equal(again.codes, weight.codes)
        np.testing.assert_array_equal(again.scale, weight.scale)
        assert again.scheme == scheme and again.input_scale == weight.input_scale
        assert again.codes.dtype == np.int8
    del spooled["a.b.weight"]
    assert list(tmp_path.iterdir()) == []
    assert len(spooled) == 0


def test_half_written_codes_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import defaker_opt.spool as spool_module

    weight = RoundToNearest().quantize(np.ones((2, 16), np.float32), Scheme(8))
    save = np.save

    def stop(stream: Any, array: np.ndarray, allow_pickle: bool) -> None:
        save(stream, array[:1], allow_pickle=False)
        if array.dtype == np.int8:
            raise KeyboardInterrupt

    monkeypatch.setattr(spool_module.np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        SpooledCodes(tmp_path)["a.weight"] = weight
    monkeypatch.undo()
    assert list(SpooledCodes(tmp_path)) == []


def test_quantizing_goes_on_from_the_codes_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_detector("reference")
    rules = Quantize((Rule("vision_encoder.*", "int8"), Rule("*", "float")))
    rules.apply(whole, lambda what, fraction: None)
    names = list(linear_weights(whole.config, "vision_encoder"))

    class StoppedError(Exception):
        pass

    def stop(what: str, fraction: float) -> None:
        if names[3] in what:
            raise StoppedError

    detector = load_detector("reference")
    detector.codes = SpooledCodes(tmp_path)
    with pytest.raises(StoppedError):
        rules.apply(detector, stop)
    made: list[tuple[int, ...]] = []
    quantize = RoundToNearest.quantize

    def counted(self: RoundToNearest, weight: np.ndarray, scheme: Scheme, seen: Statistics) -> QuantizedWeight:
        made.append(weight.shape)
        return quantize(self, weight, scheme, seen)

    monkeypatch.setattr(RoundToNearest, "quantize", counted)
    detector.codes = SpooledCodes(tmp_path)
    notes = rules.apply(detector, lambda what, fraction: None).notes
    assert len(made) == len(names) - 4
    assert notes == Quantize(rules.rules).apply(whole, lambda what, fraction: None).notes
    for name in names:
        np.testing.assert_array_equal(detector.codes[name].codes, whole.codes[name].codes)
