"""Facts of a kind of device, as its target states them: how fast it is at best, what it holds, what it can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from defaker_opt.strict import Invalid

# fp4 and int4 of a peak are products of 4-bit codes; 4-bit weights that are widened first run at the wider rate.
Format = Literal["fp32", "bf16", "fp16", "fp8", "fp4", "int8", "int4"]

# Which number formats run a kind of code, the best first. 4-bit weights are widened before the product.
FORMATS_OF = {
    "float": ("fp16", "bf16", "fp32"),
    "int8": ("int8",),
    "int8-token": ("int8",),
    "int8-static": ("int8",),
    "fp8-static": ("fp8",),
    "int4": ("fp16", "bf16", "fp32"),
    "int4-sym": ("fp16", "bf16", "fp32"),
    "nf4": ("fp16", "bf16", "fp32"),
    "nvfp4": ("fp16", "bf16", "fp32"),
    "int8-outlier": ("int8",),
}


def _positive(value: float) -> str | None:
    return None if value > 0 else f"must be above 0, got {value}"


@dataclass(frozen=True)
class Fact:
    """A number with where it comes from.

    evidence: "published" by the maker or the project that is named; "measured"; "computed" from published figures as
    the source says; "unverified" where nobody has checked it, which every output repeats.
    """

    value: float
    source: str
    evidence: Literal["published", "measured", "computed", "unverified"]

    CHECKS: ClassVar[Mapping[str, Callable[[float], str | None]]] = {"value": _positive}


@dataclass(frozen=True)
class PowerMode:
    """A setting of the device's own power tool; watts: its budget, or none where it is not limited."""

    name: str
    watts: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a detector may take on this device unless the user says otherwise.

    memory_share: of the device's memory, the rest belongs to the system. latency_ms: an image, with its mask.
    """

    memory_share: float = 0.75
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.memory_share <= 1:
            raise Invalid(f"memory_share must be above 0 and at most 1, got {self.memory_share}")


@dataclass(frozen=True)
class Efficiency:
    """Shares of the roofline that good engines reach there today: of the peak rate, and of the bandwidth."""

    compute: Fact
    bandwidth: Fact

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth"):
            if getattr(self, name).value > 1:
                raise Invalid(f"{name} is a share, at most 1, got {getattr(self, name).value}")


@dataclass(frozen=True)
class Device:
    """peaks: dense 10¹² operations a second by format. bandwidth: 10⁹ bytes a second. memory: 10⁹ bytes.

    formats: what may run there at all, also through a format without a peak of its own. shared_memory: whether CPU and
    GPU share it. versions: of the software that the figures hold for ("jetpack", "tensorrt", "cuda", "sm" …).
    engine_build_memory: what building a stage's engine on the device takes, in sizes of its weights; 0 without one.
    """

    kind: Literal["cpu", "jetson", "gpu", "browser"]
    architecture: Literal["x86_64", "aarch64", "wasm32"]
    memory: Fact
    bandwidth: Fact
    peaks: dict[str, Fact]
    formats: tuple[Format, ...]
    efficiency: Efficiency
    shared_memory: bool = False
    instructions: tuple[str, ...] = ()
    power_modes: tuple[PowerMode, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    engine_build_memory: float = 0.0
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        if "fp32" not in self.formats and "fp16" not in self.formats:
            raise Invalid("formats must have fp32 or fp16; some weights always stay float")
        stray = [name for name in self.peaks if name not in self.formats]
        if stray:
            raise Invalid(
                f"peaks.{stray[0]}: not among formats, {', '.join(self.formats)}; remove it or add the format"
            )
        if not self.peaks:
            raise Invalid("peaks must have the rate of at least one format")
        if self.kind == "jetson" and "jetpack" not in self.versions:
            raise Invalid("versions.jetpack: missing; a Jetson's engines depend on it")

    def best_format(self, kind: str) -> str | None:
        """The format that a kind of code ("float", "int8" …) runs in there; None if it cannot."""
        return next((name for name in FORMATS_OF[kind] if name in self.peaks), None)

    def unverified(self) -> tuple[str, ...]:
        """The names of facts that nobody has checked."""
        facts = {"memory": self.memory, "bandwidth": self.bandwidth}
        facts |= {f"peaks.{name}": fact for name, fact in self.peaks.items()}
        facts |= {"efficiency.compute": self.efficiency.compute, "efficiency.bandwidth": self.efficiency.bandwidth}
        return tuple(name for name, fact in facts.items() if fact.evidence == "unverified")
