"""The backend torch_cuda without a GPU: whole verdicts on its CPU device, arrays that stay, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from defaker_opt.errors import BuildError, ConfigError
from defaker_opt.runtime import Session, Verdict, open_build, open_session
from defaker_opt.runtime.answers import fake_probability
from defaker_opt.runtime.backends import Choice, find_backend
from defaker_opt.runtime.backends.torch_cuda import check_codes, find_device
from defaker_opt.runtime.cuda import has_gpu
from defaker_opt.runtime.engines import backend_of
from defaker_opt.runtime.torch_graph.array import DeviceArray
from defaker_opt.runtime.torch_graph.graph import Graph, Node
from defaker_opt.sample import sample_image
from defaker_opt.target import load_target
from tests.conftest import ROOT, defaker_opt, shared_build

HERE = {"device": "cpu"}

# How far a fake probability may be from ONNX Runtime's, and which share of mask pixels may differ. Steps agree to 1e-6
# (test_torch_graph), and in float that is all. But a code that falls on the other side of an edge moves by a step,
# and moves other codes after it: in the embedded detector one of FP8 is a sixteenth of its number.
CLOSE = {
    "float32": (1e-5, 1e-4),
    "jetson-int4": (0.01, 0.005),
    "datacenter-int8": (0.02, 0.005),
    "datacenter-fp8": (0.05, 0.005),
}


def pictures() -> list[Image.Image]:
    drawn = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    return [Image.fromarray(sample_image()), Image.fromarray(drawn), Image.new("RGB", (64, 64))]


def session_of(build: Path, **options: str) -> Session:
    return open_session(open_build(build), 1, Choice("torch_cuda", {**HERE, **options}))


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if name == "datacenter-int8" else name for name in CLOSE]
)
def test_verdicts_and_masks_are_those_of_onnx_runtime(recipe: str, builds: Path) -> None:
    build = shared_build(builds, recipe)
    ours, theirs = session_of(build), open_session(open_build(build), 1, Choice("onnx_runtime"))
    probability, area = CLOSE[recipe]
    for picture in pictures():
        got, expected = ours.judge(picture, gate=0.0), theirs.judge(picture, gate=0.0)
        assert isinstance(got.verdict_logits, np.ndarray) and got.verdict_logits.dtype == np.float32
        assert abs(got.fake_probability - expected.fake_probability) <= probability
        assert got.mask is not None and expected.mask is not None
        assert (got.mask != expected.mask).mean() <= area
        again = ours.judge(picture, gate=0.0)
        assert _same(got, again)


def _same(one: Verdict, other: Verdict) -> bool:
    return np.array_equal(one.verdict_logits, other.verdict_logits) and np.array_equal(one.mask, other.mask)


def test_bfloat16_rounds_and_the_verdict_stays_float32(float_build: Path) -> None:
    """bfloat16 has 8 bits: a logit of 4 is off by some 0.01."""
    narrow, wide = session_of(float_build, compute="bfloat16"), session_of(float_build)
    for picture in pictures():
        got, expected = narrow.judge(picture, gate=0.0), wide.judge(picture, gate=0.0)
        difference = np.abs(got.verdict_logits - expected.verdict_logits).max()
        assert 0 < difference < 0.1
        assert (got.mask != expected.mask).mean() < 0.01
        assert got.verdict_logits.dtype == np.float32
        assert abs(fake_probability(got.verdict_logits) - expected.fake_probability) < 0.02


def test_blocks_of_tokens_and_tiles_are_joined_on_the_device(
    float_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(float_build)
    picture = pictures()[1]
    expected = session.judge(picture, gate=0.0)
    monkeypatch.setitem(session.build.manifest.data["target"]["session"], "tokens", 50)
    monkeypatch.setitem(session.build.manifest.data["target"]["session"], "tiles", 1)
    got = session.judge(picture, gate=0.0)
    np.testing.assert_allclose(got.verdict_logits, expected.verdict_logits, atol=1e-4)


def test_nothing_is_read_between_the_stages(float_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is the verdict and the mask; reading is where a GPU is waited for."""
    read: list[tuple[int, ...]] = []
    plain = DeviceArray.__array__

    def watched(self: DeviceArray, dtype: Any = None, copy: bool | None = None) -> Any:
        read.append(self.shape)
        return plain(self, dtype, copy)

    monkeypatch.setattr(DeviceArray, "__array__", watched)
    verdict = session_of(float_build).judge(pictures()[1], gate=0.0)
    assert verdict.mask_logits is not None
    assert read == [(1, 8), (1, *verdict.mask_logits.shape)]


def test_arrays_on_the_device_are_what_a_session_needs() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = DeviceArray(torch.from_numpy(x))
    assert (array.shape, array.ndim, array.dtype, len(array)) == (x.shape, 3, x.dtype, 2)
    for place in (0, None, (slice(None), slice(1, 3)), (0, slice(3, None)), [1, 0], (slice(None), [2, 0])):
        np.testing.assert_array_equal(np.asarray(array[place]), x[place])
    assert array[[0, 1]] is array
    np.testing.assert_array_equal(np.asarray(array.reshape(-1, 4)), x.reshape(-1, 4))
    joined = np.concatenate([x[:0], array, x], axis=0)
    assert isinstance(joined, DeviceArray)
    np.testing.assert_array_equal(np.asarray(joined), np.concatenate([x[:0], x, x]))
    np.testing.assert_array_equal(x + array, x + x)
    with pytest.raises(TypeError):
        np.stack([array, array])


def test_only_a_few_sizes_are_kept(float_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt.runtime.backends import torch_cuda

    monkeypatch.setattr(torch_cuda, "_GRAPHS", 2)
    build = open_build(float_build)
    stage: Any = torch_cuda.open_stage(float_build / "vision_encoder.onnx", build.manifest.spec("vision_encoder"), HERE)
    size = build.manifest.data["input"]["tile_size"]
    for tiles in (1, 2, 1, 3):
        shape = np.asarray(
            stage({"tiles": np.zeros((tiles, 3, size, size), np.float32)}, ("vision_tokens",))["vision_tokens"]
        )
        assert shape.shape[0] == tiles
    assert [key[1][0] for key in stage._seen] == [1, 3]


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "defaker_opt.runtime.backends.torch_cuda", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [_Block(), *sys.meta_path])
    with pytest.raises(BuildError, match="backend torch_cuda needs the package 'torch'"):
        find_backend("torch_cuda")


class _Block:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name, name="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_with_what_to_do(float_build: Path, tmp_path: Path) -> None:
    pictures()[2].save(tmp_path / "x.png")
    done = defaker_opt("run", float_build, tmp_path / "x.png", "--backend", "torch_cuda")
    assert done.returncode == 2
    assert "device 'cuda' is not here" in done.stderr and "--backend onnx_runtime" in done.stderr
    unknown = defaker_opt("run", float_build, tmp_path / "x.png", "--backend", "torch_cud")
    assert unknown.returncode == 2
    assert "--backend: 'torch_cud' is not one of" in unknown.stderr and "'torch_cuda'?" in unknown.stderr


@pytest.mark.parametrize("name", ["tpu", "mps"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(BuildError, match=f"device '{name}' is not .* use cuda, cuda:1"):
        find_device(name)


def test_an_unknown_compute_type_is_refused(float_build: Path) -> None:
    spec = open_build(float_build).manifest.spec("language")
    with pytest.raises(BuildError, match=r"session\.compute: 'bfloat61' is not one of bfloat16, float32"):
        find_backend("torch_cuda").open_stage(float_build / "language.onnx", spec, {**HERE, "compute": "bfloat61"})


def test_fp8_needs_ada_or_hopper(tmp_path: Path) -> None:
    layer = Node("QuantizedLinear", "layer", ("x", "codes"), "y")
    graph = Graph((layer,), {"codes": torch.zeros(2).to(torch.float8_e4m3fn)}, ("x",), ("y",))
    check_codes(tmp_path, graph, (8, 9))
    with pytest.raises(BuildError, match=r"layer multiplies FP8, .* from SM 8\.9 on, .* SM 8\.0; make an INT8 build"):
        check_codes(tmp_path, graph, (8, 0))


@pytest.mark.parametrize("base", ["h200", "h200-cuda"])
def test_a_target_with_fp8_on_an_older_gpu_is_refused(base: str, tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "profiling" / "targets" / f"{base}.yaml").read_text())
    data["device"]["versions"]["sm"] = "80"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(
        ConfigError, match=r"encodings\.fp8-static: qdq_fp8 needs a GPU from SM 89 on, .* is 80; leave"
    ) as raised:
        load_target(str(path))
    assert "nvfp4" not in str(raised.value), "torch decodes it on any GPU from SM 80 on"


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_build_for_a_gpu_runs_as_written_where_there_is_none(
    float_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = open_build(float_build)
    monkeypatch.setitem(build.manifest.data["target"], "backend", "torch_cuda")
    assert backend_of(build) == "onnx_runtime"
    assert Session(build).options()["as_written"]
    monkeypatch.setattr("defaker_opt.runtime.engines.has_gpu", lambda: True)
    assert backend_of(build) == "torch_cuda"
    assert "as_written" not in Session(build).options()


def test_times_of_single_stages_are_refused_for_it() -> None:
    done = defaker_opt("quantize", "--recipe", "datacenter-fp8", "--target", "h200-cuda", "--never-slower")
    assert done.returncode == 2
    assert "--never-slower: target h200-cuda runs on a GPU" in done.stderr and "defaker-opt profile" in done.stderr
