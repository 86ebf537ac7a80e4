"""Graphs are traced once: the cache gives what would be traced, and nothing that is wrong there is used."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from defaker_opt.detector import Detector, load_detector, parameter_shapes
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


def test_what_comes_from_the_cache_is_what_was_traced(traces: list[str]) -> None:
    detector = load_detector("reference")
    plain = exported(STAGE, detector.savings)
    traced_stage(detector, STAGE)
    kept = traced_stage(detector, STAGE)
    assert kept.spec == plain.spec
    assert [node.name for node in kept.model.graph] == [node.name for node in plain.model.graph]
    assert set(kept.model.graph.initializers) == set(plain.model.graph.initializers)
    for name, shape in parameter_shapes(detector.config, STAGE).items():
        assert kept.model.graph.initializers[name].shape == shape
    for side in ("inputs", "outputs"):
        assert [(v.name, v.shape, v.dtype) for v in getattr(kept.model.graph, side)] == [
            (v.name, v.shape, v.dtype) for v in getattr(plain.model.graph, side)
        ]


@pytest.mark.parametrize("damage", [b"", b"\xff\xff\xff\xff", "half", "another"])
def test_a_damaged_file_is_traced_anew(traces: list[str], tmp_path: Path, damage: bytes | str) -> None:
    detector = load_detector("reference")
    traced_stage(detector, STAGE)
    [kept] = (tmp_path / "cache" / "graphs").iterdir()
    whole = kept.read_bytes()
    if damage == "another":
        traced_stage(detector, "mask_encoder")
        [other] = (tmp_path / "cache" / "graphs").glob("mask_encoder-*")
        kept.write_bytes(other.read_bytes())
    else:
        kept.write_bytes(whole[: len(whole) // 2] if damage == "half" else bytes(damage))
    traced_stage(detector, STAGE)
    assert traces.count(STAGE) == 2
    assert kept.read_bytes() == whole


def test_other_savings_and_other_code_are_other_graphs(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector("reference")
    traced_stage(detector, STAGE)
    traced_stage(
        dataclasses.replace(detector, savings=dataclasses.replace(detector.savings, shared_prefix=False)), STAGE
    )
    monkeypatch.setattr(traced, "code_digest", lambda: "other")
    traced_stage(detector, STAGE)
    assert traces == [STAGE] * 3


def test_a_cache_that_cannot_be_written_is_done_without(traces: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    detector = load_detector("reference")
    for _ in range(2):
        written(traced_stage(detector, STAGE), detector, tmp_path / str(len(traces)))
    assert traces == [STAGE] * 2
