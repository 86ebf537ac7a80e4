"""Stages as lists of torch calls: each call gives what ONNX Runtime gives there, and the patterns are really found.

ONNX Runtime on a CPU runs products of float16 in float32, so attention and weights of 4 bits are compared in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from defaker_opt.compiling.check import RecordingSession, judge_picture
from defaker_opt.errors import BuildError
from defaker_opt.runtime import open_build
from defaker_opt.runtime.backends import Choice
from defaker_opt.runtime.spec import STAGES
from defaker_opt.runtime.torch_graph import products, program
from defaker_opt.runtime.torch_graph.capture import Captured
from defaker_opt.runtime.torch_graph.graph import Graph, Node, read_graph
from defaker_opt.runtime.torch_graph.operators import Operator
from defaker_opt.runtime.torch_graph.products import attention, fused_attention, settle_mask
from defaker_opt.runtime.torch_graph.program import Program, count_operators, lower
from tests.conftest import shared_build

# The last two differ from the others in products of codes only.
RECIPES = (
    "datacenter-fp8",
    "float32",
    pytest.param("datacenter-int8", marks=pytest.mark.slow),
    pytest.param("jetson-int4", marks=pytest.mark.slow),
)
CPU = torch.device("cpu")

# Type of codes in ONNX Runtime's values that numpy has no name for.
_FP8 = TensorProto.FLOAT8E4M3FN

# What the embedded detector's stages become; a rewrite that stops matching changes a number.
_ENCODERS = {
    "vision_encoder": {"NormQuantize": 9, "QuantizedLinear": 21, "LinearGeluQuantize": 5, "Attention": 4},
    "mask_encoder": {"NormQuantize": 6, "QuantizedLinear": 18, "LinearGeluQuantize": 5, "Attention": 5},
    "mask_decoder": {"Linear": 44, "Attention": 7},
}
_STATIC = {
    **_ENCODERS,
    "language": {
        "NormQuantize": 7,
        "RmsNorm": 1,
        "QuantizedLinear": 23,
        "GateQuantize": 3,
        "Attention": 3,
        "Linear": 1,
    },
}
FOUND: dict[str, Mapping[str, Mapping[str, int]]] = {
    "datacenter-fp8": _STATIC,
    "datacenter-int8": _STATIC,
    "jetson-int4": {**_ENCODERS, "language": {"BlockLinear": 23, "RmsNorm": 8, "Attention": 3, "Linear": 1}},
    "float32": {
        "vision_encoder": {"Linear": 26, "Attention": 4},
        "language": {"Linear": 24, "RmsNorm": 8, "Attention": 3},
        "mask_encoder": {"Linear": 23, "Attention": 5},
        "mask_decoder": {"Linear": 44, "Attention": 7},
    },
}

# Never left over where its pattern is in the place of it; a MatMul is the mask's, of two activations.
_GONE = ("DequantizeLinear", "Softmax", "Pow", "ReduceMean", "Reciprocal")


@functools.cache
def _calls(build: Path) -> list[Any]:
    session = RecordingSession(open_build(build), 1, Choice("onnx_runtime"))
    judge_picture(session)
    return session.calls


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_patterns_are_found(recipe: str, stage: str, builds: Path) -> None:
    found = count_operators(lower(read_graph(shared_build(builds, recipe) / f"{stage}.onnx"), torch.float32))
    named = ("NormQuantize", "RmsNorm", "QuantizedLinear", "BlockLinear", "LinearGeluQuantize", "GateQuantize")
    assert {name: found[name] for name in (*named, "Attention", "Linear") if found[name]} == FOUND[recipe][stage]
    assert not {name: found[name] for name in _GONE if found[name]}
    assert found["MatMul"] == (stage == "mask_decoder")


def _theirs(file: Path, tensors: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    """Values inside a stage, as ONNX Runtime computes them with its basic optimizations."""
    model = onnx.load(str(file))
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in outputs)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array)) for name, array in tensors.items()}
    return {name: _tensor(value) for name, value in zip(names, session.run_with_ort_values(names, given))}


def _tensor(value: Any) -> torch.Tensor:
    array = value._ortvalue.numpy()
    if value.element_type() == _FP8:
        codes = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).view(torch.float8_e4m3fn)
        return codes.reshape(tuple(value.shape()))
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_step_gives_what_onnx_runtime_gives(recipe: str, stage: str, builds: Path) -> None:
    """Every step is given what ONNX Runtime computed before it, so that no difference hides in, or comes of, another.

    Sums of floats in another order differ by some 1e-6, by 2e-5 where they cancel (ours of int8 codes are exact). Codes
    differ where such a sum, or the error function of GELU and the exponential of SiLU in another library, falls on the
    other side of an edge: some 30 of 10⁵, most where GELU is all but 0 and the error function cancels.
    """
    build = shared_build(builds, recipe)
    file = build / f"{stage}.onnx"
    graph = lower(read_graph(file), torch.float32)
    for call in [call for call in _calls(build) if call.stage == stage][:3]:
        inputs = {name: torch.from_numpy(np.array(array)) for name, array in call.tensors.items()}
        steps = Program(graph, CPU).specialize(inputs, graph.outputs)[0].steps
        values = {**inputs, **_theirs(file, call.tensors, [step.node.output for step in steps])}
        for step in steps:
            given = {name: values[name] for name in step.arguments if isinstance(name, str)}
            dataclasses.replace(step, done=()).run_(given)
            _assert_close(step.node.name, given[step.node.output], values[step.node.output])


def _assert_close(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, name
    if theirs.dtype in (torch.int8, torch.float8_e4m3fn):
        assert ours.dtype == theirs.dtype, name
        unequal = ours.float() != theirs.float()
        assert unequal.sum() <= 2 + 5e-4 * unequal.numel(), name
        # Codes in order: FP8 without its sign is ordered as its bytes are.
        apart = (ours[unequal].view(torch.int8).int() - theirs[unequal].view(torch.int8).int()).abs()
        assert not len(apart) or apart.max() <= 1, name
    elif theirs.is_floating_point():
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
        assert difference < 1e-4, f"{name}: {difference}"
    else:
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_float_stage_is_the_same_from_end_to_end(stage: str, float_build: Path) -> None:
    graph = lower(read_graph(float_build / f"{stage}.onnx"), torch.float32)
    call = next(call for call in _calls(float_build) if call.stage == stage)
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in call.tensors.items()}
    specialized, first = Program(graph, CPU).specialize(inputs, graph.outputs)
    again = specialized.run(inputs)
    expected = _theirs(float_build / f"{stage}.onnx", call.tensors, list(graph.outputs))
    assert {*first, *specialized.known} == set(expected)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    for name, tensor in specialized.known.items():
        assert torch.equal(tensor, expected[name])


def test_what_depends_on_sizes_alone_is_not_run_again(float_build: Path) -> None:
    graph = lower(read_graph(float_build / "language.onnx"), torch.float32)
    call = [call for call in _calls(float_build) if call.stage == "language"][1]
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in call.tensors.items()}
    steps = Program(graph, CPU).specialize(inputs, graph.outputs)[0].steps
    left = {step.node.operator for step in steps}
    assert not left & {"Shape", "Range", "LessOrEqual", "Where", "Squeeze"}
    masks = [step.node.attributes["mask"] for step in steps if step.node.operator == "Attention"]
    # The last layer computes its last row only, which sees everything.
    assert masks == ["causal", "causal", "none"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_an_output_comes_from_is_float32(recipe: str, stage: str, builds: Path) -> None:
    """Attention's values are the one exception, which are a layer's result in another order."""
    file = shared_build(builds, recipe) / f"{stage}.onnx"
    narrow, wide = (lower(read_graph(file), compute) for compute in (torch.bfloat16, torch.float32))
    made = {name: narrow.producers[name].attributes.get("compute") for name in narrow.outputs}
    layers = {name for name, kind in made.items() if kind is not None}
    assert layers == {"vision_encoder": {"vision_tokens"}, "language": {"verdict_logits", "seg_embedding"}}.get(
        stage, set()
    )
    assert {made[name] for name in layers} <= {torch.float32}
    assert torch.bfloat16 in {node.attributes.get("compute") for node in narrow.nodes}
    assert count_operators(narrow) == count_operators(wide)
    call = next(call for call in _calls(shared_build(builds, recipe)) if call.stage == stage)
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in call.tensors.items()}
    _, results = Program(narrow, CPU).specialize(inputs, call.outputs)
    narrowed = {name for name, tensor in results.items() if tensor.dtype == torch.bfloat16}
    assert narrowed == {name for name in results if name.startswith("present_value_")}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (3, 9), (1, 7)])
def test_a_causal_mask_is_known_by_its_numbers(rows: int, columns: int) -> None:
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    mask = torch.zeros(1, 1, rows, columns).masked_fill(hidden, torch.finfo(torch.float32).min)
    assert settle_mask({}, mask)[0]["mask"] == ("causal" if hidden.any() else "none")
    soft = mask.clone()
    soft[..., -1, 0] = -1.0
    attributes, kept = settle_mask({}, soft)
    assert attributes["mask"] == "given" and kept is soft


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["none", "causal", "given"])
def test_fused_attention_is_attention(form: str, kind: torch.dtype) -> None:
    """The form that runs on CUDA, here by the same call on the CPU; float16 and bfloat16 have 11 and 8 bits."""
    torch.manual_seed(0)
    query, value = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 9, 16)
    key = torch.randn(2, 3, 9, 16).transpose(-1, -2)
    mask = torch.randn(1, 1, 5, 9) if form == "given" else None
    attributes = {"scale": 0.25, "type": kind, "mask": form}
    expected = attention(attributes, query, key, value, mask)
    got = fused_attention(attributes, query, key, value, mask)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[kind]
    assert got.dtype == kind
    assert (got.float() - expected).norm() / expected.norm() < tolerance


def _one_node(operator: str) -> Graph:
    return Graph((Node(operator, "stage/odd_1", ("x",), "y"),), {}, ("x",), ("y",))


def test_an_unknown_operator_is_named_with_its_node() -> None:
    with pytest.raises(BuildError, match=r"stage/odd_1: .* does not run Einsum; it runs Add, .*make the build for"):
        lower(_one_node("Einsum"), torch.float32)


def test_a_size_that_depends_on_the_picture_is_refused() -> None:
    nodes = (Node("Neg", "stage/neg", ("n",), "m"), Node("Reshape", "stage/reshape", ("x", "m"), "y"))
    unknown = Program(lower(Graph(nodes, {}, ("x", "n"), ("y",)), torch.float32), CPU)
    with pytest.raises(BuildError, match="stage/reshape: m depends on the picture, and Reshape needs it"):
        unknown.specialize({"x": torch.zeros(2), "n": torch.tensor([-2])}, ("y",))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "language.onnx"
    file.write_bytes(b"\xff\xff\xff")
    with pytest.raises(BuildError, match=r"language\.onnx: onnx .* cannot read it"):
        read_graph(file)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_reads_the_device(recipe: str, stage: str, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no numbers: reading one, or mixing it with the host's, is an error."""
    monkeypatch.setattr(program, "TABLE", {**program.TABLE, "Attention": Operator(fused_attention)})
    build, meta = shared_build(builds, recipe), torch.device("meta")
    for compute in (torch.float32, torch.bfloat16):
        graph = lower(read_graph(build / f"{stage}.onnx"), compute)
        for call in [call for call in _calls(build) if call.stage == stage]:
            inputs = {name: torch.from_numpy(np.array(array)).to(meta) for name, array in call.tensors.items()}
            specialized, first = Program(graph, meta).specialize(inputs, call.outputs)
            again = specialized.run(inputs)
            shapes = {name: tensor.shape for name, tensor in again.items()}
            assert shapes == {name: tensor.shape for name, tensor in first.items()}
            # A session takes key/values out of what it is given.
            assert all(shapes.get(name, array.shape) == array.shape for name, array in call.results.items())


def test_products_are_called_as_cuda_wants_them() -> None:
    """Torch's own checks of types, sizes and strides, on tensors without numbers that say they lie on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    products._kept_ones.cache_clear()
    with FakeTensorMode():
        scale, bias = torch.empty(41, device="cuda"), torch.empty(41, device="cuda")
        for kind in (torch.int8, torch.float8_e4m3fn):
            for rows, inner in ((1, 192), (5, 40), (33, 1024)):
                codes = torch.empty(2, rows, inner, device="cuda", dtype=kind)
                weight = torch.empty(41, inner, device="cuda", dtype=kind)
                for compute in (torch.float32, torch.bfloat16):
                    got, due, _ = products.multiply_codes({"compute": compute}, codes, weight, scale, bias)
                    assert got.is_cuda and got.shape == (2, rows, 41)
                    assert (due is None) == (kind != torch.int8 and compute == torch.bfloat16)
    products._kept_ones.cache_clear()


class _FakeCuda:
    """Stands for torch's streams and graphs: a replay runs the program on the buffers again."""

    def __init__(self, run: Any) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


def test_a_captured_program_copies_inputs_in_and_results_out(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lower(Graph((Node("Neg", "neg", ("x",), "y"),), {}, ("x",), ("y",)), torch.float32)
    specialized, _ = Program(graph, CPU).specialize({"x": torch.ones(3)}, ("y",))

    def again() -> None:
        for name, tensor in specialized.run(captured._inputs).items():
            captured._outputs[name].copy_(tensor)

    fake = _FakeCuda(again)
    for name in ("Stream", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
    captured = Captured(specialized, {"x": torch.ones(3)}, pool=None)
    one = captured.run({"x": torch.tensor([1.0, 2.0, 3.0])})["y"]
    other = captured.run({"x": torch.tensor([4.0, 5.0, 6.0])})["y"]
    assert one.tolist() == [-1, -2, -3] and other.tolist() == [-4, -5, -6]
    assert fake.replays == 2
    assert torch.cuda.graph.call_args.kwargs["capture_error_mode"] == "thread_local"
