"""Trace one stage into an ONNX graph whose weights are still empty, so that no size of detector needs memory here."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

from defaker_opt.detector import Detector, parameter_shapes
from defaker_opt.graph import Graph
from defaker_opt.graph.rewrite import simplify_
from defaker_opt.runtime.spec import StageSpec, TensorSpec

# The newest opset with everything we need (Gelu, LayerNormalization) that TensorRT 10.3 on JetPack 6 still reads.
OPSET = 20

# Any sizes do for tracing, if no two of them are equal and none is 0 or 1, which torch would take for constants.
_EXAMPLE_SIZES = {"tiles": 3, "tokens": 7, "past": 5}


def export_stage(detector: Detector, stage: str) -> Graph:
    """Trace a stage. Its parameters become initializers of the same names, without values."""
    spec = detector.spec(stage)
    outline = detector.outline(stage)
    arguments = tuple(_example(tensor) for tensor in spec.inputs)
    with _quiet():
        program = torch.onnx.export(
            outline,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes=_dynamic_shapes(spec),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
        )
    assert program is not None
    model = program.model
    _name_parameters_(model, stage, list(parameter_shapes(detector.config, stage)))
    simplify_(model, stage, set(parameter_shapes(detector.config, stage)))
    _set_shapes_(model, spec)
    return Graph(spec, model)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _dynamic_shapes(spec: StageSpec) -> Any:
    shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    named = [shape for shape, tensor in zip(shapes, spec.inputs) if not tensor.name.startswith("past_")]
    rest = tuple(shapes[len(named) :])
    return (*named, rest) if rest else tuple(named)


def _name_parameters_(model: ir.Model, stage: str, names: list[str]) -> None:
    """Give initializers the full names of a detector folder; every parameter must be there."""
    initializers = model.graph.initializers
    for name in names:
        inner = name.partition(".")[2]
        assert inner in initializers, f"the exporter lost {name}; is this torch a tested version?"
        value = initializers.pop(inner)
        value.name = name
        initializers.add(value)


def _set_shapes_(model: ir.Model, spec: StageSpec) -> None:
    """Write the contract's own dimension names onto the graph's inputs and outputs, in its order."""
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in spec.inputs]
    assert [value.name for value in model.graph.outputs] == [tensor.name for tensor in spec.outputs]
    for value, tensor in zip((*model.graph.inputs, *model.graph.outputs), spec.inputs + spec.outputs):
        value.shape = ir.Shape(tensor.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself (a missing torchvision, its deprecations) from our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
