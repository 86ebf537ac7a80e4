"""Norm and quantization, activation and quantization in one step: Triton kernels on CUDA, plain torch elsewhere.

`codes` of the attributes is the type of codes that comes out, torch.int8 or torch.float8_e4m3fn, and step [] its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from defaker_opt.runtime.torch_graph.graph import Attributes
from defaker_opt.runtime.torch_graph.operators import quantize
from defaker_opt.runtime.torch_graph.products import multiply_codes, scale_and_shift


def quantize_codes(attributes: Attributes, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
    """QuantizeLinear; one kernel on CUDA where codes are those of products."""
    if x.is_cuda and zero is not None and zero.dtype in (torch.int8, torch.float8_e4m3fn):
        from defaker_opt.runtime.torch_graph import kernels

        return kernels.quantize(x, step, zero.dtype)
    return quantize(attributes, x, step, zero)


def rms_norm(attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    """weight · x / √(mean(x²) + ε), in the order of the exported graph; Zhang and Sennrich 2019."""
    wide = x.float()
    return weight * (wide * wide.pow(2).mean(-1, keepdim=True).add(attributes["epsilon"]).sqrt().reciprocal())


def norm_quantize(
    attributes: Attributes, x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Codes of a norm of x [..., n]: of LayerNorm where `centred`, else of `rms_norm`."""
    if x.is_cuda:
        from defaker_opt.runtime.torch_graph import kernels

        return kernels.norm_quantize(x, weight, bias, step, attributes)
    if attributes["centred"]:
        normed = functional.layer_norm(x.float(), weight.shape, weight, bias, attributes["epsilon"])
    else:
        normed = rms_norm(attributes, x, weight)
    return quantize({}, normed, step, _zero(attributes))


def linear_gelu_quantize(
    attributes: Attributes, codes: Tensor, weight: Tensor, scale: Tensor, step: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Codes of GELU of a product of codes, whose scale and bias are applied on the way."""
    product, scale_due, bias_due = multiply_codes(attributes, codes, weight, scale, bias)
    if product.is_cuda:
        from defaker_opt.runtime.torch_graph import kernels

        return kernels.gelu_quantize(product, scale_due, bias_due, step, attributes)
    shifted = scale_and_shift(product, scale_due, bias_due).to(attributes["compute"])
    return quantize({}, functional.gelu(shifted.float()), step, _zero(attributes))


def gate_quantize(attributes: Attributes, gate: Tensor, up: Tensor, step: Tensor) -> Tensor:
    """Codes of SiLU(gate) · up, both [..., n]; Shazeer 2020."""
    if gate.is_cuda:
        from defaker_opt.runtime.torch_graph import kernels

        return kernels.gate_quantize(gate, up, step, attributes)
    wide = gate.float()
    return quantize({}, wide * torch.sigmoid(wide) * up.float(), step, _zero(attributes))


def _zero(attributes: Attributes) -> Tensor:
    return torch.zeros((), dtype=attributes["codes"])
