"""Codes of quantized weights kept on disk, so that a detector of any size needs memory for one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.files import read_json_object, write_json
from defaker_opt.methods import QuantizedWeight, Scheme, parse_scheme

_CODES, _SCALE, _ZERO, _FACTOR = ".codes.npy", ".scale.npy", ".zero.npy", ".factor.npy"
_INPUT, _TENSOR = ".input.npy", ".tensor.npy"


class SpooledCodes(MutableMapping[str, QuantizedWeight]):
    """Name of a weight → its codes, in files of a folder. What a killed process had finished is there again.

    Each look-up maps the files anew, and forgets them with the value: hold no more of them than are needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.schemes: dict[str, Scheme] = {}
        for path in folder.glob(f"*{_CODES}"):
            name, _, scheme = path.name.removesuffix(_CODES).rpartition(".")
            if (parsed := parse_scheme(scheme)) is not None and not name.startswith("."):
                self.schemes[name] = parsed

    def __getitem__(self, name: str) -> QuantizedWeight:
        place = self._place(name, self.schemes[name])
        codes: NDArray[Any] = np.load(f"{place}{_CODES}", mmap_mode="r", allow_pickle=False)
        codes = codes.view(self.schemes[name].dtype)
        scale = np.load(f"{place}{_SCALE}", allow_pickle=False)
        zero, factor = (_load_if_there(Path(f"{place}{end}")) for end in (_ZERO, _FACTOR))
        found = (_load_if_there(Path(f"{place}{end}")) for end in (_INPUT, _TENSOR))
        input_scale, tensor_scale = (None if each is None else float(each) for each in found)
        return QuantizedWeight(codes, scale, self.schemes[name], zero, factor, input_scale, tensor_scale)

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        place = self._place(name, weight.scheme)
        # The codes come last: where they are, a weight is complete.
        given, tensor = (None if x is None else np.float64(x) for x in (weight.input_scale, weight.tensor_scale))
        beside = (weight.zero, _ZERO), (weight.input_factor, _FACTOR), (given, _INPUT), (tensor, _TENSOR)
        # Files of arrays know no FP8 and no FP4, but any byte.
        codes = weight.codes.view(np.int8)
        for array, end in (*beside, (weight.scale, _SCALE), (codes, _CODES)):
            if array is None:
                Path(f"{place}{end}").unlink(missing_ok=True)
                continue
            partial = place.with_name(f".{place.name}{end}")
            with partial.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
            os.replace(partial, f"{place}{end}")
        self.schemes[name] = weight.scheme

    def __delitem__(self, name: str) -> None:
        place = self._place(name, self.schemes.pop(name))
        for end in (_CODES, _SCALE, _ZERO, _FACTOR, _INPUT, _TENSOR):
            Path(f"{place}{end}").unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)

    def _place(self, name: str, scheme: Scheme) -> Path:
        return self.folder / f"{name}.{scheme}"


class SpooledScales(MutableMapping[str, tuple[float, float]]):
    """Name of an attention → the steps of its queries and keys, in one small file. Damaged, it holds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = read_json_object(path) or {}
        self.steps: dict[str, tuple[float, float]] = {name: (float(q), float(k)) for name, (q, k) in kept.items()}

    def __getitem__(self, name: str) -> tuple[float, float]:
        return self.steps[name]

    def __setitem__(self, name: str, steps: tuple[float, float]) -> None:
        self.steps[name] = steps
        write_json(self.path, self.steps)

    def __delitem__(self, name: str) -> None:
        del self.steps[name]
        write_json(self.path, self.steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _load_if_there(path: Path) -> NDArray[Any] | None:
    if not path.is_file():
        return None
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array
