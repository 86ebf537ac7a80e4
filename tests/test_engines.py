"""Graphs for engines: what TensorRT reads of them, that they compute what the CPU's do, and what compiling makes of it.

No GPU is here: engines are built by TensorRT for RTX, which needs none, and "run" by ONNX Runtime on their graphs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from defaker_opt.compiling import Built, EngineJob
from defaker_opt.compiling.check import judge_picture
from defaker_opt.compiling.child import build_engine
from defaker_opt.compiling.compile import AS_BUILT, Hands, Settings, compile_build
from defaker_opt.compiling.gate import CAPABILITIES, capabilities_of, check_graphs
from defaker_opt.compiling.relax import product_kinds, relax_graph
from defaker_opt.compiling.shapes import Sizes, sizes_of, stage_ranges
from defaker_opt.errors import BuildError, PassError
from defaker_opt.graph.accepted import check_accepted
from defaker_opt.graph.write import decoded_weights
from defaker_opt.planning.fit import plan_recipe
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.backends import OpenStage, onnx_runtime
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.cuda import Gpu
from defaker_opt.runtime.engines import RECORD, backend_of, engines_folder
from defaker_opt.runtime.recording import RecordingSession
from defaker_opt.runtime.spec import STAGES, StageSpec
from defaker_opt.sample import sample_image
from defaker_opt.target import GraphLimits, load_target
from tests.conftest import defaker_opt, shared_build

RECIPES = ("jetson-int8", "jetson-int4", "datacenter-fp8")
IMAGE = Image.fromarray(sample_image())
GPU = Gpu("87", "12.6")
RTX = "tensorrt_rtx"


def quiet(what: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def int8_engines(builds: Path) -> Path:
    return shared_build(builds, "jetson-int8")


@pytest.mark.ci
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensorrt_builds_every_stage_for_every_gpu_that_can(recipe: str, builds: Path) -> None:
    build = open_build(shared_build(builds, recipe))
    assert capabilities_of(build) == (("SM89",) if "fp8" in recipe else CAPABILITIES)
    rows = check_graphs(build, capabilities_of(build)[-1:], 256, build_engine, quiet)
    assert [row["stage"] for row in rows] == list(STAGES)
    assert [row["refused"] for row in rows] == [[]] * 4
    assert all(row["tensorrt"].startswith("tensorrt_rtx 1.") for row in rows)
    planned = plan_recipe(recipe, None, None).forecast.engines
    assert sum(row["bytes"] for row in rows) == pytest.approx(sum(planned.values()), rel=0.03)


def test_fp8_is_refused_by_gpus_without_it_in_the_builders_words(builds: Path) -> None:
    done = defaker_opt("compile", shared_build(builds, "datacenter-fp8"), "--check", "--sm", "SM86", "--json")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert "a gate, not a proof" in answer["note"]
    refused = [row["refused"][0] for row in answer["engines"] if row["refused"]]
    assert answer["refused"] == len(refused) == 3
    assert all("Cannot compile for target(s) sm86" in words and "fp8" in words for words in refused)


def test_a_graph_that_is_none_is_refused_in_the_parsers_words(tmp_path: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape((2, 3)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name="codes")
    for value, kind in zip(node.outputs, (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)):
        value.type = ir.TensorType(kind)
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 20})
    path = tmp_path / "mine.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    built = build_engine(EngineJob(path, None, ({},), 64, RTX, "SM89"), quiet)
    assert built.bytes == 0
    assert "DynamicQuantizeLinear codes: " in built.refused[0]


def test_a_builder_that_dies_says_so(tmp_path: Path) -> None:
    job = EngineJob(tmp_path / "no.onnx", None, ({},), 64, RTX)
    assert "cannot be found" in build_engine(job, quiet).refused[0]
    words = r"(?s)mine.onnx: no engine was built; the builder ended with code 1:\n.*KeyError: 'tiles'"
    with pytest.raises(BuildError, match=words):
        bad = dataclasses.replace(job, graph=tmp_path / "mine.onnx")
        shutil.copy(_dynamic_graph(tmp_path), bad.graph)
        build_engine(dataclasses.replace(bad, profiles=({"other": (1, 1, 1)},)), quiet)


def _dynamic_graph(folder: Path) -> Path:
    x = ir.Value(name="x", shape=ir.Shape(("tiles", 3)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    path = folder / "dynamic.onnx"
    ir.save(ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10), path)
    return path


@pytest.mark.parametrize(("engine", "cpu"), [("jetson-int8", "int8-static")])
def test_engines_and_the_cpu_have_the_same_codes_and_verdicts(engine: str, cpu: str, builds: Path) -> None:
    first, second = (shared_build(builds, recipe) for recipe in (engine, cpu))
    for stage in STAGES:
        ours, theirs = (dict(decoded_weights(folder / f"{stage}.onnx")) for folder in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    verdicts = [open_session(open_build(folder)).judge(IMAGE, gate=0.0) for folder in (first, second)]
    assert abs(verdicts[0].fake_probability - verdicts[1].fake_probability) < 0.02
    assert verdicts[0].mask is not None and verdicts[1].mask is not None
    assert (verdicts[0].mask != verdicts[1].mask).mean() < 0.02


def test_codes_are_around_zero_and_biases_are_added(int8_engines: Path) -> None:
    for stage in ("vision_encoder", "language", "mask_encoder"):
        graph = ir.load(int8_engines / f"{stage}.onnx").graph
        kinds = {node.op_type for node in graph}
        assert {"QuantizeLinear", "DequantizeLinear"} < kinds
        for node in graph:
            if node.op_type == "QuantizeLinear":
                zero = node.inputs[2]
                assert zero is not None and zero.const_value is not None
                assert zero.const_value.numpy().dtype == np.int8 and zero.const_value.numpy() == 0
        check_accepted(int8_engines / f"{stage}.onnx", load_target("orin-nano-super-8gb").graph, "nano")  # type: ignore[arg-type]


def test_what_a_parser_does_not_read_is_all_said(int8_build: Path, tmp_path: Path) -> None:
    with pytest.raises(PassError) as error:
        check_accepted(int8_build / "language.onnx", GraphLimits(19, ("MatMul",)), "mine")
    words = str(error.value)
    assert "language: target mine does not read its graph:" in words
    assert "opset 20, and it reads up to 19" in words
    assert "operator MatMulInteger (language.layers.0." in words
    assert "quantize: a zero point other than 0" in words
    assert "defaker-opt show targets" in words


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", ["language", "vision_encoder"])
def test_a_stage_without_codes_multiplies_what_they_stood_for(
    recipe: str, stage: str, builds: Path, tmp_path: Path
) -> None:
    folder = shared_build(builds, recipe)
    graph = folder / f"{stage}.onnx"
    weights = dict(decoded_weights(graph))
    assert product_kinds(graph)
    for wide in ("float32", "float16"):
        (tmp_path / wide).mkdir()
        relaxed = relax_graph(graph, tmp_path / wide, wide)  # type: ignore[arg-type]
        assert not product_kinds(relaxed)
        halves = [node for node in ir.load(relaxed).graph if ".narrow" in (node.name or "")]
        assert bool(halves) == (wide == "float16")
        found = {
            name.removesuffix(".decoded"): value.const_value.numpy()
            for name, value in ir.load(relaxed).graph.initializers.items()
            if name.endswith(".decoded") and value.const_value is not None
        }
        assert found.keys() == weights.keys()
        for name, array in found.items():
            assert array.dtype == np.dtype(wide)
            np.testing.assert_array_equal(array, weights[name].T.astype(wide))
    spec = open_build(folder).manifest.spec(stage)
    session = RecordingSession(open_build(folder))
    judge_picture(session)
    calls = [call for call in session.calls if call.stage == stage]
    run = onnx_runtime.open_stage(tmp_path / "float32" / graph.name, spec, {})
    for call in calls:
        for name, expected in call.results.items():
            got = run(call.tensors, call.outputs)[name]
            assert np.linalg.norm(got - expected) <= 0.1 * np.linalg.norm(expected)


def hands(spoil: Callable[[Path, dict[str, Any]], None] = lambda path, results: None, **refuse: str) -> Hands:
    """Engines are copies of their graphs, run by ONNX Runtime. refuse: words by stage; spoil: changes results."""

    def build(job: EngineJob, progress: Any) -> Built:
        words = "" if job.graph.parent.name in ("float16", "float32") else refuse.get(job.graph.stem, "")
        if words == "dies":
            raise BuildError(f"{job.graph}: no engine was built; it was killed")
        assert job.output is not None
        if not words:
            place = job.output.parent.parent / f"{job.graph.stem}.{job.output.stem}"
            place.mkdir(exist_ok=True)
            for file in job.graph.parent.glob(f"{job.graph.name}*"):
                shutil.copy(file, place)
            job.output.write_text(str(place / job.graph.name))
        return Built(1000, 0.1, "tensorrt 10.3.0", (words,) if words else ())

    def open_engine(path: Path, spec: StageSpec) -> OpenStage:
        run = onnx_runtime.open_stage(Path(path.read_text()), spec, {"as_written": True})

        def call(tensors: Any, outputs: tuple[str, ...]) -> dict[str, Any]:
            results = run(tensors, outputs)
            spoil(path, results)
            return results

        return call

    def open_session(build: Build, engines: str) -> RecordingSession:
        session = RecordingSession(build)
        if engines:
            folder = engines_folder(build.folder)
            for stage, entry in json.loads((folder / engines).read_text())["stages"].items():
                session._open[stage] = open_engine(folder / entry["file"], build.manifest.spec(stage))
        return session

    return Hands("tensorrt 10.3.0", GPU, build, open_engine, open_session)


@pytest.fixture
def copied(int8_engines: Path, tmp_path: Path) -> Path:
    """A build that may be compiled."""
    return Path(shutil.copytree(int8_engines, tmp_path / "build"))


def test_engines_that_are_right_are_kept_with_what_they_were_made_on(copied: Path) -> None:
    build = open_build(copied)
    compiled = compile_build(build, Settings(64), hands(), quiet)
    record = json.loads((engines_folder(copied) / RECORD).read_text())
    assert compiled.folder == engines_folder(copied) == copied.with_name("build.engines")
    assert record["build"] == build.digest
    assert (record["tensorrt"], record["gpu"]) == ("tensorrt 10.3.0", {"sm": "87", "driver": "12.6"})
    assert {stage: entry["precision"] for stage, entry in record["stages"].items()} == dict.fromkeys(STAGES, AS_BUILT)
    assert all((compiled.folder / entry["file"]).is_file() for entry in record["stages"].values())
    assert record["agreement"]["mask_iou"] == 1 and record["agreement"]["seg_cosine"] == pytest.approx(1)
    assert compiled.self_test.passed
    assert backend_of(build) == "tensor_rt"


def test_a_refused_or_wrong_stage_is_made_without_codes_and_says_why(copied: Path) -> None:
    def spoil(path: Path, results: dict[str, Any]) -> None:
        if path.stem == AS_BUILT and "image_embed" in results:
            results["image_embed"] = results["image_embed"] * 1.5
        if path.stem in (AS_BUILT, "float16") and "vision_tokens" in results:
            results["vision_tokens"] = results["vision_tokens"] * np.nan

    stages = compile_build(open_build(copied), Settings(64), hands(spoil, language="no kernel for it"), quiet).record[
        "stages"
    ]
    assert {stage: entry["precision"] for stage, entry in stages.items()} == {
        "vision_encoder": "float32",
        "language": "float16",
        "mask_encoder": "float16",
        "mask_decoder": AS_BUILT,
    }
    assert [each["why"] for each in stages["language"]["tried"]] == ["TensorRT refused it: no kernel for it"]
    assert stages["mask_encoder"]["tried"][0]["why"] == (
        "image_embed is 50.0% away from ONNX Runtime, where 10.0% is allowed"
    )
    assert [each["why"] for each in stages["vision_encoder"]["tried"]] == ["vision_tokens is not a finite number"] * 2


def test_a_builder_that_is_killed_leaves_the_next_form(copied: Path) -> None:
    stages = compile_build(open_build(copied), Settings(64), hands(language="dies"), quiet).record["stages"]
    assert stages["language"]["precision"] == "float16"
    assert stages["language"]["tried"][0]["why"].endswith("no engine was built; it was killed")


def test_engines_whose_self_test_fails_are_not_used(copied: Path) -> None:
    opened: list[Path] = []

    def spoil(path: Path, results: dict[str, Any]) -> None:
        opened.append(path)
        if path.parent.name == "build.engines" and "verdict_logits" in results:
            results["verdict_logits"] = -results["verdict_logits"]

    compiled = compile_build(open_build(copied), Settings(64), hands(spoil), quiet)
    assert not compiled.self_test.passed and opened
    assert backend_of(open_build(copied)) == "onnx_runtime"
    assert open_session(open_build(copied)).judge(IMAGE, gate=0.0).mask is not None


def test_another_workspace_or_an_interrupt_keeps_what_is_finished(copied: Path) -> None:
    build, built = open_build(copied), []
    compile_build(build, Settings(64), hands(), quiet)

    def interrupted(build: Build, engines: str) -> RecordingSession:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_build(build, Settings(65), dataclasses.replace(hands(), open_session=interrupted), quiet)
    assert backend_of(build) == "onnx_runtime"

    def counted(job: EngineJob, progress: Any) -> Built:
        built.append(job.graph)
        return hands().build_engine(job, progress)

    compile_build(build, Settings(66), dataclasses.replace(hands(), build_engine=counted), quiet)
    assert built == [] and backend_of(build) == "tensor_rt"
    assert not list(engines_folder(copied).glob(".*"))


def test_a_stage_that_no_form_of_works_stops_it_and_the_rest_is_kept(copied: Path) -> None:
    def spoil(path: Path, results: dict[str, Any]) -> None:
        if "mask_logits" in results:
            results["mask_logits"] = -results["mask_logits"]

    with pytest.raises(BuildError, match=r"mask_decoder: no engine of it works here; see .*compile.log\n  as built: "):
        compile_build(open_build(copied), Settings(64), hands(spoil), quiet)
    assert not (engines_folder(copied) / RECORD).exists()
    built: list[str] = []
    whole = hands()

    def counted(job: EngineJob, progress: Any) -> Built:
        built.append(job.graph.stem)
        return whole.build_engine(job, progress)

    compile_build(open_build(copied), Settings(64), dataclasses.replace(whole, build_engine=counted), quiet)
    assert built == ["mask_decoder"]


def test_the_slower_form_is_not_taken(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 4.0, 3.0, 4.0, 1.0, 0.98, 1.0])
    monkeypatch.setattr("defaker_opt.compiling.compile.milliseconds", lambda engine, calls: next(times))
    stages = compile_build(open_build(copied), Settings(64, never_slower=True), hands(), quiet).record["stages"]
    assert [stages[stage]["precision"] for stage in STAGES] == ["float16", AS_BUILT, AS_BUILT, AS_BUILT]
    assert stages["vision_encoder"]["tried"][0]["why"] == "5.00 ms, and float16 4.00 ms"
    assert stages["mask_decoder"]["tried"] == []


def test_engines_of_another_build_or_machine_are_refused_with_what_to_do(copied: Path) -> None:
    from defaker_opt.runtime.backends.tensor_rt import check_record

    compiled = compile_build(open_build(copied), Settings(64), hands(), quiet)
    digest = open_build(copied).digest
    module: Any = type("tensorrt", (), {"__name__": "tensorrt", "__version__": "10.3.0"})
    module.__name__ = "tensorrt"
    check_record(compiled.folder, compiled.record, digest, module, GPU)
    for build, gpu, words in (
        ("0" * 64, GPU, "are of another build, and here is this one"),
        (digest, Gpu("89", "12.6"), "of a GPU of SM 87 with a driver for CUDA 12.6, and here is a GPU of SM 89"),
    ):
        with pytest.raises(BuildError, match=words) as error:
            check_record(compiled.folder, compiled.record, build, module, gpu)
        assert str(error.value).endswith(f"defaker-opt compile {copied}")
    module.__version__ = "10.9.0"
    with pytest.raises(BuildError, match=r"are of tensorrt 10\.3\.0, and here is tensorrt 10\.9\.0"):
        check_record(compiled.folder, compiled.record, digest, module, GPU)


def test_a_flipped_byte_of_an_engine_is_found(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt.runtime.backends import tensor_rt

    compiled = compile_build(open_build(copied), Settings(64), hands(), quiet)
    monkeypatch.setattr(tensor_rt, "library", lambda: None)
    monkeypatch.setattr(tensor_rt, "read_gpu", lambda: GPU)
    monkeypatch.setattr(tensor_rt, "check_record", lambda *all: None)
    path = compiled.folder / "language.engine"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BuildError, match=r"language.engine: its bytes are not those that were written; remove"):
        tensor_rt.open_stage(copied / "language.onnx", open_build(copied).manifest.spec("language"), {})


def test_a_machine_without_cuda_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt.runtime import cuda

    monkeypatch.setattr(cuda, "_NAMES", ("libno.so",))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    cuda._library.cache_clear()
    with pytest.raises(BuildError, match=r"CUDA: none of libno.so is found, .*LD_LIBRARY_PATH"):
        cuda.read_gpu()
    cuda._library.cache_clear()


def test_the_gate_needs_rtx_and_says_so(int8_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defaker_opt.compiling.gate.LIBRARY", "tensorrt_no")
    with pytest.raises(BuildError, match=r"--check: needs TensorRT for RTX, tensorrt_no; install it: pip install"):
        check_graphs(open_build(int8_engines), ("SM89",), 64, build_engine, quiet)


def test_a_build_is_found_from_within_its_folder(int8_engines: Path) -> None:
    done = defaker_opt("run", ".", "--self-test", cwd=int8_engines)
    assert done.returncode == 0, done.stderr
    assert engines_folder(Path()).name == f"{Path.cwd().name}.engines"


def test_an_unshared_prefix_is_read_with_each_question_in_one_call() -> None:
    sizes = Sizes(5, 256, 1, 512, before=10, shared=4, question=20, reads_whole=True)
    assert stage_ranges(sizes, "language")[1]["tokens"][2] == 10 + 5 * 256 + 4 + 20


def test_blocks_that_engines_do_not_read_are_refused(builds: Path) -> None:
    graph, limits = shared_build(builds, "jetson-int4") / "language.onnx", load_target("h200").graph
    assert limits is not None and limits.blocks == (64, 128)
    check_accepted(graph, limits, "h200")
    with pytest.raises(PassError, match=r"dequantize_weight: blocks of 64, and it reads 128"):
        check_accepted(graph, dataclasses.replace(limits, blocks=(128,)), "h200")


def test_attention_multiplies_in_float16_only_where_there_are_codes(int8_engines: Path) -> None:
    halves = {
        stage: sum(".narrow_" in (node.name or "") for node in ir.load(int8_engines / f"{stage}.onnx").graph)
        for stage in STAGES
    }
    # Two products a layer, of two sides each.
    assert halves["vision_encoder"] == 4 * 4 and halves["language"] == 4 * 3
    assert halves["mask_encoder"] > 0 and halves["mask_decoder"] == 0


def test_quantize_refuses_to_time_engines_where_they_are_not(tmp_path: Path) -> None:
    done = defaker_opt("quantize", "--recipe", "jetson-int8", "--never-slower", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "target orin-nano-super-8gb runs engines, which are timed where they are made" in done.stderr
    done = defaker_opt("compile", tmp_path, "--check", "--never-slower")
    assert done.returncode == 2 and "without a GPU nothing is timed" in done.stderr


def test_a_damaged_record_is_said(copied: Path) -> None:
    folder = engines_folder(copied)
    folder.mkdir()
    for text in ("{", "[]", "{}"):
        (folder / RECORD).write_text(text)
        with pytest.raises(BuildError, match=r"engines.json: .*remove the folder and compile again"):
            backend_of(open_build(copied))


def test_sizes_cover_every_call_of_every_picture(int8_engines: Path) -> None:
    session = open_session(open_build(int8_engines))
    for size in ((40, 40), (900, 300), (640, 480)):
        _, calls = _judged(session.build, size)
        for call in calls:
            ranges = stage_ranges(sizes_of(session), call.stage)
            sizes = {
                name: have
                for tensor in session.spec(call.stage).inputs
                for name, have in zip(tensor.shape, call.tensors[tensor.name].shape)
                if isinstance(name, str)
            }
            assert any(all(r[name][0] <= have <= r[name][2] for name, have in sizes.items()) for r in ranges), sizes


def _judged(build: Any, size: tuple[int, int]) -> Any:
    session = RecordingSession(build)
    return session.judge(IMAGE.resize(size), gate=0.0), session.calls


def test_compile_without_a_gpu_or_for_a_cpu_build_says_what_to_do(int8_engines: Path, int8_build: Path) -> None:
    done = defaker_opt("compile", int8_engines)
    assert done.returncode == 2
    assert "error: " in done.stderr and ("CUDA" in done.stderr or "TensorRT is not installed" in done.stderr)
    done = defaker_opt("compile", int8_build, "--check")
    assert done.returncode == 2
    assert "made for target cpu, which onnx_runtime runs without engines" in done.stderr
    done = defaker_opt("compile", int8_engines, "--check", "--sm", "SM87")
    assert done.returncode == 2 and "--sm: 'SM87' is not one of SM120, SM80, SM86, SM89" in done.stderr
    done = defaker_opt("compile", int8_engines, "--sm", "SM89")
    assert done.returncode == 2 and "--sm: engines are built for the GPU that is here" in done.stderr
