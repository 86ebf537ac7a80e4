"""A stage as an ONNX graph: exported without its weights, then filled with what the detector holds."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from defaker_opt.runtime.spec import StageSpec


@dataclass(frozen=True)
class Graph:
    """One stage. Initializers named like parameters have their shape but no values until `fill_weights_`."""

    spec: StageSpec
    model: ir.Model
