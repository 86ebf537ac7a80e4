"""SmoothQuant (Xiao et al. 2023): move large channels of activations into weights, where they cost less.

A channel that a norm writes (or, before `down_proj`, the rows of `up_proj`) is divided by a factor and the columns that
read it are multiplied by it, so that 8-bit activations share one scale with less waste. Factors are powers of two: what
the detector computes in float stays the same to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.errors import PassError
from defaker_opt.methods import Need
from defaker_opt.observe.sweep import observe_layers
from defaker_opt.passes import PassResult, Preview
from defaker_opt.progress import Progress
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import Samples
from defaker_opt.target import Target

# Who writes channels, and who all reads them and nothing else does, by the ends of their names within a block.
_FOLDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("layernorm_after", ("mlp.fc1",)),
    ("projector.0", ("projector.1",)),
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
    # Where a block changes the width, its shortcut reads the norm too.
    ("layer_norm1", ("attn.qkv", "proj")),
    ("layer_norm2", ("mlp.proj_in",)),
)

# Beyond this a factor would only move the trouble.
_LARGEST_POWER = 8


@dataclass(frozen=True)
class Fold:
    """One writer (its `.weight`, and `.bias` if it has one) and the weights of all its readers, by full names."""

    writer: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Smooth:
    """match: glob over the readers' full weight names. strength: 0 leaves activations as they are, 1 evens them out."""

    match: str = "*"
    strength: float = 0.5

    CHECKS: ClassVar[Mapping[str, Callable[[float], str | None]]] = {
        "strength": lambda strength: None if 0 < strength <= 1 else f"must be above 0 and at most 1, got {strength}"
    }

    def check(self, config: DetectorConfig, target: Target) -> Preview:
        """See `Pass`."""
        folds = list(self._folds(config))
        if not folds:
            raise PassError(
                f"smooth: {self.match!r} matches no layer that reads a norm; names look like *.mlp.fc1.weight"
            )
        return Preview({}, {}, f"smooth for {len(folds)} norms")

    def apply(self, detector: Detector, progress: Progress, samples: Samples | None = None) -> PassResult:
        """See `Pass`."""
        assert samples is not None, "check said that pictures are needed"
        # A later pass of a run that was killed may have left codes behind; scales are found as if it had not begun.
        detector = dataclasses.replace(detector, codes={})
        folds = list(self._folds(detector.config))
        by_reader = {fold.readers[0]: fold for fold in folds}
        notes = {}
        wanted: tuple[Need, ...] = ("largest",)
        for group in observe_layers(detector, samples, dict.fromkeys(by_reader, wanted)):
            for reader in by_reader.keys() & group.keys():
                largest = group[reader].largest
                assert largest is not None
                fold = by_reader[reader]
                powers = self._powers(largest, [detector.read(name).numpy() for name in fold.readers])
                notes[fold.writer[0]] = int(np.abs(powers).max())
                fold_(detector, fold, powers)
                progress(f"smooth {reader}", len(notes) / len(folds))
        return PassResult({"strength": self.strength, "largest_power_of_two": dict(sorted(notes.items()))})

    def _powers(self, largest: np.ndarray, readers: list[np.ndarray]) -> np.ndarray:
        """log2 of the factor of each channel: max|x|^strength / max|w|^(1 - strength) (section 4, equation 4)."""
        weights = np.max([np.abs(reader).max(axis=0) for reader in readers], axis=0).astype(np.float64)
        alive = (largest > 0) & (weights > 0)
        x, w = np.where(alive, largest, 1.0), np.where(alive, weights, 1.0)
        powers = self.strength * np.log2(x) - (1 - self.strength) * np.log2(w)
        # A factor common to all channels changes nothing; without it they stay near 1.
        powers = powers - np.median(powers[alive]) if alive.any() else powers
        return np.where(alive, np.clip(np.rint(powers), -_LARGEST_POWER, _LARGEST_POWER), 0).astype(np.int64)

    def _folds(self, config: DetectorConfig) -> Iterator[Fold]:
        for stage in STAGES:
            if stage == "mask_decoder":
                continue  # its norms are read by sums as well
            names, linear = parameter_shapes(config, stage), linear_weights(config, stage)
            for name in names:
                for end, readers in _FOLDS:
                    if not name.endswith(f".{end}.weight"):
                        continue
                    place = name.removesuffix(f"{end}.weight")
                    present = tuple(each for reader in readers if (each := f"{place}{reader}.weight") in linear)
                    if present and all(fnmatchcase(each, self.match) for each in present):
                        bias = name.removesuffix("weight") + "bias"
                        yield Fold((name, bias) if bias in names else (name,), present)


def fold_(detector: Detector, fold: Fold, powers: np.ndarray) -> None:
    """Divide what the writer writes by 2^powers, and multiply what the readers read by it; exact."""
    factor = np.exp2(powers).astype(np.float32)
    for name in fold.writer:
        detector.scale_(name, rows=1 / factor)
    for name in fold.readers:
        detector.scale_(name, columns=factor)


PASS = Smooth
