"""Traced graphs, kept in the user's cache: a stage's graph depends on sizes and savings, and on no weight."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from defaker_opt.catalog import code_digest
from defaker_opt.detector import Detector, parameter_shapes
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder, whole_file
from defaker_opt.graph import Graph
from defaker_opt.graph.export import export_stage

# What has a say in what is traced.
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def traced_stage(detector: Detector, stage: str) -> Graph:
    """`export_stage`, or what it gave before for the same sizes, savings, code and packages.

    Either way the graph has been written and read, so that builds have the same bytes. A cache that cannot be written,
    or has been damaged, is done without.
    """
    path = default_cache_folder() / "graphs" / f"{stage}-{_key(detector, stage)}.onnx"
    names = sorted(parameter_shapes(detector.config, stage))
    kept = _read(path, names)
    if kept is None:
        kept = _as_proto(export_stage(detector, stage).model, names)
        with contextlib.suppress(DefakerError), whole_file(path) as partial:
            partial.write_bytes(kept.SerializeToString())
    return Graph(detector.spec(stage), _from_proto(kept, names))


def _key(detector: Detector, stage: str) -> str:
    facts = [
        stage,
        dataclasses.asdict(detector.config),
        dataclasses.asdict(detector.savings),
        code_digest(),
        {name: importlib.metadata.version(name) for name in _TOOLS},
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read(path: Path, names: list[str]) -> onnx.ModelProto | None:
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError):
        return None
    return proto if [value.name for value in proto.graph.input][-len(names) :] == names else None


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
