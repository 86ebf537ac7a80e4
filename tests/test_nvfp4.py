"""NVFP4: codes, scales of FP8 and the weight's own scale, and what the backend for GPUs computes of them on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator
from PIL import Image

from defaker_opt.catalog import find_module, module_names, yaml_names
from defaker_opt.compiling import EngineJob
from defaker_opt.compiling.child import build_engine
from defaker_opt.compiling.gate import LIBRARY, capabilities_of, check_graphs
from defaker_opt.compiling.relax import relax_graph
from defaker_opt.detector import load_detector
from defaker_opt.errors import BuildError, ConfigError, PassError
from defaker_opt.graph.accepted import check_accepted
from defaker_opt.graph.product import write_product
from defaker_opt.graph.write import decoded_weights
from defaker_opt.methods import FP4, QuantizedWeight, Scheme, Statistics
from defaker_opt.pipeline import plan_job
from defaker_opt.preview import preview_job, quantized_bytes
from defaker_opt.profiles.work import count_file
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.backends import Choice, onnx_runtime, torch_cuda
from defaker_opt.runtime.cuda import has_gpu
from defaker_opt.runtime.engines import backend_of
from defaker_opt.runtime.recording import record_calls
from defaker_opt.runtime.spec import STAGES, StageSpec
from defaker_opt.runtime.torch_graph import program as program_module
from defaker_opt.runtime.torch_graph.graph import read_graph
from defaker_opt.runtime.torch_graph.operators import Operator
from defaker_opt.runtime.torch_graph.products import fused_attention, pack_fp4, widen_fp4
from defaker_opt.runtime.torch_graph.program import Program, count_operators, lower
from defaker_opt.sample import sample_image
from defaker_opt.target import load_target
from tests.conftest import defaker_opt, shared_build
from tests.reference.nvfp4 import e2m1_numbers, round_to_nvfp4_plain
from tests.reference.quantization import e4m3_numbers
from tests.test_graphs import OneLayer
from tests.test_graphs import written as written_layer

RECIPE = "datacenter-nvfp4"
SCHEME = Scheme(4, 16, "block", number="nvfp")
ENCODINGS = {"nvfp4": "dq_nvfp4"}
# float32 has no steps between them.
NORMAL = float(np.finfo(np.float32).tiny)


def codes_of(weight: np.ndarray, method: str = "round_to_nearest") -> QuantizedWeight:
    seen = Statistics(1, np.eye(weight.shape[1]), np.zeros((weight.shape[1],) * 2), np.ones(weight.shape[1]))
    quantized: QuantizedWeight = find_module("methods", method).METHOD().quantize(weight, SCHEME, seen)
    return quantized


def hard_weight(rows: int = 24, columns: int = 80) -> np.ndarray:
    """Rows and blocks of zeros, of one number, far below the largest, of dead and equal columns; and every border."""
    weight = np.random.default_rng(3).standard_t(3, (rows, columns)).astype(np.float32)
    weight[1] = 0
    weight[2, 16:32] = 0
    weight[3, :16] *= 1e-9  # a scale of FP8 would be zero
    weight[4] = -0.25
    weight[5, :16] = e2m1_numbers()
    weight[6, :8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
    weight[:, 40] = 0
    weight[:, 42] = weight[:, 41]
    weight[7, 63] = -weight[7, 64]
    return weight


def written(codes: QuantizedWeight, folder: Path) -> tuple[Path, StageSpec]:
    path = folder / "product.onnx"
    return path, write_product(path, np.zeros(codes.codes.shape, np.float32), codes, ENCODINGS)


def test_codes_stand_for_the_published_numbers() -> None:
    bits = np.arange(16, dtype=np.uint8)
    numbers = bits.view(FP4).astype(np.float64)
    np.testing.assert_array_equal(numbers, e2m1_numbers())
    assert sorted({abs(number) for number in e2m1_numbers()}) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert np.signbit(numbers).tolist() == 8 * [False] + 8 * [True]


@pytest.mark.parametrize("shape", [(1, 16), (24, 80), (7, 336)], ids=str)
def test_codes_and_scales_are_those_of_the_plain_twin(shape: tuple[int, int]) -> None:
    weight = np.resize(hard_weight(), shape)
    quantized = codes_of(weight)
    codes, scales, tensor_scale = round_to_nvfp4_plain(weight)
    np.testing.assert_array_equal(quantized.codes.astype(np.float64), codes)
    np.testing.assert_array_equal(np.signbit(quantized.codes.astype(np.float64)), np.signbit(codes))
    np.testing.assert_array_equal(quantized.block_scales().astype(np.float64), scales)
    assert quantized.tensor_scale == tensor_scale


def test_every_number_comes_back() -> None:
    """Of every block whose largest is a 6 times a scale of FP8."""
    scales = np.array([scale for scale in e4m3_numbers() if scale > 0], np.float32)
    weight = (np.array(e2m1_numbers(), np.float32) * scales[:, None]).reshape(1, -1)
    quantized = codes_of(weight)
    assert quantized.tensor_scale == 1
    np.testing.assert_array_equal(quantized.dequantize(), weight)
    np.testing.assert_array_equal(np.signbit(quantized.dequantize()), np.signbit(weight))
    np.testing.assert_array_equal(quantized.codes.view(np.uint8).reshape(-1, 16), np.tile(np.arange(16), (126, 1)))


@settings(max_examples=50, deadline=None)
@given(
    weight=arrays(np.float32, st.tuples(st.integers(1, 3), st.just(48)), elements=st.floats(-1e4, 1e4, width=32)),
    method=st.sampled_from(["round_to_nearest", "mse_clip", "gptq", "awq", "hqq"]),
)
def test_scales_are_numbers_of_fp8_times_one_float(weight: np.ndarray, method: str) -> None:
    quantized = codes_of(weight, method)
    assert quantized.tensor_scale is not None and np.float32(quantized.tensor_scale) == quantized.tensor_scale
    steps = quantized.block_scales().astype(np.float32)
    assert (steps >= 2.0**-9).all() and (steps <= 448).all()
    assert (quantized.scale >= NORMAL).all()
    assert (steps * np.float32(quantized.tensor_scale)).tobytes() == quantized.scale.tobytes()


@settings(max_examples=50, deadline=None)
@given(weight=arrays(np.float32, (2, 32), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_rounding_keeps_order_and_cuts_off_at_the_largest_code(weight: np.ndarray) -> None:
    quantized = codes_of(weight)
    for values, decoded, scale in zip(
        weight.reshape(-1, 16), quantized.dequantize().reshape(-1, 16), quantized.scale.ravel()
    ):
        order = np.argsort(values)
        assert (np.diff(decoded[order]) >= 0).all()
        assert (np.abs(decoded) <= 6 * scale).all()
        np.testing.assert_array_equal(
            decoded[np.abs(values) >= 6 * scale], 6 * scale * np.sign(values[np.abs(values) >= 6 * scale])
        )


@pytest.mark.parametrize("method", module_names("methods"))
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1e-30, 1e30, 3e38])
def test_weights_of_any_size_decode_to_finite_numbers(method: str, size: float) -> None:
    weight = (np.random.default_rng(0).uniform(-1, 1, (3, 64)) * size).astype(np.float32)
    with np.errstate(over="ignore"):
        decoded = codes_of(weight, method).dequantize()
    assert np.isfinite(decoded).all()
    if 1e-34 < size < 1e38:
        assert np.linalg.norm(decoded.astype(np.float64) - weight) < 0.2 * np.linalg.norm(weight.astype(np.float64))


def test_a_block_far_below_the_largest_gets_the_smallest_scale() -> None:
    weight = np.ones((1, 48), np.float32)
    weight[0, 16:32] = 1e-9
    weight[0, 32:] = 1e-6
    quantized = codes_of(weight)
    assert quantized.block_scales().astype(float).tolist() == [[448, 2.0**-9, 2.0**-9]]
    assert not quantized.dequantize()[0, 16:32].any()
    np.testing.assert_allclose(quantized.dequantize()[0, 32:], 1e-6, rtol=0.2)


def test_a_searched_scale_lies_above_the_range_where_that_is_better() -> None:
    """Between 4 and 6 there is no code, but where the largest is a 4 there are 3 and 4."""
    weight = np.tile(np.float32([6, 4.5, 4.5, 4.5, 4.5, 3, 1.5, 0]), 6)[None]
    weight[0, :16] = 2688  # the weight's own scale is 1, and the block with its largest can have none above 448
    near, searched = codes_of(weight), codes_of(weight, "mse_clip")
    assert near.scale.tolist() == [[448, 1, 1]]
    assert searched.scale.tolist() == [[448, 1.5, 1.5]]
    np.testing.assert_array_equal(searched.dequantize(), weight)


def test_a_searched_scale_is_the_best_of_all_that_fp8_has() -> None:
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    quantized = codes_of(weight, "mse_clip")
    blocks, numbers = weight.reshape(-1, 16).astype(np.float64), np.array(e2m1_numbers())
    found = np.square(quantized.dequantize().reshape(-1, 16) - blocks).sum(1)
    for block, error in zip(blocks, found):
        tried = [scale * (quantized.tensor_scale or 0) for scale in e4m3_numbers() if scale > 0]
        best = min(np.square(np.abs(numbers * step - block[:, None]).min(1)).sum() for step in tried)
        assert error <= best * (1 + 1e-5)


@pytest.mark.parametrize("columns", [8, 24, 100])
def test_columns_in_no_sixteens_stay_float(columns: int) -> None:
    assert SCHEME.fitted(columns) is None
    assert SCHEME.fitted(columns * 16) == SCHEME


def test_four_and_a_half_bits_a_weight_are_foreseen_and_written(tmp_path: Path) -> None:
    assert quantized_bytes((128, 256), "nvfp4-g16") == 128 * 256 * 9 // 16
    path, _ = written(codes_of(np.ones((128, 256), np.float32)), tmp_path)
    sizes = {name: len(value.const_value.tobytes()) for name, value in ir.load(path).graph.initializers.items()}  # type: ignore[union-attr]
    assert sizes == {
        "product.weight.codes": 128 * 256 // 2,
        "product.weight.block_scale": 128 * 16,
        "product.weight.tensor_scale": 4,
    }


@pytest.mark.parametrize("method", ["round_to_nearest", "awq"])
@pytest.mark.parametrize("shape", [(24, 80), (1, 16), (7, 336)], ids=str)
def test_a_file_decodes_bit_for_bit(shape: tuple[int, int], method: str, tmp_path: Path) -> None:
    codes = codes_of(np.resize(hard_weight(), shape), method)
    path, _ = written(dataclasses.replace(codes, input_factor=None), tmp_path)
    ((_, decoded),) = decoded_weights(path)
    expected = dataclasses.replace(codes, input_factor=None).dequantize()
    assert decoded.tobytes() == expected.tobytes()


def test_a_file_means_to_onnx_what_it_means_to_us(tmp_path: Path) -> None:
    codes = codes_of(hard_weight())
    path, _ = written(codes, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    assert model.opset_import[0].version == 23
    name = next(node.output[0] for node in model.graph.node if node.name.endswith(".dequantize_weight"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [80, 24]))
    x = np.random.default_rng(2).standard_normal((3, 80)).astype(np.float32)
    product, weight = ReferenceEvaluator(model).run(None, {"x": x})  # type: ignore[misc]
    assert weight.T.tobytes() == codes.dequantize().tobytes()
    np.testing.assert_allclose(product, x @ codes.dequantize().T, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_torchs_product_is_that_of_what_codes_decode_to(compute: str, tmp_path: Path) -> None:
    codes = codes_of(hard_weight())
    path, spec = written(codes, tmp_path)
    x = np.random.default_rng(2).standard_normal((9, 80)).astype(np.float32)
    x[-1] = 0
    expected = x.astype(np.float64) @ codes.dequantize().T
    got = np.asarray(torch_cuda.open_stage(path, spec, {"device": "cpu", "compute": compute})({"x": x}, ("y",))["y"])
    # What leaves a stage stays float32.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not got[-1].any()


def test_an_input_factor_and_a_bias_go_with_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = OneLayer(hard_weight(), SCHEME)
    ((name, _),) = detector.codes.items()
    factor = np.exp(np.linspace(-2, 2, 80)).astype(np.float32)
    codes = dataclasses.replace(codes_of(hard_weight() / factor), input_factor=factor)
    detector.codes[name] = codes
    path, graph = written_layer(detector, (24, 80), tmp_path, monkeypatch, "b200-cuda")
    ((_, decoded),) = decoded_weights(path)
    assert decoded.tobytes() == codes.dequantize().tobytes()
    assert count_operators(lower(read_graph(path), torch.float32)) == {"Mul": 1, "Fp4Linear": 1}
    x = np.random.default_rng(2).standard_normal((9, 80)).astype(np.float32)
    got = np.asarray(torch_cuda.open_stage(path, graph.spec, {"device": "cpu"})({"x": x}, ("y",))["y"])
    np.testing.assert_allclose(got, x.astype(np.float64) @ decoded.T + np.arange(24), rtol=1e-4, atol=1e-4)


def test_on_the_device_codes_stay_packed(tmp_path: Path) -> None:
    codes = codes_of(np.random.default_rng(0).standard_normal((320, 640)).astype(np.float32))
    path, _ = written(codes, tmp_path)
    graph = lower(read_graph(path), torch.bfloat16)
    assert count_operators(graph) == {"Fp4Linear": 1}
    torch_cuda.check_codes(path, graph, (8, 0))  # its scales are FP8, but nothing multiplies them by FP8
    program = Program(graph, torch.device("cpu"))
    stored = {**program._resident, **program.graph.constants}
    assert sum(tensor.nbytes for tensor in stored.values()) == 320 * 640 * 9 // 16 + 4
    (node,) = graph.nodes
    packed, steps, whole = (stored[name] for name in node.inputs[1:])
    assert widen_fp4(packed, steps, whole).T.contiguous().numpy().tobytes() == codes.dequantize().tobytes()


def test_packed_codes_are_half_bytes_in_their_order() -> None:
    numbers = torch.tensor(e2m1_numbers()).reshape(16, 1)
    packed = pack_fp4(numbers)
    assert packed.flatten().tolist() == [low | (high << 4) for low, high in zip(range(0, 16, 2), range(1, 16, 2))]
    one = widen_fp4(packed, torch.tensor([[0x38]], dtype=torch.uint8), torch.tensor(1.0))
    assert one.numpy().tobytes() == numbers.numpy().tobytes()


def test_onnx_runtime_says_what_runs_it(tmp_path: Path) -> None:
    path, spec = written(codes_of(hard_weight()), tmp_path)
    with pytest.raises(BuildError, match=r"has no operator for its codes here .*run by torch: without --backend, or"):
        onnx_runtime.open_stage(path, spec, {})


@pytest.mark.parametrize(("name", "words"), [("h200", "opset 23, and it reads up to 21"), ("b200-cuda", "")])
def test_a_parser_that_reads_no_fp4_is_noticed(name: str, words: str, tmp_path: Path) -> None:
    path, _ = written(codes_of(hard_weight()), tmp_path)
    limits = load_target(name).graph
    assert limits is not None
    if not words:
        check_accepted(path, limits, name)
        return
    with pytest.raises(PassError, match=rf"(?s){words}.*blocks of 16, and it reads 64, 128"):
        check_accepted(path, limits, name)


def test_scales_must_be_above_zero_also_where_they_are_codes(tmp_path: Path) -> None:
    limits = load_target("b200-cuda").graph
    assert limits is not None
    codes = codes_of(hard_weight())
    path, _ = written(dataclasses.replace(codes, scale=-codes.scale), tmp_path)
    with pytest.raises(PassError, match=r"dequantize_weight: a scale that is not above 0"):
        check_accepted(path, limits, "b200-cuda")


@pytest.mark.parametrize("target", ["h200", "cpu", "x86-openvino", "agx-orin-64gb"])
def test_targets_without_it_refuse_the_recipe(target: str) -> None:
    recipe = load_recipe(RECIPE)
    config = load_detector("reference").config
    with pytest.raises(PassError, match=rf"nvfp4-g16 \(\*\) cannot run on target {target}, which runs float"):
        recipe.passes[0].check(config, load_target(target))


@pytest.mark.parametrize("wide", ["float16", "float32"])
def test_relaxed_it_is_the_same_weight_without_codes(wide: str, tmp_path: Path) -> None:
    codes = codes_of(hard_weight())
    path, _ = written(codes, tmp_path)
    (tmp_path / "relaxed").mkdir()
    inner = ir.load(relax_graph(path, tmp_path / "relaxed", wide)).graph  # type: ignore[arg-type]
    assert not [node for node in inner if node.op_type == "DequantizeLinear"]
    (weight,) = [value for name, value in inner.initializers.items() if name.endswith(".decoded")]
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), codes.dequantize().T.astype(wide))


@pytest.mark.parametrize(("sm", "refused"), [("SM120", ""), ("SM89", "Cannot compile for target(s) sm89")])
def test_tensorrt_for_rtx_builds_it_for_blackwell_alone(sm: str, refused: str, tmp_path: Path) -> None:
    """In engines codes stay of four bits."""
    path, _ = written(codes_of(np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)), tmp_path)
    built = build_engine(EngineJob(path, None, ({"rows": (1, 8, 64)},), 256, LIBRARY, sm), lambda what, share: None)
    if refused:
        assert refused in built.refused[0] and "fp4_e2m1" in built.refused[0]
    else:
        assert not built.refused and 2048 * 2048 * 9 // 16 < built.bytes < 2048 * 2048


@pytest.mark.parametrize(("backend", "sm", "least"), [("tensor_rt", "90", 100), ("torch_cuda", "75", 80)])
def test_a_target_without_it_in_its_gpu_is_refused(backend: str, sm: str, least: int, tmp_path: Path) -> None:
    data = yaml.safe_load(yaml_names("profiling/targets")["agx-thor"].read_text())
    data |= {"backend": backend}
    data["encodings"].pop("fp8-static")
    data["device"]["versions"]["sm"] = sm
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(
        ConfigError, match=rf"encodings\.nvfp4: dq_nvfp4 needs a GPU from SM {least} on, .* is {sm}; leave"
    ):
        load_target(str(file))


def test_its_work_is_counted(tmp_path: Path) -> None:
    path, _ = written(codes_of(np.ones((24, 96), np.float32)), tmp_path)
    work = count_file(path, {"x": (5, 96)}, ["y"])
    assert work.total == 2 * 5 * 96 * 24 and not work.attention
    assert sum(work.weight_bytes.values()) == 24 * 96 // 2 + 24 * 6 + 4


IMAGE = Image.fromarray(sample_image())
# What the embedded detector's stages become.
FOUND = {
    "vision_encoder": {"Fp4Linear": 26, "Attention": 4},
    "language": {"Fp4Linear": 23, "Linear": 1, "RmsNorm": 8, "Attention": 3},
    "mask_encoder": {"Fp4Linear": 23, "Attention": 5},
    "mask_decoder": {"Linear": 44, "Attention": 7},
}


@pytest.fixture(scope="module")
def build(builds: Path) -> Path:
    return shared_build(builds, RECIPE)


@pytest.fixture(scope="module")
def calls(build: Path) -> list[Any]:
    return list(record_calls(open_build(build), IMAGE, gate=0.0))


@pytest.mark.parametrize("stage", STAGES)
def test_every_product_with_codes_is_found(stage: str, build: Path) -> None:
    found = count_operators(lower(read_graph(build / f"{stage}.onnx"), torch.bfloat16))
    assert {name: found[name] for name in ("Fp4Linear", "Linear", "RmsNorm", "Attention") if found[name]} == FOUND[
        stage
    ]
    assert not {"DequantizeLinear", "Softmax"} & set(found)
    assert found["MatMul"] == (stage == "mask_decoder")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_give_what_onnx_runtime_gives_of_the_decoded_weights(
    stage: str, build: Path, calls: list[Any], tmp_path: Path
) -> None:
    """ONNX Runtime gets the same stage without codes, its weights decoded."""
    spec = open_build(build).manifest.spec(stage)
    theirs = onnx_runtime.open_stage(relax_graph(build / f"{stage}.onnx", tmp_path, "float32"), spec, {"threads": 1})
    own = [call for call in calls if call.stage == stage]
    assert own
    for call in own:
        given = {name: np.asarray(array) for name, array in call.tensors.items()}
        for name, expected in theirs(given, call.outputs).items():
            difference = np.linalg.norm(np.asarray(call.results[name], np.float64) - expected)
            assert difference <= 1e-4 * np.linalg.norm(expected.astype(np.float64)), name


@pytest.mark.parametrize("stage", ["vision_encoder", "language", "mask_encoder"])
def test_no_step_reads_the_device(stage: str, build: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no numbers; a graph of CUDA could not wait for one either."""
    monkeypatch.setattr(program_module, "TABLE", {**program_module.TABLE, "Attention": Operator(fused_attention)})
    meta, call = torch.device("meta"), next(call for call in calls if call.stage == stage)
    graph = lower(read_graph(build / f"{stage}.onnx"), torch.bfloat16)
    inputs = {name: torch.from_numpy(np.array(array)).to(meta) for name, array in call.tensors.items()}
    specialized, first = Program(graph, meta).specialize(inputs, call.outputs)
    assert specialized.capturable and first
    assert all(tensor.shape == call.results[name].shape for name, tensor in specialized.run(inputs).items())


@pytest.mark.ci
def test_tensorrt_for_rtx_builds_every_stage_for_blackwell(tmp_path: Path) -> None:
    done = defaker_opt("quantize", "--recipe", RECIPE, "--target", "agx-thor", "--output", tmp_path / "build")
    assert done.returncode == 0, done.stderr
    build = open_build(tmp_path / "build")
    assert capabilities_of(build) == ("SM120",)
    rows = check_graphs(build, capabilities_of(build), 256, build_engine, lambda what, share: None)
    assert [(row["stage"], row["refused"]) for row in rows] == [(stage, []) for stage in STAGES]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_torch_runs_it_on_the_cpu_in_float32(build: Path, float_build: Path) -> None:
    opened = open_build(build)
    assert opened.manifest.data["target"]["backend"] == backend_of(opened) == "torch_cuda"
    session = open_session(opened)
    assert session.options()["device"] == "cpu" and session.options()["compute"] == "float32"
    # Who asks for the backend means the GPU.
    assert "device" not in open_session(opened, choice=Choice("torch_cuda")).options()
    ours, exact = session.judge(IMAGE, gate=0.0), open_session(open_build(float_build)).judge(IMAGE, gate=0.0)
    assert abs(ours.fake_probability - exact.fake_probability) < 0.05
    assert ours.mask is not None and exact.mask is not None
    assert (ours.mask == exact.mask).mean() > 0.98


def test_engines_that_are_not_made_are_stood_in_for_too(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_build(build)
    monkeypatch.setitem(opened.manifest.data["target"], "backend", "tensor_rt")
    assert backend_of(opened) == "torch_cuda"
    assert open_session(opened).options()["device"] == "cpu"


def test_run_and_its_self_test_work_from_the_command_line(build: Path, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "photo.png")
    for arguments in (("--self-test",), (tmp_path / "photo.png", "--json")):
        done = defaker_opt("run", build, *arguments)
        assert done.returncode == 0, done.stderr
    refused = defaker_opt("run", build, tmp_path / "photo.png", "--backend", "onnx_runtime")
    assert refused.returncode == 2
    assert "has no operator for its codes here" in refused.stderr


def test_the_file_is_as_large_as_foreseen(build: Path) -> None:
    preview = preview_job(plan_job(load_recipe(RECIPE), load_target("b200-cuda"), "reference"), build)
    stages = open_build(build).manifest.data["stages"]
    for stage, entry in stages.items():
        assert preview["stages"][stage]["predicted_bytes"] == pytest.approx(entry["bytes"], rel=0.12), stage
