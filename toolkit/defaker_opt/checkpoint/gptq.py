"""Linear layers that GPTQ left as packed codes, as GPTQModel and AutoGPTQ write them; decoded when a weight is read.

For each layer [out, in] of b bits there are `qweight` [in * b / 32, out], `qzeros` [groups, out * b / 32], `scales`
[groups, out] and mostly `g_idx` [in], the group of each column: w = (code - zero point) * scale. In the older format,
"gptq", zero points are stored less 1; in "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from defaker_opt.checkpoint import Tensors
from defaker_opt.errors import SourceError, one_of
from defaker_opt.files import read_json_object
from defaker_opt.packing import BITS, fills_words, unpack
from defaker_opt.weights import Shapes

# What is added to zero points as they are stored, by the name of the format.
OFFSETS = {"gptq": 1, "gptq_v2": 0}
METHOD = "gptq"
SETTINGS = "quantization_config"
# Where AutoGPTQ wrote the same settings before they were part of config.json.
_BESIDE = "quantize_config.json"

CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WHOLE = (torch.int32, torch.int64)
_TYPES: dict[str, tuple[torch.dtype, ...]] = {
    CODES: (torch.int32,), ZEROS: (torch.int32,), SCALES: _FLOATS, GROUPS: _WHOLE,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One packed layer, [rows, columns] when decoded. grouped: whether `g_idx` is there."""

    module: str
    bits: int
    rows: int
    columns: int
    grouped: bool


@dataclass(frozen=True)
class UnpackedWeights:
    """The weights of packed layers by their names, in float32, in which each is exact. place: says whose they are."""

    place: Path
    base: Tensors
    layers: Mapping[str, Layer]
    offset: int

    def shapes(self) -> Shapes:
        """See `TensorFile`."""
        return {name: (layer.rows, layer.columns) for name, layer in self.layers.items()}

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorFile`."""
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        """See `TensorFile`. Raises SourceError where a column has a group that is not there."""
        layer = self.layers[name]
        scales = self._part(layer, SCALES, torch.float32)  # [groups, out]
        group = self._groups(layer, len(scales))
        # Codes less zero points of up to 8 bits times scales of 11 are exact.
        weight = unpack(self._part(layer, CODES, torch.int32), layer.bits).astype(np.float32)  # [in, out]
        weight -= self._zeros(layer)[group]
        weight *= scales[group]
        return torch.from_numpy(np.ascontiguousarray(weight.T))

    def _zeros(self, layer: Layer) -> NDArray[np.float32]:
        """Zero points [groups, out]."""
        words = self._part(layer, ZEROS, torch.int32)
        stored = unpack(np.ascontiguousarray(words.T), layer.bits).T
        largest = 2**layer.bits - 1
        if self.offset and (stored == largest).any():
            raise SourceError(
                f"{self.place}: {layer.module}.{ZEROS}: has the code {largest}, which some readers of the format "
                "'gptq' take for a zero point of 0 and others not; save the checkpoint as 'gptq_v2' with GPTQModel"
            )
        return stored.astype(np.float32) + np.float32(self.offset)

    def _groups(self, layer: Layer, groups: int) -> NDArray[np.int64]:
        """The group of each column [in]."""
        if not layer.grouped:
            return np.arange(layer.columns) // (layer.columns // groups)
        found = self._part(layer, GROUPS, torch.int64)
        if found.min() < 0 or found.max() >= groups:
            raise SourceError(
                f"{self.place}: {layer.module}.{GROUPS}: groups {found.min()} to {found.max()}, but {layer.module}."
                f"{SCALES} has 0 to {groups - 1}; copy the checkpoint again"
            )
        return found

    def _part(self, layer: Layer, part: str, dtype: torch.dtype) -> NDArray[Any]:
        return self.base.read(f"{layer.module}.{part}").to(dtype).numpy()


def unpacked(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Tensors with every packed layer as one float32 weight; nothing is read but names, shapes and types.

    Raises SourceError for other kinds of quantization, and for layers that are not whole.
    """
    where, settings = _settings(folder, config)
    modules = sorted(name.removesuffix(f".{CODES}") for name in tensors.places if name.endswith(f".{CODES}"))
    if settings is None:
        if modules:
            raise SourceError(
                f"{folder}/config.json: {SETTINGS} is missing, but {modules[0]}.{CODES} holds packed codes "
                f"({len(modules)} such layers); copy it, or {_BESIDE}, from where the checkpoint was quantized"
            )
        return tensors
    bits, offset = _checked(where, settings)
    if not modules:
        return tensors
    shapes = tensors.shapes()
    stated = None if settings.get("dynamic") else bits  # GPTQModel's rules may give some layers other bits
    problems: list[str] = []
    layers: dict[str, Layer] = {}
    for module in modules:
        found = list(_problems(module, tensors, shapes, stated))
        problems += found
        if not found:
            layers[f"{module}.weight"] = _layer(module, shapes)
    if problems:
        shown = "\n  ".join(problems[:10])
        raise SourceError(f"{folder}: {len(problems)} packed tensors are wrong; copy the checkpoint again:\n  {shown}")
    weights = UnpackedWeights(folder, tensors, layers, offset)
    parts = {f"{module}.{part}" for module in modules for part in _TYPES}
    kept = {name: place for name, place in tensors.places.items() if name not in parts}
    counts = ", ".join(sorted({f"{layer.bits} bits" for layer in layers.values()}))
    note = f"GPTQ codes of {len(layers)} layers ({counts}) decoded to float32"
    return Tensors({**kept, **{name: (weights, name) for name in layers}}, (*tensors.notes, note))


def _settings(folder: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """Where it says how the checkpoint was quantized, and what; None if it says nothing."""
    found: dict[str, Any] = {f"{folder}/config.json: {SETTINGS}": config.get(SETTINGS)}
    for key in ("llm_config", "text_config"):
        part = config.get(key)
        if isinstance(part, Mapping):
            found[f"{folder}/config.json: {key}.{SETTINGS}"] = part.get(SETTINGS)
    beside = read_json_object(folder / _BESIDE)
    found[f"{folder}/{_BESIDE}"] = None if beside is None else {"quant_method": METHOD, **beside}
    for where, settings in found.items():
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise SourceError(f"{where}: must be an object, got {settings!r}; copy the checkpoint again")
        return where, settings
    return "", None


def _checked(where: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bits of a code, and what is added to zero points. Raises SourceError for what is not decoded here."""
    method = settings.get("quant_method")
    if method != METHOD:
        raise SourceError(
            f"{where}.quant_method: {one_of(method, (METHOD,))}; convert the checkpoint as it was before it was "
            "quantized, or quantize it with GPTQModel"
        )
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in OFFSETS:
        raise SourceError(
            f"{where}.checkpoint_format: {one_of(layout, OFFSETS)}; save it in one of them with GPTQModel"
        )
    bits = settings.get("bits")
    if bits not in BITS or isinstance(bits, bool):
        allowed = ", ".join(map(str, BITS))
        raise SourceError(f"{where}.bits: {bits!r} is not one of {allowed}; quantize it to one of them with GPTQModel")
    return int(bits), OFFSETS[layout]


def _problems(module: str, tensors: Tensors, shapes: Shapes, bits: int | None) -> Iterator[str]:
    """What keeps a packed layer from being decoded."""
    for part, types in _TYPES.items():
        name = f"{module}.{part}"
        if name not in shapes:
            if part != GROUPS:
                yield f"{name}: missing"
            continue
        if len(shapes[name]) != (1 if part == GROUPS else 2) or 0 in shapes[name]:
            yield f"{name}: {list(shapes[name])}, which is no shape of it"
        elif tensors.dtype(name) not in types:
            allowed = " or ".join(str(each).removeprefix("torch.") for each in types)
            yield f"{name}: {str(tensors.dtype(name)).removeprefix('torch.')}, must be {allowed}"
    if f"{module}.weight" in shapes:
        yield f"{module}.weight: there beside {module}.{CODES}, so it is not clear which is meant"
    if all(len(shapes.get(f"{module}.{part}", ())) == 2 for part in (CODES, ZEROS, SCALES)):
        yield from _misfits(module, shapes, bits)


def _misfits(module: str, shapes: Shapes, bits: int | None) -> Iterator[str]:
    (words, rows), (groups, zero_words) = shapes[f"{module}.{CODES}"], shapes[f"{module}.{ZEROS}"]
    told = ", ".join(f"{part} {list(shapes[f'{module}.{part}'])}" for part in _TYPES if f"{module}.{part}" in shapes)
    found = _bits(rows, zero_words)
    if found not in BITS or (bits is not None and found != bits) or not fills_words(rows, found):
        yield f"{module}: {told} do not fit codes of {bits or ', '.join(map(str, BITS))} bits"
        return
    columns = words * 32 // found
    stated = shapes.get(f"{module}.{GROUPS}", (columns,))
    whole = f"{module}.{GROUPS}" in shapes or (groups > 0 and columns % groups == 0)
    if shapes[f"{module}.{SCALES}"] != (groups, rows) or stated != (columns,) or not whole:
        yield f"{module}: {told} do not fit together"


def _bits(rows: int, zero_words: int) -> int:
    """Zero points of all rows fill their words, so their shape says how many bits a code has."""
    return zero_words * 32 // max(1, rows)


def _layer(module: str, shapes: Shapes) -> Layer:
    words, rows = shapes[f"{module}.{CODES}"]
    bits = _bits(rows, shapes[f"{module}.{ZEROS}"][1])
    return Layer(module, bits, rows, words * 32 // bits, f"{module}.{GROUPS}" in shapes)
