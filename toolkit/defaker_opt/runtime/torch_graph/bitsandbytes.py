"""Products by bitsandbytes: NF4 weights, and LLM.int8() with columns of large inputs in float.

The library is imported when a stage that has them is opened. Attributes have `compute`, the type that a product is
handed on in, and for NF4 `block`, how many codes share a scale. On the CPU inputs are float32, as for ONNX Runtime; on
CUDA bitsandbytes' INT8 kernels take and give float16 alone, so what is beyond its range is cut off there.
"""

from __future__ import annotations

import importlib
import logging
import sys

import torch
from torch import Tensor

from defaker_opt.errors import BuildError
from defaker_opt.runtime.torch_graph.graph import Attributes, Graph
from defaker_opt.runtime.torch_graph.products import scale_and_shift

# Operators of graphs that are run here, and what the second becomes. Which columns it keeps in float depends on the
# picture, and so do sizes within it: it cannot be part of a CUDA graph.
NF4_PRODUCT, LLM_INT8, OUTLIER_LINEAR = "MatMulBnb4", "LlmInt8", "OutlierLinear"

# Inputs of this size or more stay float (Dettmers et al. 2022, section 3.2; bitsandbytes' default too).
THRESHOLD = 6.0


def require_library(graph: Graph) -> None:
    """Raise BuildError if a graph needs bitsandbytes and it cannot be imported."""
    if not any(node.operator in (NF4_PRODUCT, LLM_INT8) for node in graph.nodes):
        return
    try:
        _import_library()
    except ImportError as error:
        raise BuildError(
            f"backend torch_cuda runs these codes by bitsandbytes, which cannot be imported ({error}); install it: "
            "pip install 'defaker-opt[bitsandbytes]', or run the build with: --backend onnx_runtime"
        ) from error


def _import_library() -> None:
    """Without the kernels that it would fetch from a hub if the package `kernels` is there; we call none of them."""
    if "bitsandbytes" in sys.modules:
        importlib.import_module("bitsandbytes")
        return
    logger, other = logging.getLogger("bitsandbytes"), sys.modules.get("kernels")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.setLevel(logging.CRITICAL)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if other is not None:
            sys.modules["kernels"] = other


def nf4_linear(attributes: Attributes, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times NF4 codes, packed [out, in / 2], scale [out, groups]. Returns [..., out] of `compute`."""
    given = x.to(attributes["compute"] if x.is_cuda else torch.float32)
    shape = [packed.shape[0], 2 * packed.shape[1]]
    product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        given, packed.view(-1, 1), shape, scale.reshape(-1), attributes["block"], "nf4"
    )
    return scale_and_shift(product, None, bias).to(attributes["compute"])


def outlier_linear(
    attributes: Attributes, x: Tensor, codes: Tensor, largest: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [..., in] times codes [out, in] int8, largest [out] what 127 stands for. Returns [..., out] of `compute`."""
    library = torch.ops.bitsandbytes
    rows = narrowed(x, torch.float16 if x.is_cuda else torch.float32).reshape(-1, x.shape[-1]).contiguous()
    # It divides by the largest number of a token; one of zeros would become codes that mean nothing, times zero.
    given, row_largest, columns = library.int8_vectorwise_quant(rows, THRESHOLD)
    product, _ = library.int8_mixed_scaled_mm(rows, given, codes, row_largest, largest, columns, None)
    return scale_and_shift(product, None, bias).to(attributes["compute"]).reshape(*x.shape[:-1], -1)


def narrowed(x: Tensor, kind: torch.dtype) -> Tensor:
    """x as `kind`, with what is beyond its range cut off."""
    bound = torch.finfo(kind).max
    return x.float().clamp(-bound, bound).to(kind)
