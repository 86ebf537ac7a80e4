"""Work counted from graphs: by hand on small ones, and by formula on the stages of builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from defaker_opt.detector import load_detector
from defaker_opt.graph.product import write_product
from defaker_opt.methods import Scheme, parse_scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.planning.formulas import language_counts, mask_encoder_counts, vision_counts
from defaker_opt.profiles.peaks import Peaks
from defaker_opt.profiles.roofline import floor_here, floor_on
from defaker_opt.profiles.work import Work, add_work, count_file, count_work
from defaker_opt.target import load_target


def graph(nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in nodes[-1].output]
    initial = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", made, outputs, initial), opset_imports=opsets, ir_version=10)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_product_with_a_weight() -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 16]}, {"w": floats(16, 8)})
    work = count_work(model, {"x": (5, 16)}, ["y"])
    assert work.operations == {"fp32": 2 * 5 * 16 * 8}
    assert work.attention == 0
    assert work.weight_bytes == {"fp32": 4 * 16 * 8}
    assert work.activation_bytes == 4 * (5 * 16 + 5 * 8)
    assert work.traffic_bytes == 4 * (5 * 16 + 16 * 8 + 5 * 8)


def test_a_product_of_activations_is_attention() -> None:
    model = graph([helper.make_node("MatMul", ["q", "k"], ["s"])], {"q": [2, "n", 4], "k": [2, 4, "m"]}, {})
    work = count_work(model, {"q": (2, 3, 4), "k": (2, 4, 7)}, ["s"])
    assert work.attention == work.total == 2 * 2 * 3 * 4 * 7


def test_gemm_counts_its_inner_size_whichever_way_it_lies() -> None:
    for trans, shape in ((0, (5, 16)), (1, (16, 5))):
        node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=trans, transB=1)
        work = count_work(graph([node], {"x": list(shape)}, {"w": floats(8, 16)}), {"x": shape}, ["y"])
        assert work.total == 2 * 5 * 16 * 8


def test_convolutions() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2)
    work = count_work(graph([conv], {"x": [1, 4, 8, 8]}, {"w": floats(6, 2, 2, 2)}), {"x": (1, 4, 8, 8)}, ["y"])
    assert work.total == 2 * (6 * 4 * 4) * (2 * 2 * 2)
    spread = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    work = count_work(graph([spread], {"x": [1, 4, 8, 8]}, {"w": floats(4, 3, 2, 2)}), {"x": (1, 4, 8, 8)}, ["y"])
    assert work.total == 2 * (4 * 8 * 8) * (3 * 2 * 2)


def test_what_nobody_reads_is_not_counted() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "v"], ["z"])]
    model = graph(nodes, {"x": [5, 16]}, {"w": floats(16, 8), "v": floats(8, 2)})
    assert count_work(model, {"x": (5, 16)}, ["y"]).weight_bytes == {"fp32": 4 * 16 * 8}
    assert count_work(model, {"x": (5, 16)}, ["z"]).total == 2 * 5 * 8 * (16 + 2)


def test_four_bit_products_cost_their_codes() -> None:
    given: dict[str, Any] = {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    blocked = helper.make_node("MatMulNBits", ["x", "w.codes", "w.scale"], ["y"], domain="com.microsoft", **given)
    then = helper.make_node("MatMul", ["y", "v"], ["z"])
    weights = {"w.codes": np.zeros((8, 2, 16), np.uint8), "w.scale": floats(16), "v": floats(8, 3)}
    work = count_work(graph([blocked, then], {"x": ["n", 64]}, weights), {"x": (5, 64)}, ["z"])
    assert work.operations == {"int4": 2 * 5 * 64 * 8, "fp32": 2 * 5 * 8 * 3}
    assert work.weight_bytes == {"int4": 8 * 2 * 16, "fp32": 4 * (16 + 24)}


def test_nf4_is_read_as_four_bits_and_multiplied_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "product.onnx"
    scheme = parse_scheme("nf4-g64")
    assert scheme is not None
    codes = RoundToNearest().quantize(np.ones((8, 64), np.float32), scheme)
    write_product(path, floats(8, 64), codes, {"nf4": "matmul_bnb4"})
    work = count_file(path, {"x": (5, 64)}, ["y"])
    assert work.operations == {"fp32": 2 * 5 * 64 * 8}
    assert work.weight_bytes == {"int4": 8 * 64 / 2, "fp32": 4 * 8}
    assert work.attention == 0


def test_llm_int8_is_counted_as_both_its_products(tmp_path: Path) -> None:
    path = tmp_path / "product.onnx"
    codes = RoundToNearest().quantize(np.ones((8, 64), np.float32), Scheme(8, activations="outlier"))
    write_product(path, floats(8, 64), codes, {"int8-outlier": "llm_int8"})
    work = count_file(path, {"x": (5, 64)}, ["y"])
    assert work.operations == {"int8": 2 * 5 * 64 * 8, "fp32": 2 * 5 * 64 * 8}
    assert work.weight_bytes["int8"] == 8 * 64
    assert work.attention == 0


def test_calls_add_up() -> None:
    one = Work({"fp32": 2.0}, 1.0, {"int8": 3.0}, 4.0, 5.0)
    both = add_work([one, Work({"int8": 7.0}, 0.0, {"int8": 1.0}, 1.0, 1.0)])
    assert both == Work({"fp32": 2.0, "int8": 7.0}, 1.0, {"int8": 4.0}, 5.0, 6.0)
    assert both.total == 9
    assert both.least_bytes == 9


CONFIG = load_detector("reference").config


def test_the_vision_encoder_counts_as_its_formula(float_build: Path) -> None:
    size = CONFIG.tiling.tile_size
    work = count_file(float_build / "vision_encoder.onnx", {"tiles": (3, 3, size, size)}, ["vision_tokens"])
    expected = vision_counts(CONFIG, 3)
    assert work.total == pytest.approx(expected.total, rel=1e-3)
    assert work.attention == pytest.approx(expected.attention)


@pytest.mark.parametrize(("tokens", "past"), [(40, 0), (17, 300)])
def test_the_language_stage_counts_as_its_formula_less_its_last_layer(
    float_build: Path, tokens: int, past: int
) -> None:
    language = CONFIG.language
    shape = (1, language.kv_heads, past, language.head_dim)
    inputs: dict[str, Any] = {"inputs_embeds": (1, tokens, language.hidden_size), "position_ids": (1, tokens)}
    inputs |= {f"past_{name}_{layer}": shape for name in ("key", "value") for layer in range(language.layers)}
    outputs = ["verdict_logits", "seg_embedding", *(f"present_key_{layer}" for layer in range(language.layers))]
    work = count_file(float_build / "language.onnx", inputs, outputs)
    whole = language_counts(CONFIG, tokens, past)
    # The last layer asks, and multiplies on, for one row alone; keys and values it makes for all.
    width, inner = language.hidden_size, language.intermediate_size
    spared = 2 * (tokens - 1) * (2 * width**2 + 3 * width * inner) + 4 * (tokens - 1) * (past + tokens) * width
    assert work.total == pytest.approx(whole.total - spared, rel=0.01)


def test_the_mask_encoder_counts_as_its_formula(float_build: Path) -> None:
    size = CONFIG.segmenter.image_size
    outputs = ["image_embed", "high_res_0", "high_res_1"]
    work = count_file(float_build / "mask_encoder.onnx", {"image": (1, 3, size, size)}, outputs)
    expected = mask_encoder_counts(CONFIG)
    assert work.total == pytest.approx(expected.total, rel=0.01)
    assert work.attention == pytest.approx(expected.attention, rel=0.01)


def test_quantized_stages_do_the_same_operations_in_other_formats(int8_build: Path, float_build: Path) -> None:
    size = CONFIG.tiling.tile_size
    given = {"tiles": (1, 3, size, size)}
    eight, full = (count_file(b / "vision_encoder.onnx", given, ["vision_tokens"]) for b in (int8_build, float_build))
    assert eight.total == pytest.approx(full.total)
    assert eight.attention == full.attention
    assert set(eight.operations) == {"fp32", "int8"}
    assert eight.least_bytes < 0.5 * full.least_bytes  # a feed-forward net of four stays in float


def test_the_floor_is_what_takes_longer() -> None:
    work = Work({"fp32": 2e9, "int8": 4e9}, 0, {"fp32": 1e6}, 1e6, 0)
    floor = floor_here(work, Peaks({"fp32": 1e12, "int8": 4e12}, 1e9))
    assert floor.compute_ms == pytest.approx(3.0)
    assert floor.memory_ms == pytest.approx(2.0)
    assert (floor.ms, floor.bound) == (floor.compute_ms, "compute")
    assert floor_here(work, Peaks({"fp32": 1e13, "int8": 4e13}, 1e9)).bound == "memory"


def test_a_device_runs_floats_in_sixteen_bits() -> None:
    device = load_target("orin-nano-super-8gb").device
    assert device is not None
    work = Work({"fp32": 16.7e9, "int8": 33.4e9}, 0, {"fp32": 204e6, "int8": 102e6}, 0, 0)
    floor = floor_on(work, device)
    assert floor.compute_ms == pytest.approx(2.0)
    assert floor.memory_ms == pytest.approx(2.0)
