"""Attention's scores from codes of queries and keys: what they are seen to be, and what graphs do with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from defaker_opt.detector import Detector, attention_modules, linear_weights, load_detector
from defaker_opt.errors import DefakerError, PassError
from defaker_opt.files import default_cache_folder
from defaker_opt.graph.traced import traced_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.histogram import EDGES, input_scale
from defaker_opt.methods import Need
from defaker_opt.never_slower import Timing, keep_float
from defaker_opt.observe import recorded
from defaker_opt.observe import sweep as sweep_module
from defaker_opt.observe.inputs import StageInput, calibration_inputs
from defaker_opt.observe.sweep import observe_layers
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime.build import open_build
from defaker_opt.samples import Samples, load_samples
from defaker_opt.spool import SpooledCodes, SpooledScales
from defaker_opt.stage_build import fill_stage_
from defaker_opt.target import load_target
from tests.conftest import ROOT, shared_build

# One attention of each kind: of tiles, of a decoder with fewer keys than queries, in windows with pooled queries.
ATTENTIONS = [
    "vision_encoder.tower.encoder.layer.1.attention",
    "language.layers.2.self_attn",
    "mask_encoder.trunk.blocks.1.attn",
]
# One stage is enough to ask which ranges are found.
CODED_TILES = Quantize((Rule("vision_encoder.*", "int8-static"), Rule("*", "float")), scores="mse")
SEEN: tuple[Need, ...] = ("histogram", "largest")
CODED = ("vision_encoder", "language", "mask_encoder")


@pytest.fixture(scope="module")
def samples() -> Samples:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return Samples(whole.name, whole.digest, whole.items[:2])


@contextmanager
def plainly_recorded(module: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What one attention multiplies, by another attention function in its file."""
    file = sys.modules[type(module).__module__]
    original, seen = file.eager_attention_forward, []

    def noting(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: object, **named: object) -> object:
        if attention is module:
            seen.append((query.clone(), key.clone()))
        return original(attention, query, key, *rest, **named)

    file.eager_attention_forward = noting
    try:
        yield seen
    finally:
        file.eager_attention_forward = original


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_queries_and_keys_are_seen_as_they_are_multiplied(attention: str, samples: Samples) -> None:
    needs = {f"{attention}.queries": SEEN, f"{attention}.keys": SEEN}
    stage, _, inner = attention.partition(".")
    # Blocks are looked at where some layer of the stage is.
    needs[next(iter(linear_weights(load_detector("reference").config, stage)))] = ("largest",)
    detector = replace(load_detector("reference"), codes={})
    found = {name: seen for group in observe_layers(detector, samples, needs) for name, seen in group.items()}
    module = detector.load_stage(stage)
    with torch.inference_mode(), plainly_recorded(module.get_submodule(inner)) as calls:
        for call in calibration_inputs(detector, stage, samples):
            module(*call.tensors)
    assert len(calls) == len(samples.items) * (2 if stage == "language" else 1)
    for side, operand in enumerate(("queries", "keys")):
        numbers = np.concatenate([call[side].reshape(-1, call[side].shape[-1]).numpy() for call in calls])
        seen = found[f"{attention}.{operand}"]
        assert seen.largest is not None and seen.histogram is not None
        np.testing.assert_allclose(seen.largest, np.abs(numbers).max(axis=0), rtol=1e-5)
        counts = np.histogram(np.abs(numbers), np.concatenate([[0.0], EDGES[1:]]))[0]
        assert seen.histogram.sum() == numbers.size
        # A number on the edge of a bin may fall into the next where a stage's tiles are computed together.
        assert np.abs(seen.histogram - counts).sum() < 1e-3 * numbers.size


def test_watching_changes_nothing_and_ends_with_an_error_too(samples: Samples) -> None:
    detector = load_detector("reference")
    module = detector.load_stage("vision_encoder")
    attention = module.get_submodule("tower.encoder.layer.0.attention")
    (call, *_) = calibration_inputs(detector, "vision_encoder", samples)
    with torch.inference_mode():
        plain = module(*call.tensors)[0]
        with recorded({"a.queries": attention, "a.keys": attention}) as seen:
            assert torch.equal(module(*call.tensors)[0], plain)
        with pytest.raises(KeyError), recorded({"a.queries": attention}):
            raise KeyError
        assert torch.equal(module(*call.tensors)[0], plain)
    assert sorted(seen) == ["a.keys", "a.queries"] and len(seen["a.keys"]) == 1
    assert attention.config._attn_implementation == "eager" and not hasattr(attention, "note_operands")


@pytest.fixture(scope="module")
def coded_build(builds: Path) -> Path:
    pytest.importorskip("openvino")
    return shared_build(builds, "int8-static", "x86-openvino")


def test_every_attention_of_the_coded_stages_has_both_ranges(coded_build: Path) -> None:
    config = load_detector("reference").config
    scales = open_build(coded_build).manifest.data["passes"][0]["quantize"]["operand_scales"]
    assert sorted(scales) == sorted(name for stage in CODED for name in attention_modules(config, stage))
    for stage in CODED:
        graph = onnx.load(coded_build / f"{stage}.onnx", load_external_data=False).graph
        values = {tensor.name: tensor for tensor in graph.initializer}
        producers = {output: node for node in graph.node for output in node.output}
        written: dict[str, list[float]] = {}
        for node in graph.node:
            attention = node.name.partition("/")[0]
            sides = [producers.get(name) for name in node.input] if node.op_type == "MatMul" else []
            if attention in scales and len(sides) == 2:
                kinds = {side.op_type for side in sides if side is not None}
                if kinds == {"DequantizeLinear"}:
                    steps = [onnx.numpy_helper.to_array(values[side.input[1]]) for side in sides if side is not None]
                    written[attention] = [float(step) for step in steps]
        assert written == {n: pytest.approx(s, rel=1e-6) for n, s in scales.items() if n.startswith(f"{stage}.")}


def test_other_targets_have_the_same_codes_and_float_scores(coded_build: Path, builds: Path) -> None:
    other = shared_build(builds, "int8-static")
    notes = [open_build(each).manifest.data["passes"][0]["quantize"] for each in (coded_build, other)]
    assert notes[0] == notes[1]
    graph = onnx.load(other / "vision_encoder.onnx", load_external_data=False).graph
    assert not [node.name for node in graph.node if ".operand_" in node.name]


def rounding(scales: dict[nn.Module, tuple[float, float]], original: object) -> object:
    """An attention function that rounds what it multiplies."""

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: object, **named: object) -> object:
        query, key = (
            torch.clamp(torch.round(x / step), -128, 127) * step for x, step in zip((query, key), scales[module])
        )
        return original(module, query, key, *rest, **named)  # type: ignore[operator]

    return attend


@pytest.mark.parametrize("stage", CODED)
def test_graphs_round_queries_and_keys_as_a_plain_twin_does(
    stage: str, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float weights, so that nothing else is rounded; coarse steps, so that it shows."""
    detector = replace(load_detector("reference"), codes={})
    for index, attention in enumerate(attention_modules(detector.config, stage)):
        detector.operand_scales[attention] = (0.3 + 0.01 * index, 0.2)
    graph = traced_stage(detector, stage)
    fill_stage_(graph, detector, load_target("x86-openvino"))
    (file, *_) = write_graph(graph, tmp_path)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), settings)
    module = detector.load_stage(stage)
    (call, *_) = calibration_inputs(detector, stage, samples)
    exact = outputs_of(module, call)
    modules = {module.get_submodule(n.partition(".")[2]): s for n, s in detector.operand_scales.items()}
    for name in {type(each).__module__ for each in modules}:
        monkeypatch.setattr(
            sys.modules[name], "eager_attention_forward", rounding(modules, sys.modules[name].eager_attention_forward)
        )
    rounded = outputs_of(module, call)
    given = {tensor.name: array.numpy() for tensor, array in zip(detector.spec(stage).inputs, call.tensors)}
    got = session.run([detector.spec(stage).outputs[0].name], given)[0]
    # A code on an edge may fall to either side, of few among many.
    assert np.linalg.norm(got - rounded) < 0.1 * np.linalg.norm(exact - rounded)
    assert np.linalg.norm(exact - rounded) > 0.005 * np.linalg.norm(exact)


def outputs_of(module: nn.Module, call: StageInput) -> np.ndarray:
    with torch.inference_mode():
        first: np.ndarray = module(*call.tensors)[0].numpy()
    return first


def test_a_pass_that_goes_on_finds_the_same_ranges(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of a run that was killed are there already; ranges are not kept with them."""
    first, second = (replace(load_detector("reference"), codes={}, operand_scales={}) for _ in range(2))
    CODED_TILES.apply(first, lambda what, fraction: None, samples)
    second.codes.update(first.codes)
    monkeypatch.setattr(sweep_module, "open_cache", lambda *given: None)
    CODED_TILES.apply(second, lambda what, fraction: None, samples)
    assert first.operand_scales == second.operand_scales and len(first.operand_scales) == 4


def test_ranges_that_are_kept_are_not_looked_for_again(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when a job is run again after it was killed: codes and ranges are in files."""
    kept = SpooledScales(tmp_path / "operands.json")
    first = replace(load_detector("reference"), codes=SpooledCodes(tmp_path / "codes"), operand_scales=kept)
    whole = CODED_TILES.apply(first, lambda what, fraction: None, samples)
    again = SpooledScales(tmp_path / "operands.json")
    assert dict(again) == dict(kept) and len(again) == 4
    second = replace(load_detector("reference"), codes=SpooledCodes(tmp_path / "codes"), operand_scales=again)
    monkeypatch.setattr(sweep_module, "open_cache", lambda *given: None)
    monkeypatch.setattr(sweep_module, "tile_inputs", lambda *given: pytest.fail("looked again"))
    assert CODED_TILES.apply(second, lambda what, fraction: None, samples) == whole
    del again[next(iter(again))]
    assert len(SpooledScales(tmp_path / "operands.json")) == 3


def test_what_was_seen_of_layers_serves_recipes_without_scores_too(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEFAKER_CACHE_DIR", str(tmp_path))
    with_scores, without = (replace(load_detector("reference"), codes={}, operand_scales={}) for _ in range(2))
    CODED_TILES.apply(with_scores, lambda what, fraction: None, samples)
    monkeypatch.setattr(sweep_module, "tile_inputs", lambda *given: pytest.fail("looked again"))
    replace(CODED_TILES, scores=None).apply(without, lambda what, fraction: None, samples)
    assert not without.operand_scales
    assert {n: c.input_scale for n, c in without.codes.items()} == {
        n: c.input_scale for n, c in with_scores.codes.items()
    }


def test_a_stage_without_blocks_has_ranges_too(samples: Samples, tmp_path: Path) -> None:
    detector = replace(load_detector("reference"), codes={}, operand_scales={})
    whole = Quantize((Rule("mask_decoder.transformer.*", "int8-static"), Rule("*", "float")), scores="mse")
    whole.apply(detector, lambda what, fraction: None, samples)
    assert tuple(detector.operand_scales) == attention_modules(detector.config, "mask_decoder")
    graph = traced_stage(detector, "mask_decoder")
    fill_stage_(graph, detector, load_target("x86-openvino"))
    (file, *_) = write_graph(graph, tmp_path)
    nodes = onnx.load(file, load_external_data=False).graph.node
    rounded = [node.name for node in nodes if node.op_type == "QuantizeLinear" and ".operand_" in node.name]
    assert len(rounded) == 2 * len(detector.operand_scales)


def test_clips_decide_how_far_codes_reach(samples: Samples) -> None:
    found: dict[str, Detector] = {}
    for clip in ("largest", "mse"):
        found[clip] = replace(load_detector("reference"), codes={}, operand_scales={})
        replace(CODED_TILES, scores=clip).apply(found[clip], lambda what, fraction: None, samples)  # type: ignore[arg-type]
    far, near = (np.array(list(found[clip].operand_scales.values())) for clip in ("largest", "mse"))
    assert (near <= far * (1 + 1e-9)).all() and (near < far).any()
    assert input_scale(np.eye(len(EDGES) - 1)[700], "largest") == EDGES[701] / 127


def test_scores_without_static_layers_are_refused() -> None:
    config, target = load_detector("reference").config, load_target("x86-openvino")
    for scheme in ("int8", "float"):
        with pytest.raises(PassError, match=r"scores: mse, but no attention has static activations in all its layers"):
            Quantize((Rule("*", scheme),), scores="mse").check(config, target)  # type: ignore[arg-type]
    half = (Rule("*.q_proj.*", "int8-static"), Rule("*.qkv.*", "int8-static"), Rule("*", "float"))
    with pytest.raises(PassError, match="give those layers the scheme int8-static"):
        Quantize(half, scores="largest").check(config, target)


def test_an_unknown_clip_is_named(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "int8-static.yaml").read_text().replace("scores: mse", "scores: widest")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DefakerError, match=r"scores: .widest. is not one of entropy, largest, mse, percentile"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_stages_that_are_taken_back_take_their_scores_with_them() -> None:
    recipe, detector = load_recipe("int8-static"), load_detector("reference")
    slow = [Timing(stage, "int8-static", (1.0,), (2.0,)) for stage in CODED]
    (some,), (none,) = (keep_float(recipe, detector, slow[:count]).passes for count in (2, 3))
    assert isinstance(some, Quantize) and isinstance(none, Quantize)
    assert {name.partition(".")[0] for name in some.attentions(detector.config)} == {"mask_encoder"}
    assert none.scores is None
    none.check(detector.config, load_target("x86-openvino"))
