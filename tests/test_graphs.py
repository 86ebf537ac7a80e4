"""Exported graphs: the contract, the codes, and each encoding against a slow twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from defaker_opt.detector import Detector, linear_weights, load_detector, parameter_shapes
from defaker_opt.graph import Graph
from defaker_opt.graph import codes as codes_module
from defaker_opt.graph.accepted import check_accepted
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.write import check_decoded, decoded_weights, write_graph
from defaker_opt.methods import Scheme, parse_scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.runtime import open_build
from defaker_opt.runtime.backends.onnx_runtime import open_stage
from defaker_opt.runtime.spec import STAGES, StageSpec, TensorSpec
from defaker_opt.target import ENCODINGS, load_target
from tests.reference.quantization import e4m3_numbers, tensor_product_plain, token_product_plain


def one_layer_graph(rows: int, columns: int) -> Graph:
    """x [tokens, in] → Gemm with a bias: the smallest graph with a linear layer in it."""
    x = ir.Value(name="x", shape=ir.Shape(["tokens", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(
        name="vision_encoder.fc.weight",
        shape=ir.Shape([rows, columns]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.zeros((rows, columns), np.float32)),
    )
    bias = ir.Value(
        name="bias",
        shape=ir.Shape([rows]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.arange(rows, dtype=np.float32)),
    )
    node = ir.node("Gemm", [x, weight, bias], {"transB": 1})
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["tokens", rows])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight, bias], opset_imports={"": 20}, name="g")
    spec = StageSpec(
        "vision_encoder",
        (TensorSpec("x", "float32", ("tokens", columns)),),
        (TensorSpec("y", "float32", ("tokens", rows)),),
    )
    return Graph(spec, ir.Model(graph, ir_version=10))


class OneLayer:
    """Stands for a detector with a single linear layer."""

    config = None

    def __init__(self, weight: np.ndarray, scheme: Scheme | None) -> None:
        self.weight = weight
        self.codes = {"vision_encoder.fc.weight": RoundToNearest().quantize(weight, scheme)} if scheme else {}

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.weight)


def written(
    detector: OneLayer, shape: tuple[int, int], folder: Path, monkeypatch: pytest.MonkeyPatch, target: str = "cpu"
) -> tuple[Path, Graph]:
    """The layer in a target's encoding, as a file and as a graph."""
    shapes = {"vision_encoder.fc.weight": shape}
    monkeypatch.setattr(codes_module, "linear_weights", lambda config, stage: shapes)
    monkeypatch.setattr(codes_module, "parameter_shapes", lambda config, stage: shapes)
    graph = one_layer_graph(*shape)
    codes_module.fill_weights_(graph, detector, load_target(target).encodings)  # type: ignore[arg-type]
    return write_graph(graph, folder)[0], graph


def outliers(tokens: int, columns: int) -> np.ndarray:
    """Activations like a decoder's: correlated, a few channels and one token far larger than the rest."""
    generator = np.random.default_rng(5)
    x = generator.standard_normal((tokens, 3)) @ generator.standard_normal((3, columns))
    x += generator.standard_normal((tokens, columns))
    x[:, 1::29] *= 20
    x[tokens // 2] *= 30
    x[-1] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("scheme", "plain", "tolerance"),
    [
        (None, None, 1e-5),
        (Scheme(8), tensor_product_plain, 1e-5),
        (Scheme(8, activations="token"), token_product_plain, 1e-5),
        (Scheme(4, 32, "block"), None, 0.02),
        (Scheme(4, 32, "block", "group"), None, 0.02),
        (Scheme(2, 32, "block", "group"), None, 0.02),
    ],
    ids=["float", "int8", "int8-token", "int4-g32", "int4-asym-g32", "int2-asym-g32"],
)
@pytest.mark.parametrize("shape", [(24, 96), (7, 160), (64, 32)], ids=str)
def test_each_encoding_computes_what_its_plain_twin_does(
    scheme: Scheme | None,
    plain: object,
    tolerance: float,
    shape: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    weight[1] = 0
    detector = OneLayer(weight, scheme)
    path, graph = written(detector, shape, tmp_path, monkeypatch)
    x = outliers(19, shape[1])
    got = open_stage(path, graph.spec, {})({"x": x}, ("y",))["y"]
    quantized = detector.codes.get("vision_encoder.fc.weight")
    if plain is not None and quantized is not None:
        expected = plain(x, quantized.codes, quantized.scale[:, 0])  # type: ignore[operator]
    else:
        expected = x.astype(np.float64) @ (quantized.dequantize() if quantized else weight).T
    expected = expected + np.arange(shape[0])
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
    np.testing.assert_allclose(got[-1], np.arange(shape[0]), atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int8-token", "int4-g32", "int4-asym-g32"])
def test_an_input_factor_is_multiplied_in_before_the_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(2).standard_normal((24, 96)).astype(np.float32)
    scheme = parse_scheme(name)
    assert scheme is not None
    detector = OneLayer(weight, scheme)
    (key,) = detector.codes
    factor = np.exp(np.linspace(-2, 2, 96)).astype(np.float32)
    detector.codes[key] = replace(RoundToNearest().quantize(weight / factor, scheme), input_factor=factor)
    path, graph = written(detector, (24, 96), tmp_path, monkeypatch)
    ((_, decoded),) = decoded_weights(path)
    np.testing.assert_array_equal(decoded, detector.codes[key].dequantize())
    x = outliers(19, 96)
    got = open_stage(path, graph.spec, {})({"x": x}, ("y",))["y"]
    plain = {"int8": tensor_product_plain, "int8-token": token_product_plain}.get(name)
    codes, scale = detector.codes[key].codes, detector.codes[key].scale[:, 0]
    expected = (plain(x * factor, codes, scale) if plain else x.astype(np.float64) @ decoded.T) + np.arange(24)
    assert np.linalg.norm(got - expected) <= (1e-5 if plain else 0.03) * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["int8-static", "fp8-static", "int4-sym-g64"])
def test_what_engines_read_computes_what_its_plain_twin_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = parse_scheme(name)
    assert scheme is not None
    weight = np.random.default_rng(2).standard_normal((24, 192)).astype(np.float32)
    weight[1] = 0
    detector = OneLayer(weight, scheme)
    (key,) = detector.codes
    x = outliers(19, 192)
    step = float(np.abs(x).max() / 2 / scheme.largest_code)  # half of the range, so that some are cut
    if scheme.activations == "static":
        detector.codes[key] = replace(detector.codes[key], input_scale=step)
    path, graph = written(detector, (24, 192), tmp_path, monkeypatch, "h200")
    check_accepted(path, load_target("h200").graph, "h200")  # type: ignore[arg-type]
    ((_, decoded),) = decoded_weights(path)
    np.testing.assert_array_equal(decoded, detector.codes[key].dequantize())
    got = open_stage(path, graph.spec, {"as_written": True})({"x": x}, ("y",))["y"]
    if name == "int8-static":
        x = np.clip(np.rint(x / np.float32(step)), -128, 127) * np.float32(step)
    if name == "fp8-static":
        numbers = np.array(e4m3_numbers(), np.float32)
        ratio = (x / np.float32(step))[..., None]
        x = numbers[np.abs(numbers - ratio).argmin(-1)] * np.float32(step)
    tolerance = 2e-3 if "int4" in name else 1e-5  # products of float16
    np.testing.assert_allclose(got, x @ decoded.T + np.arange(24), rtol=tolerance, atol=8 * tolerance * np.abs(x).max())


@pytest.mark.parametrize("step", [0.01, 0.4])
def test_static_activations_are_rounded_and_cut(step: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((24, 96)).astype(np.float32)
    detector = OneLayer(weight, parse_scheme("int8-static"))
    (key,) = detector.codes
    detector.codes[key] = replace(detector.codes[key], input_scale=step)
    path, graph = written(detector, (24, 96), tmp_path, monkeypatch)
    ((_, decoded),) = decoded_weights(path)
    np.testing.assert_array_equal(decoded, detector.codes[key].dequantize())
    x = outliers(19, 96)
    rounded = step * np.clip(np.rint(x.astype(np.float64) / np.float32(step)), -128, 127)
    got = open_stage(path, graph.spec, {})({"x": x}, ("y",))["y"]
    expected = rounded @ decoded.T.astype(np.float64) + np.arange(24)
    assert np.abs(x).max() > 127 * 0.4 and np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def test_layers_share_what_is_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"a": 0.1, "b": 0.1, "c": 0.2}
    names = [f"vision_encoder.{name}.weight" for name in steps]
    weight = np.random.default_rng(2).standard_normal((24, 96)).astype(np.float32)
    detector = OneLayer(weight, parse_scheme("int8-static"))
    (codes,) = detector.codes.values()
    detector.codes = {name: replace(codes, input_scale=step) for name, step in zip(names, steps.values())}
    monkeypatch.setattr(codes_module, "linear_weights", lambda config, stage: dict.fromkeys(names, (24, 96)))
    monkeypatch.setattr(codes_module, "parameter_shapes", lambda config, stage: dict.fromkeys(names, (24, 96)))
    graph = one_layer_graph(24, 96)
    inner = graph.model.graph
    old = inner.initializers.pop("vision_encoder.fc.weight")
    node = next(iter(inner))
    for name in names:
        value = ir.Value(name=name, shape=old.shape, type=old.type, const_value=old.const_value)
        inner.initializers.add(value)
        inner.append(ir.node("Gemm", [node.inputs[0], value, node.inputs[2]], {"transB": 1}))
    node.replace_input_with(1, inner.initializers[names[0]])
    codes_module.fill_weights_(graph, detector, load_target("cpu").encodings)  # type: ignore[arg-type]
    assert sum(each.op_type == "QuantizeLinear" for each in inner) == 2
    assert sum(each.op_type == "MatMul" for each in inner) == 4


def test_one_scale_a_token_survives_outliers_in_other_tokens() -> None:
    weight = np.random.default_rng(2).standard_normal((32, 128)).astype(np.float32)
    quantized, x = RoundToNearest().quantize(weight, Scheme(8)), outliers(40, 128)
    exact = x.astype(np.float64) @ quantized.dequantize().T
    ordinary = np.delete(np.arange(40), [20, 39])

    def error(product: np.ndarray) -> float:
        return float(np.linalg.norm((product - exact)[ordinary]))

    by_tensor = error(tensor_product_plain(x, quantized.codes, quantized.scale[:, 0]))
    by_token = error(token_product_plain(x, quantized.codes, quantized.scale[:, 0]))
    assert by_token < 0.5 * by_tensor


@pytest.mark.parametrize("stage", STAGES)
def test_graphs_keep_the_contract_and_every_name(stage: str) -> None:
    detector = load_detector("reference")
    graph = export_stage(detector, stage)
    for value, tensor in zip(
        (*graph.model.graph.inputs, *graph.model.graph.outputs), graph.spec.inputs + graph.spec.outputs
    ):
        assert value.name == tensor.name
        sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
        assert sizes == list(tensor.shape)
    assert set(parameter_shapes(detector.config, stage)) <= set(graph.model.graph.initializers)
    resizes = [node.attributes["mode"].as_string() for node in graph.model.graph if node.op_type == "Resize"]
    assert "cubic" not in resizes


def test_an_outline_takes_no_memory_for_weights() -> None:
    detector = load_detector("reference")
    for parameter in detector.outline("language").parameters():
        assert parameter.untyped_storage().nbytes() <= 4


def test_files_hold_exactly_the_codes_that_torch_was_given(any_build: Path) -> None:
    manifest = open_build(any_build).manifest
    quantized = [name for each in manifest.data["passes"] for name in each["quantize"]["quantized"]]
    detector = quantized_again(any_build)
    seen = []
    for stage in STAGES:
        for name, weight in decoded_weights(any_build / f"{stage}.onnx"):
            np.testing.assert_array_equal(weight, detector.read(name).numpy())
            seen.append(name)
        check_decoded(any_build / f"{stage}.onnx", detector, stage)
    assert sorted(seen) == sorted(quantized)


def quantized_again(build: Path) -> Detector:
    """The detector with the passes of a build's recipe applied; pictures give the same codes again."""
    from defaker_opt.pipeline import plan_job
    from defaker_opt.recipe import load_recipe

    job = plan_job(load_recipe(open_build(build).manifest.data["recipe"]["name"]), load_target("cpu"), "reference")
    for each in job.recipe.passes:
        each.apply(job.detector, lambda what, fraction: None, job.samples)
    return job.detector


def test_a_graph_that_decodes_to_other_numbers_is_noticed(int8_build: Path) -> None:
    detector = quantized_again(int8_build)
    name = next(iter(linear_weights(detector.config, "vision_encoder")))
    detector.codes[name].codes[0, 0] ^= 1
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        check_decoded(int8_build / "vision_encoder.onnx", detector, "vision_encoder")


def test_graphs_are_valid_onnx_and_carry_no_paths(any_build: Path) -> None:
    for stage in STAGES:
        path = any_build / f"{stage}.onnx"
        if stage != "language":  # MatMulNBits is onnxruntime's own, which the checker does not know
            onnx.checker.check_model(path)
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content
        assert str(Path.home()).encode() not in content


def test_every_encoding_of_a_target_is_written_by_somebody() -> None:
    named = {encoding for encodings in ENCODINGS.values() for encoding in encodings}
    assert named == {*codes_module.WRITERS, "matmul"}


def test_linear_weights_are_all_of_a_stages_linear_layers() -> None:
    detector = load_detector("reference")
    for stage in STAGES:
        modules = detector.load_stage(stage).named_modules()
        names = {f"{stage}.{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}
        assert set(linear_weights(detector.config, stage)) == names
