"""What was released, as one set of named tensors: safetensors, a SAM2 file, LoRA adapters; read only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from defaker_opt.weights import Shapes


class TensorFile(Protocol):
    """Where tensors come from."""

    def shapes(self) -> Shapes:
        """Every tensor's shape, without reading any."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in; no value is read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor; memory-mapped where the file allows it."""
        ...


@dataclass(frozen=True)
class Extras:
    """What belongs to a checkpoint and is not in its folder.

    segmenter: SAM2's weights. adapters: PEFT folders, merged in this order. prompts: a YAML file of texts.
    """

    segmenter: Path | None = None
    adapters: tuple[Path, ...] = ()
    prompts: Path | None = None


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Tensors:
    """Tensors of several files under one name each. places: name → where it is, and its name there."""

    places: Mapping[str, tuple[TensorFile, str]]
    notes: tuple[str, ...] = field(default=())

    def shapes(self) -> Shapes:
        """See `TensorFile`."""
        known: dict[int, Shapes] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (weights, own) in self.places.items():
            if id(weights) not in known:
                known[id(weights)] = weights.shapes()
            shapes[name] = known[id(weights)][own]
        return shapes

    def read(self, name: str) -> torch.Tensor:
        """See `TensorFile`."""
        weights, own = self.places[name]
        return weights.read(own)

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorFile`."""
        weights, own = self.places[name]
        return weights.dtype(own)


def tensors_of(weights: TensorFile) -> Tensors:
    """All tensors of one file or folder, under their own names."""
    return Tensors({name: (weights, name) for name in weights.shapes()})
