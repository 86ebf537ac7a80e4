"""What the pass `modelopt` tells ModelOpt's quantizers, and how what they found becomes codes of ours."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from defaker_opt.detector import Detector
from defaker_opt.errors import PassError
from defaker_opt.methods import FP8, Array, QuantizedWeight, Scheme, parse_scheme
from defaker_opt.methods._grids import usable
from defaker_opt.observe.inputs import calibration_inputs
from defaker_opt.samples import Samples
from defaker_opt.weights import Shapes

SCHEMES = {"int8-smoothquant": "int8-static", "int4-awq": "int4-sym-g128", "fp8": "fp8-static"}
AUTO = "auto"
AUTO_CHOICES = ("int4-awq", "int8-smoothquant")
# What `auto` is about; heads would look free to it, as it sees the verdict alone.
JUDGED = "language.layers."
# What looks at every call many times.
SEARCH = ("int4-awq", AUTO)


def library() -> ModuleType:
    """ModelOpt's quantizers. Raises PassError if it is not installed."""
    try:
        with warnings.catch_warnings():
            # It warns of every transformers but the one it was tested with; of that it needs nothing here.
            warnings.simplefilter("ignore")
            return importlib.import_module("modelopt.torch.quantization")
    except ModuleNotFoundError as error:
        raise PassError(
            f"modelopt: the package {error.name!r} is not installed; pip install 'defaker-opt[modelopt]'"
        ) from error


def _layer(name: str) -> str:
    """The name of a weight's layer within its stage."""
    return name.partition(".")[2].removesuffix(".weight")


def fitted_scheme(algorithm: str, columns: int) -> Scheme | None:
    """The scheme of an algorithm's codes for so many columns; None if they have no blocks that engines take."""
    scheme = parse_scheme(SCHEMES[algorithm])
    assert scheme is not None
    return scheme.fitted(columns)


def stage_codes(
    detector: Detector, stage: str, weights: Shapes, algorithm: str, samples: Samples, effective_bits: float
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Codes of a stage's layers, but of those that ModelOpt leaves in float."""
    module = detector.load_stage(stage)

    def calls() -> Iterator[tuple[torch.Tensor, ...]]:
        found = (call.tensors for call in calibration_inputs(detector, stage, samples))
        # Of the two questions `auto` looks at the verdict's.
        return islice(found, 0, None, 2) if algorithm == AUTO else found

    # Calls of all pictures would not fit into memory; those that are searched on are few, and looked at often.
    held = list(calls()) if algorithm in SEARCH else []
    _quantize_(module, algorithm, weights, (lambda: iter(held)) if held else calls, effective_bits)
    for name in weights:
        if codes := codes_of(module.get_submodule(_layer(name))):
            yield name, codes


def _quantize_(
    module: nn.Module,
    algorithm: str,
    weights: Shapes,
    calls: Callable[[], Iterator[tuple[torch.Tensor, ...]]],
    effective_bits: float,
) -> None:
    """Have ModelOpt put quantizers into a stage, and calibrate them on its calls."""

    def show(given: nn.Module) -> None:
        for call in calls():
            given(*call)

    quantization = library()
    # It tells its story on standard output, where results of ours go.
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        if algorithm != AUTO:
            quantization.quantize(module, _config(algorithm, weights), show)
            return
        shown = list(calls())
        chosen = {_layer(name) for name in weights}
        quantization.auto_quantize(
            module,
            constraints={"effective_bits": effective_bits},
            quantization_formats=[_choice(each, weights) for each in AUTO_CHOICES],
            data_loader=shown,
            forward_step=lambda given, call: given(*call)[0],
            disabled_layers=[name for name in _linear_names(module) if name not in chosen],
            num_calib_steps=len(shown),
            num_score_steps=len(shown),
            method="kl_div",
        )


def _linear_names(module: nn.Module) -> Iterator[str]:
    return (name for name, each in module.named_modules() if isinstance(each, nn.Linear))


_ALGORITHMS = {"int8-smoothquant": "smoothquant", "int4-awq": "awq_lite", "fp8": "max"}


def _config(algorithm: str, weights: Shapes) -> dict[str, Any]:
    """ModelOpt's settings: the layers by name, as its own presets leave out layers by names that ours have too."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (_, columns) in weights.items():
        entries += _entries(f"{_layer(name)}.", algorithm, columns)
    return {"quant_cfg": entries, "algorithm": _ALGORITHMS[algorithm]}


def _choice(algorithm: str, weights: Shapes) -> dict[str, Any]:
    """Settings of one of the formats of `auto_quantize`, which asks each layer alone: blocks fit all of them."""
    shared = math.gcd(*(columns for _, columns in weights.values()))
    entries = [{"quantizer_name": "*", "enable": False}, *_entries("*", algorithm, shared)]
    return {"quant_cfg": entries, "algorithm": _ALGORITHMS[algorithm]}


def _entries(layers: str, algorithm: str, columns: int) -> Iterator[dict[str, Any]]:
    """Settings of the quantizers of layers. layers: what the quantizers' names begin with."""
    scheme = fitted_scheme(algorithm, columns)
    assert scheme is not None
    bits = (4, 3) if scheme.floating else scheme.bits
    if scheme.group_size:
        blocks = {"num_bits": bits, "block_sizes": {-1: scheme.group_size, "type": "static"}}
        yield {"quantizer_name": f"{layers}weight_quantizer", "cfg": blocks}
        return
    yield {
        "quantizer_name": f"{layers}weight_quantizer",
        "cfg": {"num_bits": bits, "axis": None if scheme.floating else 0},
    }
    yield {"quantizer_name": f"{layers}input_quantizer", "cfg": {"num_bits": bits, "axis": None}}


def codes_of(layer: Any) -> QuantizedWeight | None:
    """Codes of a linear layer that ModelOpt has calibrated, None of one that it left in float. The layer's weight is
    already divided by its input's factor.
    """
    if not layer.weight_quantizer.is_enabled:
        return None
    weight = layer.weight.detach().float().numpy()
    bits, factor = layer.weight_quantizer.num_bits, layer.input_quantizer.pre_quant_scale
    largest = layer.weight_quantizer.amax.detach().float().numpy()
    blocks = layer.weight_quantizer.block_sizes
    group = int(blocks[-1]) if blocks else None
    name = "fp8-static" if bits == (4, 3) else f"int4-sym-g{group}" if group else "int8-static"
    scheme = parse_scheme(name)
    assert scheme is not None
    rows = weight.shape[0]
    largest = np.broadcast_to(largest.reshape(-1, 1), (rows, 1)) if group is None else largest.reshape(rows, -1)
    scale = usable((largest / np.float32(scheme.largest_code)).astype(np.float32), scheme)
    # An input that is always 0 has any range.
    input_range = None if group else (float(layer.input_quantizer.amax) or 1.0) / scheme.largest_code
    return QuantizedWeight(
        _rounded(weight, scale, scheme),
        np.ascontiguousarray(scale),
        scheme,
        input_factor=None if factor is None else factor.detach().float().numpy().reshape(-1),
        input_scale=input_range,
    )


def _rounded(weight: Array, scale: Array, scheme: Scheme) -> np.ndarray:
    grouped = weight.reshape(weight.shape[0], scale.shape[1], -1) / scale[:, :, None]
    grouped = np.clip(grouped, scheme.smallest_code, scheme.largest_code)
    codes = grouped.astype(FP8) if scheme.floating else np.rint(grouped).astype(np.int8)
    result: np.ndarray = codes.reshape(weight.shape)
    return result
