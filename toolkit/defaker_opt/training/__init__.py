"""Teach a whole joint detector on forgeries that are drawn as it learns.

    pair numbers ─► worker processes ─► batches of one tile count ─► model ─► losses ─► AdamW ─► averaged weights
                                                                                                └─► detector folder

`Plan` says everything that decides what is learnt; the same plan on the same machine gives the same weights, also
when it is interrupted. How fast it is done (device, workers) is said apart from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from defaker_opt.errors import DefakerError, one_of
from defaker_opt.forgery import Split


@dataclass(frozen=True)
class Parts:
    """Which paths of the joint model run. Without the verdict's, [SEG] is the bias its projection ends with.

    sight: the vision tower alone, judged by a head of its own. windows: the tower's heads look at the windows that
    drawn ones begin with (`positions`), faster than attention; queries and keys learn nothing. rate: what
    a plan's learning rate is multiplied by; a tower bears a higher one than decoders.
    """

    sight: bool = False
    verdict: bool = False
    mask: bool = False
    windows: bool = False
    rate: float = 1.0


PHASES = MappingProxyType(
    {
        "mask": Parts(mask=True),
        "sight": Parts(sight=True, windows=True, rate=4.0),
        "answer": Parts(verdict=True, windows=True),
        "verdict": Parts(verdict=True),
        "joint": Parts(verdict=True, mask=True),
    }
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training. name: one of PHASES; images: how many it shows, both twins counted."""

    name: str
    images: int


@dataclass(frozen=True)
class PairSource:
    """Which pairs are drawn. size: longest side of a picture, px; distinct: so many pairs come in turn, 0 = all new."""

    seed: int = 0
    split: Split = "train"
    folders: tuple[Path, ...] = ()
    size: int = 512
    distinct: int = 0


# What products are computed in; weights, losses and averages are float32 in either.
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """What is learnt, and how. Rates are those of AdamW (Loshchilov and Hutter 2019); intervals are in images.

    learning_rate: times the phase's own `rate`, reached after `warmup` of its steps, then down a half cosine to a
    hundredth.
    clip: largest norm of all gradients. average: share that the averaged weights keep at each step.
    """

    phases: tuple[Phase, ...]
    source: PairSource = PairSource()
    pairs_per_batch: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 0.02
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.998
    evaluation_pairs: int = 48
    evaluate_every: int = 4000
    checkpoint_every: int = 2000
    log_every: int = 160
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _above_zero(self, "pairs_per_batch", "learning_rate", "clip", "evaluation_pairs")
        _above_zero(self, "evaluate_every", "checkpoint_every", "log_every")
        for name in ("weight_decay", "warmup", "average"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise DefakerError(f"{name}: must be in [0, 1), got {value}")
        if self.precision not in PRECISIONS:
            raise DefakerError(f"precision: {one_of(self.precision, PRECISIONS)}")

    @property
    def images(self) -> int:
        """Images of all phases."""
        return sum(phase.images for phase in self.phases)

    @property
    def steps(self) -> int:
        """Steps of all phases; a phase ends with a whole batch."""
        return sum(map(self.steps_of, self.phases))

    def steps_of(self, phase: Phase) -> int:
        """Steps of one phase."""
        return math.ceil(phase.images / (2 * self.pairs_per_batch))

    def phase_of(self, step: int) -> Phase:
        """The phase that a step belongs to, 0 <= step < steps."""
        return self._located(step)[0]

    def span_of(self, step: int) -> tuple[int, int]:
        """First step of the phase that a step belongs to, and how many it has."""
        phase, start = self._located(step)
        return start, self.steps_of(phase)

    def _located(self, step: int) -> tuple[Phase, int]:
        start = 0
        for phase in self.phases:
            if step < start + self.steps_of(phase):
                return phase, start
            start += self.steps_of(phase)
        raise AssertionError(f"step {step} of {self.steps}")


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Read phases: "mask:20000,joint:80000". Raises DefakerError for anything else."""
    return tuple(_parse_phase(part) for part in text.split(","))


def _parse_phase(text: str) -> Phase:
    name, _, count = text.strip().partition(":")
    if name not in PHASES:
        raise DefakerError(f"stages: {one_of(name, PHASES)}; write for example mask:20000,joint:80000")
    if not count.isdecimal() or int(count) == 0:
        raise DefakerError(f"stages: {name} needs a number of images above 0, got {count!r}; write {name}:20000")
    return Phase(name, int(count))


def _above_zero(plan: Plan, *names: str) -> None:
    for name in names:
        value = getattr(plan, name)
        if not 0 < value < math.inf:
            raise DefakerError(f"{name}: must be above 0, got {value}")
