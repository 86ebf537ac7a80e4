"""Traced graphs, kept in the user's cache: a stage's graph depends on sizes and savings, and on no weight."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path

import onnx
import onnx_ir as ir

from defaker_opt.catalog import code_digest
from defaker_opt.detector import Detector, parameter_shapes
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder, keep_digested, read_digested
from defaker_opt.graph import Graph
from defaker_opt.graph.export import export_stage

# Beyond it the files that were not used for longest go; a stage takes 40 to 280 kB.
_CACHE_BYTES = 64 << 20

# What has a say in what is traced.
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def traced_stage(detector: Detector, stage: str) -> Graph:
    """`export_stage`, or what it gave before for the same configuration, savings, code and packages.

    Either way the graph has been written and read, so that builds have the same bytes. A cache that cannot be written,
    or has been damaged, is done without.
    """
    names = sorted(parameter_shapes(detector.config, stage))
    path = _path(detector, stage)
    kept = _read(path) if path else None
    if kept is None:
        kept = _as_proto(export_stage(detector, stage).model, names)
        if path:
            keep_digested(path, kept.SerializeToString(), _CACHE_BYTES)
    return Graph(detector.spec(stage), _from_proto(kept, names))


def _path(detector: Detector, stage: str) -> Path | None:
    """Named by all that decides the graph; None if there is no place for a cache."""
    facts = [
        stage,
        # Detectors of other names may be of the same sizes.
        dataclasses.asdict(dataclasses.replace(detector.config, name="", trained=True)),
        dataclasses.asdict(detector.savings),
        code_digest(),
        {name: importlib.metadata.version(name) for name in _TOOLS},
    ]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    try:
        return default_cache_folder() / "graphs" / f"{stage}-{key}.onnx"
    except DefakerError:
        return None


def _read(path: Path) -> onnx.ModelProto | None:
    """The file's graph; None if there is none, or not every bit is what was written."""
    content = read_digested(path)
    if content is None:
        return None
    proto = onnx.ModelProto()
    proto.ParseFromString(content)
    return proto


def _as_proto(model: ir.Model, names: list[str]) -> onnx.ModelProto:
    """Parameters, which have no values to write, become the last inputs."""
    for name in names:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    return ir.to_proto(model)


def _from_proto(proto: onnx.ModelProto, names: list[str]) -> ir.Model:
    model = ir.from_proto(proto)
    parameters = [model.graph.inputs.pop() for _ in names]
    for value in reversed(parameters):
        model.graph.initializers.add(value)
    return model
