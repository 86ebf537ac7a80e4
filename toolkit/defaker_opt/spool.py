"""Codes of quantized weights kept on disk, so that a detector of any size needs memory for one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.methods import FP8, QuantizedWeight, Scheme, parse_scheme

_CODES, _SCALE, _ZERO, _FACTOR = ".codes.npy", ".scale.npy", ".zero.npy", ".factor.npy"
_INPUT = ".input.npy"


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
        if self.schemes[name].floating:
            codes = codes.view(FP8)
        scale = np.load(f"{place}{_SCALE}", allow_pickle=False)
        zero, factor = (_load_if_there(Path(f"{place}{end}")) for end in (_ZERO, _FACTOR))
        given = _load_if_there(Path(f"{place}{_INPUT}"))
        input_scale = None if given is None else float(given)
        return QuantizedWeight(codes, scale, self.schemes[name], zero, factor, input_scale)

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        place = self._place(name, weight.scheme)
        # The codes come last: where they are, a weight is complete.
        given = None if weight.input_scale is None else np.float64(weight.input_scale)
        beside = (weight.zero, _ZERO), (weight.input_factor, _FACTOR), (given, _INPUT)
        # Files of arrays know no FP8, but any byte.
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
        for end in (_CODES, _SCALE, _ZERO, _FACTOR, _INPUT):
            Path(f"{place}{end}").unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)

    def _place(self, name: str, scheme: Scheme) -> Path:
        return self.folder / f"{name}.{scheme}"


def _load_if_there(path: Path) -> NDArray[Any] | None:
    if not path.is_file():
        return None
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array
