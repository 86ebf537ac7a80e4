"""NF4 and LLM.int8(): our codes against bitsandbytes' own, our graphs against it and against slow twins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from defaker_opt.errors import BuildError
from defaker_opt.graph.bitsandbytes import llm_int8_function, pack_nf4, unpack_nf4
from defaker_opt.graph.product import write_product
from defaker_opt.graph.write import decoded_weights
from defaker_opt.methods import NF4, QuantizedWeight, parse_scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.profiles.work import count_file
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.backends import Choice, OpenStage, onnx_runtime, torch_cuda
from defaker_opt.runtime.recording import record_calls
from defaker_opt.runtime.spec import STAGES, StageSpec
from defaker_opt.runtime.torch_graph import bitsandbytes as ours
from defaker_opt.runtime.torch_graph.graph import read_graph
from defaker_opt.runtime.torch_graph.program import Program, count_operators, lower
from defaker_opt.sample import sample_image
from tests.conftest import shared_build
from tests.reference.quantization import llm_int8_plain, nf4_numbers, token_product_plain

bitsandbytes = pytest.importorskip("bitsandbytes")

ENCODINGS = {"nf4": "matmul_bnb4", "int8-outlier": "llm_int8"}
RECIPES = ("bitsandbytes-nf4", "bitsandbytes-int8")


def codes_of(weight: np.ndarray, scheme: str) -> QuantizedWeight:
    parsed = parse_scheme(scheme)
    assert parsed is not None
    return RoundToNearest().quantize(weight, parsed)


def hard_weight(rows: int = 24, columns: int = 192) -> np.ndarray:
    """A row of zeros, one of a single number, tiny and huge ones, and some on the borders between codes."""
    weight = np.random.default_rng(3).standard_t(3, (rows, columns)).astype(np.float32)
    weight[1] = 0
    weight[2] = 0.25
    weight[3] *= 1e-30
    weight[4] *= 1e30
    weight[5, :15] = (NF4[1:] + NF4[:-1]) / 2
    weight[5, 15] = 1
    return weight


def hard_inputs(tokens: int, columns: int) -> np.ndarray:
    """Some columns with large inputs, inputs at the threshold, and a token of zeros."""
    x = np.random.default_rng(4).standard_normal((tokens, columns)).astype(np.float32)
    x[:, 7] *= 20
    x[tokens // 2, 11] = ours.THRESHOLD
    x[tokens // 3, 13] = -ours.THRESHOLD
    x[0, 17] = np.nextafter(np.float32(ours.THRESHOLD), np.float32(0))
    x[-1] = 0
    return x


def written(codes: QuantizedWeight, folder: Path) -> tuple[Path, StageSpec]:
    path = folder / "product.onnx"
    weight = np.zeros(codes.codes.shape, np.float32)
    return path, write_product(path, weight, codes, ENCODINGS)


def both(path: Path, spec: StageSpec) -> tuple[OpenStage, OpenStage]:
    """The same file by ONNX Runtime, and by bitsandbytes."""
    return onnx_runtime.open_stage(path, spec, {}), torch_cuda.open_stage(path, spec, {"device": "cpu"})


def test_the_table_is_the_published_one() -> None:
    np.testing.assert_allclose(NF4, nf4_numbers(), atol=2e-7)
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu", blocksize=64)
    # theirs has FP4's and others' places behind; compare what it decodes to
    np.testing.assert_array_equal(np.sort(np.unique(table.numpy())), NF4)


@settings(max_examples=30, deadline=None)
@given(weight=arrays(np.float32, st.tuples(st.integers(1, 3), st.just(128)), elements=st.floats(-1e4, 1e4, width=32)))
def test_nf4_codes_are_those_of_bitsandbytes_but_on_borders(weight: np.ndarray) -> None:
    codes = codes_of(weight, "nf4-g64")
    packed, state = bitsandbytes.functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    largest = np.where(codes.scale == 1, np.abs(weight).reshape(-1, 2, 64).max(-1), codes.scale)
    np.testing.assert_array_equal(state.absmax.numpy().reshape(largest.shape), largest)
    theirs = unpack_nf4(packed.numpy().reshape(-1)).reshape(weight.shape)
    apart = np.flatnonzero(theirs != codes.codes)
    # They multiply by a reciprocal where we divide; what that moves over a border lay on it.
    ratio = (weight / np.repeat(codes.scale, 64, axis=1)).reshape(-1)[apart]
    borders = (NF4[1:] + NF4[:-1]) / 2
    assert all(np.abs(borders - each).min() < 1e-6 for each in ratio)


def test_nf4_bytes_are_those_of_bitsandbytes() -> None:
    weight = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    packed, _ = bitsandbytes.functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    codes = codes_of(weight, "nf4-g64").codes
    assert pack_nf4(codes).tobytes() == packed.numpy().tobytes()
    np.testing.assert_array_equal(unpack_nf4(pack_nf4(codes)).reshape(codes.shape), codes)


@pytest.mark.parametrize("size", [32, 64])
def test_nf4_products_are_those_of_what_codes_decode_to(size: int, tmp_path: Path) -> None:
    codes = codes_of(hard_weight(columns=160 if size == 32 else 192), "nf4-g64" if size == 64 else "nf4-g32")
    path, spec = written(codes, tmp_path)
    ((_, decoded),) = decoded_weights(path)
    np.testing.assert_array_equal(decoded, codes.dequantize())
    x = hard_inputs(9, decoded.shape[1])
    expected = x.astype(np.float64) @ decoded.T
    for stage in both(path, spec):
        got = np.asarray(stage({"x": x}, ("y",))["y"])
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        rows = np.linalg.norm(expected, axis=0)  # rows of very different size each stand for themselves
        assert (np.linalg.norm(got - expected, axis=0) <= 1e-5 * rows + 1e-37).all()


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_llm_int8_keeps_columns_with_large_inputs(tokens: int, tmp_path: Path) -> None:
    weight = np.random.default_rng(5).standard_normal((24, 96)).astype(np.float32)
    weight[1] = 0
    codes = codes_of(weight, "int8-outlier")
    path, spec = written(codes, tmp_path)
    ((_, decoded),) = decoded_weights(path)
    np.testing.assert_array_equal(decoded, codes.dequantize())
    x = hard_inputs(tokens, 96)
    if tokens == 1:
        x[0, 20] = 50.0
    expected = llm_int8_plain(x, codes.codes, codes.scale[:, 0], ours.THRESHOLD)
    # Theirs divides by 16129 rounded to five digits.
    for stage, tolerance in zip(both(path, spec), (1e-5, 5e-5)):
        got = np.asarray(stage({"x": x}, ("y",))["y"])
        assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
        assert not got[-1].any() or tokens == 1
    # What it is for: where large inputs decide a token's scale, the others get few steps.
    exact = x.astype(np.float64) @ decoded.T
    by_token = token_product_plain(x, codes.codes, codes.scale[:, 0])
    assert tokens < 30 or np.linalg.norm(expected - exact) < 0.6 * np.linalg.norm(by_token - exact)


def test_columns_are_those_of_all_pictures_of_a_call(tmp_path: Path) -> None:
    """Inputs of any rank: an outlier in one picture makes its column a float one in all."""
    codes = codes_of(np.random.default_rng(5).standard_normal((8, 32)).astype(np.float32), "int8-outlier")
    path, _ = written(codes, tmp_path)
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        for _ in range(2):
            value.type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_param=f"more{_}"))
    x = hard_inputs(12, 32)
    flat = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    (got,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.reshape(2, 3, 2, 32)})
    np.testing.assert_array_equal(got.reshape(flat.shape), flat)


def test_what_the_operator_means_is_valid_onnx(tmp_path: Path) -> None:
    path, _ = written(codes_of(hard_weight(), "int8-outlier"), tmp_path)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [function.name for function in model.functions] == ["LlmInt8"]


@pytest.fixture(scope="module")
def calls(float_build: Path) -> Mapping[str, Any]:
    """The first call of each stage for a picture."""
    found: dict[str, Any] = {}
    for call in record_calls(open_build(float_build), Image.fromarray(sample_image()), gate=0.0):
        found.setdefault(call.stage, call)
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_is_the_same_by_bitsandbytes(
    recipe: str, stage: str, builds: Path, calls: Mapping[str, Any]
) -> None:
    build = open_build(shared_build(builds, recipe))
    file, spec = build.folder / f"{stage}.onnx", build.manifest.spec(stage)
    names = tuple(tensor.name for tensor in spec.outputs)
    theirs, own = (each(calls[stage].tensors, names) for each in both(file, spec))
    for name in names:
        expected, got = np.asarray(theirs[name]).astype(np.float64), np.asarray(own[name]).astype(np.float64)
        # Codes next to an edge may fall on the other side of it, and later layers see that.
        assert np.linalg.norm(got - expected) <= 0.01 * np.linalg.norm(expected) + 1e-30, name


def test_layers_become_those_of_bitsandbytes(builds: Path) -> None:
    counts = {}
    for recipe in RECIPES:
        graph = lower(read_graph(shared_build(builds, recipe) / "language.onnx"), torch.float32)
        found = count_operators(graph)
        counts[recipe] = found["Nf4Linear"], found["OutlierLinear"], found["Linear"]
    assert counts == {"bitsandbytes-nf4": (23, 0, 1), "bitsandbytes-int8": (0, 23, 1)}


def test_what_depends_on_pictures_is_not_captured(builds: Path, calls: Mapping[str, Any]) -> None:
    capturable = {}
    for recipe in RECIPES:
        graph = lower(read_graph(shared_build(builds, recipe) / "vision_encoder.onnx"), torch.float32)
        inputs = {name: torch.from_numpy(np.array(array)) for name, array in calls["vision_encoder"].tensors.items()}
        program = Program(graph, torch.device("cpu")).specialize(inputs, graph.outputs)[0]
        capturable[recipe] = program.capturable
    assert capturable == {"bitsandbytes-nf4": True, "bitsandbytes-int8": False}


def test_without_the_library_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, spec = written(codes_of(hard_weight(), "nf4-g64"), tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BuildError, match=r"by bitsandbytes, which cannot be imported .*pip install 'defaker-opt\[bits"):
        torch_cuda.open_stage(path, spec, {"device": "cpu"})


def test_importing_it_fetches_nothing_and_says_nothing(tmp_path: Path) -> None:
    """With the package `kernels` there, bitsandbytes would fetch code from a hub; without it, it complains."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*given, **named):\n    raise SystemExit('it asked the hub')\n")
    code = (
        "from defaker_opt.runtime.torch_graph import bitsandbytes as ours; ours._import_library(); "
        "import sys, bitsandbytes, kernels; print(kernels.__file__)"
    )
    path = os.pathsep.join([str(tmp_path), *(each for each in [os.environ.get("PYTHONPATH")] if each)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "kernels.py")]
    assert done.stderr == ""


def test_what_float16_cannot_hold_is_cut_off() -> None:
    x = torch.tensor([7e4, -1e30, 3.0])
    assert ours.narrowed(x, torch.float16).tolist() == [65504.0, -65504.0, 3.0]


def test_llm_int8_codes_are_those_of_bitsandbytes_but_on_borders() -> None:
    weight = np.random.default_rng(6).standard_normal((64, 512)).astype(np.float32)
    codes = codes_of(weight, "int8-outlier")
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(torch.from_numpy(weight))
    np.testing.assert_allclose(largest.numpy() / 127, codes.scale[:, 0], rtol=1e-6)
    apart = np.flatnonzero(theirs.numpy() != codes.codes)
    steps = (weight / codes.scale).reshape(-1)[apart]
    assert all(abs(abs(step) % 1 - 0.5) < 1e-4 for step in steps)


def test_in_a_newer_opset_it_is_still_inlined_and_counted(tmp_path: Path) -> None:
    """A stage with codes of engines beside them is of opset 21."""
    weight = np.ones((8, 64), np.float32)
    path, _ = written(codes_of(weight, "int8-outlier"), tmp_path)
    model = onnx.load(str(path))
    assert {each.domain: each.version for each in model.functions[0].opset_import}[""] == model.opset_import[0].version
    assert llm_int8_function(21).opset_imports == {"": 21}
    assert count_file(path, {"x": (5, 64)}, ["y"]).operations["int8"] == 2 * 5 * 64 * 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_verdicts_are_the_same_with_and_without_the_library(recipe: str, builds: Path, float_build: Path) -> None:
    image = Image.fromarray(sample_image())
    build = open_build(shared_build(builds, recipe))
    choices = (Choice("onnx_runtime"), Choice("torch_cuda", {"device": "cpu"}))
    plain, own = (open_session(build, choice=choice).judge(image, gate=0.0) for choice in choices)
    exact = open_session(open_build(float_build)).judge(image, gate=0.0)
    assert np.abs(own.verdict_logits - plain.verdict_logits).max() < 0.05
    assert np.abs(own.verdict_logits - exact.verdict_logits).max() < 0.5
    assert plain.mask is not None and own.mask is not None
    assert (plain.mask == own.mask).mean() > 0.995
