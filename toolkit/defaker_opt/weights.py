"""Tensors by name, read from disk only when asked for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from defaker_opt.errors import SourceError
from defaker_opt.runtime.build import file_sha256

# Layers that end a residual branch are drawn smaller, as deep transformers are initialized (Radford et al. 2019,
# section 2.3), so that the stream is not mostly the last layer's noise.
_BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight", "proj_out.weight")
_BRANCH_GAIN = 0.35

Shapes = Mapping[str, tuple[int, ...]]


class Weights(Protocol):
    """Where a detector's tensors come from."""

    def shapes(self) -> Shapes:
        """Every tensor's shape, without reading any."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored; memory-mapped where the file allows it."""
        ...

    def digest(self) -> str:
        """SHA-256 over all weights."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Safetensors files; never a pickle. `files` says for each tensor where it is."""

    files: Mapping[str, Path]

    def shapes(self) -> Shapes:
        """See `Weights`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self.files.values())):
            with _open(path) as stored:
                shapes.update({name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()})  # noqa: SIM118 - no mapping
        return shapes

    def read(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        with _open(self.files[name]) as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in."""
        return self.read(name).dtype  # memory-mapped: nothing is read

    def digest(self) -> str:
        """See `Weights`."""
        digests = [_digest_of(path, _facts(path)) for path in sorted(set(self.files.values()))]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# Several parts of a job want the hash, and a file of many gigabytes takes a while.
@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, facts: tuple[int, int, int]) -> str:
    return file_sha256(path)


def _facts(path: Path) -> tuple[int, int, int]:
    """What tells a file from one that takes its place later."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True)
class DrawnWeights:
    """Random weights, each drawn from the seed and its own name: the same in any order and on any machine."""

    drawn: Shapes
    seed: int

    def shapes(self) -> Shapes:
        """See `Weights`."""
        return self.drawn

    def read(self, name: str) -> torch.Tensor:
        """Norm-like vectors near 1, everything else normal with variance 1 / fan-in; float16-exact float32."""
        shape = self.drawn[name]
        key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:8], "little")))
        values = generator.standard_normal(shape, np.float32)
        if len(shape) == 1 and not name.endswith("bias"):
            values = 1 + 0.1 * values
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            values *= 0.02 if len(shape) == 1 else fan_in**-0.5
        if name.endswith(_BRANCH_ENDS):
            values *= _BRANCH_GAIN
        return torch.from_numpy(values.astype(np.float16).astype(np.float32))

    def dtype(self, name: str) -> torch.dtype:
        """The type tensors are drawn in."""
        return torch.float32

    def digest(self) -> str:
        """See `Weights`."""
        text = json.dumps([self.seed, sorted((name, list(shape)) for name, shape in self.drawn.items())])
        return hashlib.sha256(text.encode()).hexdigest()


def open_weights(folder: Path) -> StoredWeights:
    """The safetensors of a folder: one file, or shards with an index. Raises SourceError naming what is missing."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        return StoredWeights(_read_index(index))
    if single.is_file():
        return open_weights_file(single)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = f" ({', '.join(others)} would have to be unpickled, which is never done)" if others else ""
    raise SourceError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is in it{hint}")


def open_weights_file(path: Path) -> StoredWeights:
    """One safetensors file. Raises SourceError."""
    with _open(path) as stored:
        return StoredWeights(dict.fromkeys(stored.keys(), path))


def _read_index(index: Path) -> dict[str, Path]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{index}: not a safetensors index ({error}); copy the checkpoint again") from error
    for path in sorted(set(files.values())):
        if path.parent != index.parent:
            raise SourceError(f"{index}: names {path}, a file outside its folder; copy the checkpoint again")
        with _open(path) as stored:
            claimed = {name for name, place in files.items() if place == path}
            _same_names(path, claimed, stored.keys())
    return files


def _same_names(path: Path, claimed: set[str], stored: Iterable[str]) -> None:
    differing = sorted(claimed.symmetric_difference(stored))
    if differing:
        where = (
            "named in the index but not in the file" if differing[0] in claimed else "in the file but not in the index"
        )
        raise SourceError(
            f"{path}: {differing[0]} is {where} ({len(differing)} such tensors); copy the checkpoint again"
        )


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: cannot be read ({error}); is it complete?") from error
