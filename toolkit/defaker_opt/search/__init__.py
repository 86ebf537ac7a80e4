"""Find the number format of every linear layer: the least harm within what a build may weigh and take.

    samples ─► sensitivity: harm of each format to each layer ─┐
    products timed here ─► latency: milliseconds of each ──────┼─► solve: a format a layer ─► recipe ─► build ─► gate
    shapes ─► bytes of each ───────────────────────────────────┘        ▲                                       │
                                                                        └──── half the harm, if it is refused ◄─┘

What comes out is an ordinary recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from defaker_opt.errors import DefakerError, one_of
from defaker_opt.methods import Scheme, SchemeName, parse_scheme
from defaker_opt.target import Target

# What layers are offered, where the target has it. Blocks of 4 bits are fitted with the method that loses least.
OFFERED: tuple[SchemeName, ...] = ("float", "int8", "int8-token", "int4-g128", "int4-g32")

# A build may miss a budget of milliseconds by this share before it counts as missed: the noise of clocks.
TOLERANCE = 0.02

# The outputs that harm is measured at.
LOSSES = ("verdict", "segment", "mask")

# Weight name → scheme name.
Formats = Mapping[str, SchemeName]


@dataclass(frozen=True)
class Offer:
    """What one format would do to one layer.

    harm: of each of LOSSES, see `sensitivity`; bytes: of the stored weight; ms: milliseconds of the layer's calls on
    one picture.
    """

    harm: tuple[float, ...]
    bytes: int
    ms: float


@dataclass(frozen=True)
class Budget:
    """What a build may weigh and take at most: megabytes (10^6 bytes), milliseconds of one picture with its mask."""

    size_mb: float = math.inf
    latency_ms: float = math.inf

    def allows(self, size_mb: float, latency_ms: float) -> bool:
        """Whether both are kept."""
        return size_mb <= self.size_mb and latency_ms <= self.latency_ms

    def __str__(self) -> str:
        limits = ((self.size_mb, "MB"), (self.latency_ms, "ms"))
        return " and ".join(f"at most {value:g} {unit}" for value, unit in limits if math.isfinite(value)) or "no limit"


def parse_budget(texts: Sequence[str]) -> Budget:
    """Of texts like size_mb=12 and latency_ms=40. Raises DefakerError if one is wrong or given twice."""
    known = [field.name for field in dataclasses.fields(Budget)]
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in known:
            raise DefakerError(f"--budget {text}: {one_of(name, known)}")
        if name in found:
            raise DefakerError(f"--budget {text}: {name} given twice; give each one limit")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise DefakerError(f"--budget {text}: must be {name}=NUMBER with a number above 0, such as {name}=20")
        found[name] = value
    return Budget(**found)


@dataclass(frozen=True)
class Ledger:
    """Every layer's offers, and what a build weighs and takes beside its linear layers."""

    offers: Mapping[str, Mapping[SchemeName, Offer]]
    other_bytes: int
    other_ms: float

    def size_mb(self, choice: Formats) -> float:
        """Of the stages that would be built, predicted."""
        return (self.other_bytes + sum(self.offers[name][scheme].bytes for name, scheme in choice.items())) / 1e6

    def latency_ms(self, choice: Formats) -> float:
        """Of one picture, predicted."""
        return self.other_ms + sum(self.offers[name][scheme].ms for name, scheme in choice.items())

    def harm(self, choice: Formats) -> float:
        """Predicted; 1 if every layer had the format that harms it most. Each loss counts alike."""
        worst = self.worst()
        return math.fsum(self.share(self.offers[name][scheme], worst) for name, scheme in choice.items())

    @staticmethod
    def share(offer: Offer, worst: tuple[float, ...]) -> float:
        """What an offer adds to `harm`: its shares of each loss of the worst build, averaged."""
        shares = [mine / whole for mine, whole in zip(offer.harm, worst) if whole > 0]
        return math.fsum(shares) / len(shares) if shares else 0.0

    def uniform(self) -> dict[SchemeName, Formats]:
        """Every layer in one format, as far as it is offered that; the other layers stay float."""
        found = {scheme for offers in self.offers.values() for scheme in offers}
        return {
            scheme: {name: scheme if scheme in offers else "float" for name, offers in self.offers.items()}
            for scheme in OFFERED
            if scheme in found
        }

    def worst(self) -> tuple[float, ...]:
        """Each loss if every layer had the format that harms it most."""
        return tuple(
            math.fsum(max(offer.harm[index] for offer in offers.values()) for offers in self.offers.values())
            for index in range(len(LOSSES))
        )


@dataclass(frozen=True)
class Trial:
    """One build that was tried. predicted and measured: megabytes and milliseconds; harm: see `Ledger.harm`."""

    choice: Formats
    harm: float
    predicted: tuple[float, float]
    measured: tuple[float, float]
    decision: str
    summary: str


@dataclass(frozen=True)
class Search:
    """A search that has ended. front: choices with the least harm for their size; trials: the last is what is left."""

    budget: Budget
    ledger: Ledger
    front: tuple[Formats, ...]
    trials: tuple[Trial, ...]

    @property
    def accepted(self) -> bool:
        """Whether the drift gate accepted the last trial."""
        return self.trials[-1].decision == "ACCEPT"

    @property
    def within_budget(self) -> bool:
        """Whether the last trial, as measured, keeps the budget, but for what clocks explain."""
        size_mb, latency_ms = self.trials[-1].measured
        return self.budget.allows(size_mb, latency_ms / (1 + TOLERANCE))

    def as_json(self) -> dict[str, Any]:
        """For the file beside the build; the front without its choices."""
        points = [
            {
                "size_mb": self.ledger.size_mb(choice),
                "latency_ms": self.ledger.latency_ms(choice),
                "harm": self.ledger.harm(choice),
            }
            for choice in self.front
        ]
        return {
            "accepted": self.accepted,
            "within_budget": self.within_budget,
            "budget": {name: value for name, value in dataclasses.asdict(self.budget).items() if math.isfinite(value)},
            "losses": list(LOSSES),
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "front": points,
            "other_bytes": self.ledger.other_bytes,
            "other_ms": self.ledger.other_ms,
            "offers": {
                name: {scheme: dataclasses.asdict(offer) for scheme, offer in offers.items()}
                for name, offers in self.ledger.offers.items()
            },
        }


def fitted(scheme: SchemeName, columns: int) -> Scheme | None:
    """What a scheme becomes in a layer of so many columns: with the group that fits; None stays in float."""
    parsed = parse_scheme(scheme)
    return parsed.fitted(columns) if parsed else None


def offered_schemes(target: Target, shape: tuple[int, int]) -> tuple[SchemeName, ...]:
    """The formats of OFFERED that a target runs and a weight [out, in] can have, without two that come to the same."""
    found: dict[str, SchemeName] = {}
    for name in OFFERED:
        scheme = fitted(name, shape[1])
        if name == "float":
            found["float"] = name
        elif scheme is not None and scheme.kind in target.kinds:
            found.setdefault(str(scheme), name)
    return tuple(found.values())


# How codes of each format are chosen in recipes that are found; what is not named is rounded to nearest.
METHODS: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "int4-g128": ("gptaq", MappingProxyType({"order": "activation"})),
        "int4-g32": ("gptaq", MappingProxyType({"order": "activation"})),
    }
)
