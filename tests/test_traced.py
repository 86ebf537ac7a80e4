"""Graphs are traced once: the cache gives what would be traced, and nothing that is wrong there is used."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from defaker_opt.detector import Detector, load_detector, parameter_shapes
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder
from defaker_opt.graph import Graph, traced
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.traced import traced_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.savings import Savings
from defaker_opt.target import load_target

STAGE = "mask_decoder"


@functools.cache
def exported(stage: str, savings: Savings) -> Graph:
    return export_stage(dataclasses.replace(load_detector("reference"), savings=savings), stage)


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, and the stages that were really traced since."""
    stages: list[str] = []

    def counted(detector: Detector, stage: str) -> Graph:
        stages.append(stage)
        found = exported(stage, detector.savings)
        return Graph(found.spec, found.model.clone())

    monkeypatch.setenv("DEFAKER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(traced, "export_stage", counted)
    return stages


def written(graph: Graph, detector: Detector, folder: Path) -> list[bytes]:
    fill_weights_(graph, detector, load_target("cpu").encodings)
    folder.mkdir()
    return [path.read_bytes() for path in write_graph(graph, folder)]


def test_a_second_build_is_not_traced_and_has_the_same_bytes(traces: list[str], tmp_path: Path) -> None:
    detector = load_detector("reference")
    first, second = (written(traced_stage(detector, STAGE), detector, tmp_path / name) for name in ("a", "b"))
    assert traces == [STAGE]
    assert first == second


def attributes(node: ir.Node) -> dict[str, bytes]:
    return {name: ir.to_proto(each).SerializeToString() for name, each in node.attributes.items()}


def test_what_comes_from_the_cache_is_what_was_traced(traces: list[str]) -> None:
    detector = load_detector("reference")
    plain = exported(STAGE, detector.savings)
    traced_stage(detector, STAGE)
    kept = traced_stage(detector, STAGE)
    assert kept.spec == plain.spec
    for node, exact in zip(kept.model.graph, plain.model.graph, strict=True):
        assert (node.name, node.op_type, len(node.inputs)) == (exact.name, exact.op_type, len(exact.inputs))
        assert attributes(node) == attributes(exact)
    constants = set(plain.model.graph.initializers) - set(parameter_shapes(detector.config, STAGE))
    for name in constants:
        values = (each.model.graph.initializers[name].const_value for each in (kept, plain))
        np.testing.assert_array_equal(*(value.numpy() for value in values if value is not None))
    assert set(kept.model.graph.initializers) == set(plain.model.graph.initializers)
    for name, shape in parameter_shapes(detector.config, STAGE).items():
        assert kept.model.graph.initializers[name].shape == shape
    for side in ("inputs", "outputs"):
        assert [(v.name, v.shape, v.dtype) for v in getattr(kept.model.graph, side)] == [
            (v.name, v.shape, v.dtype) for v in getattr(plain.model.graph, side)
        ]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "garbage": lambda content: b"\xff" * 64,
    "half": lambda content: content[: len(content) // 2],
    "end cut off": lambda content: content[:-6],
    "one bit": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_traced_anew(traces: list[str], tmp_path: Path, damage: str) -> None:
    detector = load_detector("reference")
    traced_stage(detector, STAGE)
    [kept] = (tmp_path / "cache" / "graphs").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(DAMAGE[damage](whole))
    traced_stage(detector, STAGE)
    assert traces == [STAGE] * 2
    assert kept.read_bytes() == whole


def test_what_decides_the_graph_decides_the_file(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector("reference")
    config = detector.config
    traced_stage(detector, STAGE)
    traced_stage(dataclasses.replace(detector, config=dataclasses.replace(config, name="x", trained=False)), STAGE)
    assert traces == [STAGE]
    savings = dataclasses.replace(detector.savings, shared_prefix=False)
    traced_stage(dataclasses.replace(detector, savings=savings), STAGE)
    language = dataclasses.replace(config.language, norm_eps=1e-3)
    traced_stage(dataclasses.replace(detector, config=dataclasses.replace(config, language=language)), STAGE)
    monkeypatch.setattr(traced, "code_digest", lambda: "other")
    traced_stage(detector, STAGE)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"another {name}")
    traced_stage(detector, STAGE)
    assert traces == [STAGE] * 5


def test_what_was_not_used_for_longest_goes(traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, folder = load_detector("reference"), tmp_path / "cache" / "graphs"
    traced_stage(detector, STAGE)
    [first] = folder.iterdir()
    monkeypatch.setattr(traced, "_CACHE_BYTES", 2 * first.stat().st_size + 1000)
    for number in range(4):
        with monkeypatch.context() as other:
            other.setattr(traced, "code_digest", lambda number=number: f"code {number}")
            traced_stage(detector, STAGE)
        for kept in folder.iterdir():  # clocks of file systems may tick slowly
            os.utime(kept, (number, number))
        traced_stage(detector, STAGE)
    assert traces == [STAGE] * 5, "the first was used all the time"
    assert first.exists() and len(list(folder.iterdir())) == 2


def test_without_a_home_nothing_is_kept(traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DEFAKER_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    traced_stage(load_detector("reference"), STAGE)
    assert traces == [STAGE]
    with pytest.raises(DefakerError, match=r"no cache folder: .*; set DEFAKER_CACHE_DIR to a folder"):
        default_cache_folder()


def test_a_cache_that_cannot_be_written_is_done_without(traces: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    detector = load_detector("reference")
    for _ in range(2):
        written(traced_stage(detector, STAGE), detector, tmp_path / str(len(traces)))
    assert traces == [STAGE] * 2
