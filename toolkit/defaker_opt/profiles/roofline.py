"""The least time that a stage's work can take, on the machine at hand or on a target, and what decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from defaker_opt.device import Device
from defaker_opt.profiles.peaks import Peaks
from defaker_opt.profiles.work import Work

# Bytes of a float on a device, by the format that it runs floats in, against 4 in the graph.
_FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_KINDS = {"fp32": "float", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Floor:
    """max(compute_ms, memory_ms), where compute adds up the formats (methods: the roofline of Williams et al. 2009)."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The floor itself."""
        return max(self.compute_ms, self.memory_ms)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What decides it."""
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


@dataclass(frozen=True)
class StageRoofline:
    """achieved: floor on this machine / measured milliseconds, 0…1. target: the floor on the target, if any."""

    stage: str
    work: Work
    measured_ms: float
    floor: Floor | None
    achieved: float | None
    bound: str
    target: Floor | None


def floor_here(work: Work, peaks: Peaks) -> Floor:
    """The floor from rates that were measured in the same run."""
    seconds = sum(count / peaks.rates[kind] for kind, count in work.operations.items())
    return Floor(seconds * 1e3, work.least_bytes / peaks.bandwidth * 1e3)


def floor_on(work: Work, device: Device, efficiency: Mapping[str, float] | None = None) -> Floor:
    """The floor on a device from its stated rates; with `efficiency` (compute, bandwidth) what good engines reach."""
    share = efficiency or {"compute": 1.0, "bandwidth": 1.0}
    seconds = 0.0
    for kind, count in work.operations.items():
        name = device.best_format(_KINDS[kind])
        assert name is not None, f"{kind} on a device that cannot run it"
        seconds += count / (device.peaks[name].value * 1e12)
    floats = _FLOAT_BYTES[device.best_format("float") or "fp32"] / 4
    weights = sum(size * (floats if kind == "fp32" else 1.0) for kind, size in work.weight_bytes.items())
    moved = weights + work.activation_bytes * floats
    return Floor(seconds / share["compute"] * 1e3, moved / (device.bandwidth.value * 1e9) / share["bandwidth"] * 1e3)


def stage_roofline(
    stage: str, work: Work, measured_ms: float, peaks: Peaks | None, device: Device | None
) -> StageRoofline:
    """Put a stage's measured time beside its floors."""
    floor = floor_here(work, peaks) if peaks else None
    target = floor_on(work, device) if device else None
    achieved = floor.ms / measured_ms if floor and measured_ms else None
    decides = floor or target
    bound = decides.bound if decides else "unknown"
    return StageRoofline(stage, work, measured_ms, floor, achieved, bound, target)
