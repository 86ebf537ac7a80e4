"""NVIDIA ModelOpt as the quantizer, for targets that run its formats: it chooses scales and factors, codes become ours.

int8-smoothquant   INT8 with a scale for each row and one range of activations; large channels move into weights
                   (Xiao et al. 2023); scheme `int8-static`
int4-awq           INT4 in blocks; columns that meet large inputs are scaled up (Lin et al. 2024); scheme `int4-sym-g…`
fp8                FP8 with one scale for a weight and one for its input; scheme `fp8-static`
auto               each layer int4-awq, int8-smoothquant or float, as ModelOpt's `auto_quantize` finds by the divergence
                   of the verdict, with `effective_bits` a weight on average; of the language part only
A whole stage is in memory at a time, unlike in `quantize`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, linear_weights
from defaker_opt.errors import PassError, one_of
from defaker_opt.methods import FP8, Array, QuantizedWeight, Scheme, parse_scheme
from defaker_opt.observe.inputs import stage_inputs
from defaker_opt.passes import PassResult, Preview
from defaker_opt.progress import Progress
from defaker_opt.samples import Samples
from defaker_opt.strict import Invalid
from defaker_opt.target import Target

SCHEMES = {"int8-smoothquant": "int8-static", "int4-awq": "int4-sym-g128", "fp8": "fp8-static"}
AUTO = "auto"
_AUTO_CHOICES = ("int4-awq", "int8-smoothquant")
# What looks at every call many times.
_SEARCH = ("int4-awq", AUTO)
_STAGES = ("vision_encoder", "language", "mask_encoder")


@dataclass(frozen=True)
class Modelopt:
    """stages: stage → algorithm, see above; others stay float. keep: globs over full weight names that stay float.

    effective_bits: of a weight on average, for `auto`. pairs: how many of the calibration set's pairs of twins int4-awq
    and auto are shown, evenly spread, as AWQ's search runs a layer eleven times for each call; others are shown all.
    """

    stages: dict[str, str]
    keep: tuple[str, ...] = ()
    effective_bits: float = 6.0
    pairs: int = 16

    CHECKS: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {
        "stages": lambda stages: _wrong_stages(stages),
        "effective_bits": lambda bits: None if 4.5 <= bits <= 8 else f"must be at least 4.5 and at most 8, got {bits}",
        "pairs": lambda pairs: None if pairs >= 1 else f"must be 1 or more, got {pairs}",
    }

    def __post_init__(self) -> None:
        if AUTO in [algorithm for stage, algorithm in self.stages.items() if stage != "language"]:
            raise Invalid("stages: auto is for the language part, whose verdict it looks at; give int8-smoothquant")

    def check(self, config: DetectorConfig, target: Target) -> Preview:
        """See `Pass`."""
        library()
        chosen = {name: self._schemes(name, shape) for name, shape in self._weights(config).items()}
        kinds = {scheme.kind for schemes in chosen.values() for scheme in schemes}
        problems = [
            f"{kind} cannot run on target {target.name}, which runs {', '.join(target.kinds)}"
            for kind in sorted(kinds - set(target.kinds))
        ]
        unused = [glob for glob in self.keep if not any(fnmatchcase(name, glob) for name in self._weights(config))]
        problems += [f"keep: {glob!r} matches no linear layer of {', '.join(self.stages)}" for glob in unused]
        if problems:
            raise PassError("modelopt:\n  " + "\n  ".join(problems))
        # What `auto` will choose is not known yet: the last, widest choice is foreseen.
        schemes = {name: str(found[-1]) if found else "float" for name, found in chosen.items()}
        coded = tuple(name for name, found in chosen.items() if found)
        reasons = {name: self._why_float(name) for name in chosen if name not in coded}
        return Preview(schemes, reasons, f"modelopt for {len(coded)} layers", {}, coded)

    def apply(self, detector: Detector, progress: Progress, samples: Samples | None = None) -> PassResult:
        """See `Pass`."""
        assert samples is not None, "check said that pictures are needed"
        weights, pictures = self._weights(detector.config), {}
        for index, stage in enumerate(each for each in _STAGES if each in self.stages):
            progress(f"modelopt {stage}", index / len(self.stages))
            own = {n: s for n, s in weights.items() if n.startswith(f"{stage}.") and self._schemes(n, s)}
            if all(name in detector.codes for name in own):
                continue  # a run that was killed had finished it
            module, algorithm = detector.load_stage(stage), self.stages[stage]
            shown = _spread(samples, self.pairs) if algorithm in _SEARCH else samples
            pictures[stage] = len(shown)
            calls = [call.tensors for call in stage_inputs(detector, stage, shown)]
            _quantize_(module, algorithm, own, calls, self.effective_bits)
            for name in own:
                layer = module.get_submodule(_inner(name).removesuffix(".weight"))
                if codes := codes_of(layer):
                    detector.codes[name] = codes
        quantized = {name: str(detector.codes[name].scheme) for name in weights if name in detector.codes}
        left = {name: self._why_float(name) for name in weights if name not in quantized}
        version = importlib.metadata.version("nvidia-modelopt")
        notes = {"quantized": quantized, "left_in_float": left, "modelopt": version, "pictures": pictures}
        return PassResult(notes)

    def _weights(self, config: DetectorConfig) -> dict[str, tuple[int, ...]]:
        return {n: s for stage in _STAGES if stage in self.stages for n, s in linear_weights(config, stage).items()}

    def _schemes(self, name: str, shape: tuple[int, ...]) -> list[Scheme]:
        """What a layer may get: one scheme, several with `auto`, none if it stays float."""
        if any(fnmatchcase(name, glob) for glob in self.keep):
            return []
        algorithm = self.stages[name.partition(".")[0]]
        found = [_scheme(each, shape[1]) for each in (_AUTO_CHOICES if algorithm == AUTO else (algorithm,))]
        return [scheme for scheme in found if scheme is not None]

    def _why_float(self, name: str) -> str:
        kept = next((glob for glob in self.keep if fnmatchcase(name, glob)), None)
        if kept:
            return f"keep: {kept!r} keeps it in float"
        if self.stages[name.partition(".")[0]] == AUTO:
            return "auto_quantize leaves it in float"
        return "its columns have no blocks that engines take"


def _wrong_stages(stages: Mapping[str, str]) -> str | None:
    for stage, algorithm in stages.items():
        if stage not in _STAGES:
            return f"{one_of(stage, _STAGES)}; the mask decoder stays in float"
        if algorithm not in (*SCHEMES, AUTO):
            return f"{stage}: {one_of(algorithm, (*SCHEMES, AUTO))}"
    return None if stages else "must not be empty; {language: int4-awq} quantizes the language part"


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


def _spread(samples: Samples, pairs: int) -> Samples:
    """So many pairs of neighbours, evenly spread over the set; all of it if it has no more."""
    have = len(samples) // 2
    if pairs >= have:
        return samples
    starts = [2 * (index * have // pairs) for index in range(pairs)]
    items = tuple(item for start in starts for item in samples.items[start : start + 2])
    return Samples(samples.name, samples.digest, items)


def _inner(name: str) -> str:
    return name.partition(".")[2]


def _scheme(algorithm: str, columns: int) -> Scheme | None:
    scheme = parse_scheme(SCHEMES[algorithm])
    assert scheme is not None
    return scheme.fitted(columns)


def _quantize_(
    module: nn.Module,
    algorithm: str,
    weights: Mapping[str, tuple[int, ...]],
    calls: list[tuple[torch.Tensor, ...]],
    effective_bits: float,
) -> None:
    """Have ModelOpt put quantizers into a stage, and calibrate them on its calls."""

    def show(given: nn.Module) -> None:
        for call in calls:
            given(*call)

    quantization = library()
    # It tells its story on standard output, where results of ours go.
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        if algorithm != AUTO:
            quantization.quantize(module, _config(algorithm, weights), show)
            return
        quantization.auto_quantize(
            module,
            constraints={"effective_bits": effective_bits},
            quantization_formats=[_choice(each, weights) for each in _AUTO_CHOICES],
            data_loader=calls,
            forward_step=lambda given, call: given(*call)[0],
            disabled_layers=[n for n in _linear_names(module) if n not in {_inner(w)[:-7] for w in weights}],
            num_calib_steps=len(calls),
            num_score_steps=len(calls),
            method="kl_div",
        )


def _linear_names(module: nn.Module) -> Iterator[str]:
    return (name for name, each in module.named_modules() if isinstance(each, nn.Linear))


_ALGORITHMS = {"int8-smoothquant": "smoothquant", "int4-awq": "awq_lite", "fp8": "max"}


def _config(algorithm: str, weights: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """ModelOpt's settings: the layers by name, as its own presets leave out layers by names that ours have too."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (_, columns) in weights.items():
        entries += _entries(_inner(name).removesuffix("weight"), algorithm, columns)
    return {"quant_cfg": entries, "algorithm": _ALGORITHMS[algorithm]}


def _choice(algorithm: str, weights: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Settings of one of the formats of `auto_quantize`, which asks each layer alone: blocks fit all of them."""
    shared = math.gcd(*(columns for _, columns in weights.values()))
    entries = [{"quantizer_name": "*", "enable": False}, *_entries("*", algorithm, shared)]
    return {"quant_cfg": entries, "algorithm": _ALGORITHMS[algorithm]}


def _entries(layers: str, algorithm: str, columns: int) -> Iterator[dict[str, Any]]:
    """Settings of the quantizers of layers. layers: what the quantizers' names begin with."""
    scheme = _scheme(algorithm, columns)
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
    scale = np.broadcast_to(largest.reshape(-1, 1), (rows, 1)) if group is None else largest.reshape(rows, -1)
    scale = np.where(scale > 0, scale, 1).astype(np.float32) / np.float32(scheme.largest_code)
    if group:
        scale = scale.astype(np.float16).astype(np.float32)
    input_range = None if group else float(layer.input_quantizer.amax) / scheme.largest_code
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


PASS = Modelopt
