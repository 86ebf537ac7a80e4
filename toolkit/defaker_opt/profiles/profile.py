"""The straight line of a profile: measure, trace, count, and put together."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defaker_opt import __version__
from defaker_opt.device import Device
from defaker_opt.machine import Machine, read_machine
from defaker_opt.profiles.compare import Comparison, compare_samples, stage_names
from defaker_opt.profiles.energy import Energy, find_meter, measure_energy, read_temperature, wait_for_steady_heat
from defaker_opt.profiles.fresh import Fresh, measure_fresh
from defaker_opt.profiles.measure import (
    Progress,
    Sample,
    Throughput,
    judge_in_turns,
    measure_throughput,
)
from defaker_opt.profiles.operators import StageOperators, measure_operators
from defaker_opt.profiles.ratios import Quantiles, quantiles
from defaker_opt.runtime import Build, open_session
from defaker_opt.runtime.engines import TORCH, backend_of, stand_in
from defaker_opt.runtime.recording import Call, record_calls

FORMAT = 1
_HEAT_SECONDS = 120.0


@dataclass(frozen=True)
class Settings:
    """How to measure. images: how many pictures; repeat: rounds over all of them after `warm_up` rounds.

    gate: fake probability from which masks are made; 0 makes every stage run. threads: 0 = one a core. fresh: new
    processes for cold starts. seconds: of each meter's and each peak's measurement.
    """

    images: int
    repeat: int
    warm_up: int = 2
    gate: float = 0.0
    threads: int = 0
    fresh: int = 3
    seconds: float = 2.0


@dataclass(frozen=True)
class BuildFacts:
    """Which build it was. bytes: of the folder, and of each stage."""

    name: str
    digest: str
    recipe: str
    source: str
    target: str
    trained: bool
    bytes: int
    stage_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """One build. stages: the costliest first. covered: share of an image's time inside some stage, the median.

    timeline: of the sample with the median latency, milliseconds.
    """

    build: BuildFacts
    samples: tuple[Sample, ...]
    total: Quantiles
    stages: Mapping[str, Quantiles]
    covered: float
    timeline: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Profile:
    """Everything that was measured; what could not be says so instead of holding a number.

    operators, roofline: by stage; empty where the backend or a missing package keeps them from being known, which
    `missing` then says. other, comparison: of the build it was compared with.
    """

    format: int
    version: str
    measured_at: str
    machine: Machine
    settings: Settings
    measured: Measured
    throughput: tuple[Throughput, ...]
    fresh: Fresh
    energy: Energy
    operators: tuple[StageOperators, ...]
    roofline: tuple[Any, ...]
    peaks: Any
    target: str
    missing: tuple[str, ...]
    other: Measured | None = None
    comparison: Comparison | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints and `--diff` reads; samples without their timelines."""
        data = dataclasses.asdict(self)
        for side in filter(None, (data["measured"], data["other"])):
            for sample in side["samples"]:
                del sample["timeline"]
        data["samples"] = data["measured"].pop("samples")
        for row, stage in zip(data["roofline"], self.roofline):
            for name in ("floor", "target"):
                floor = getattr(stage, name)
                row[name] = None if floor is None else {**row[name], "ms": floor.ms, "bound": floor.bound}
        found: dict[str, Any] = _finite(data)
        return found


def _finite(data: Any) -> Any:
    """Infinite bounds of intervals as null: JSON has no infinity."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def profile_build(
    build: Build,
    images: Sequence[Image.Image],
    settings: Settings,
    progress: Progress,
    other: Build | None = None,
    target: tuple[str, Device] | None = None,
) -> Profile:
    """Measure one build, or two in turns; a target adds the floor that its device would have."""
    machine = read_machine(build.folder)
    builds = [build, *([other] if other else [])]
    sessions = [open_session(each, settings.threads) for each in builds]
    taken = judge_in_turns(
        sessions, images, settings.gate, settings.warm_up, settings.repeat, _part(progress, 0.0, 0.5)
    )
    measured = [summarize(each, samples) for each, samples in zip(builds, taken)]
    for session in sessions[1:]:
        session.close()
    progress("operators", 0.5)
    calls = record_calls(build, images[0], settings.gate, settings.threads)
    operators = measure_operators(sessions[0], calls, repeat=max(3, min(settings.repeat, 10)))
    progress("energy", 0.65)
    energy = _energy(lambda: sessions[0].judge(images[0], settings.gate), machine, settings)
    sessions[0].close()
    progress("throughput", 0.7)
    throughput = measure_throughput(build, images, settings.gate, machine.cores, at_least=6)
    progress("new processes", 0.8)
    fresh = _fresh(build, images[0], settings)
    progress("peaks of the machine", 0.9)
    device = target[1] if target else None
    peaks, roofline, missing = _roofline(build, calls, measured[0], settings, device)
    if backend_of(build) == TORCH and stand_in(build) is None:
        missing = (
            *missing,
            "stages: the GPU works on while the next stage is handed over, so a stage's time ends early",
        )
    if not operators:
        missing = (*missing, f"operators: backend {build.manifest.data['target']['backend']} cannot trace a stage")
    return Profile(
        format=FORMAT,
        version=__version__,
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        settings=settings,
        measured=measured[0],
        throughput=throughput,
        fresh=fresh,
        energy=energy,
        operators=operators,
        roofline=roofline,
        peaks=peaks,
        target=target[0] if target else "",
        missing=missing,
        other=measured[1] if other else None,
        comparison=compare_samples(*taken) if other else None,
    )


def _part(progress: Progress, start: float, share: float) -> Progress:
    return lambda what, fraction: progress(what, start + share * fraction)


def summarize(build: Build, samples: Sequence[Sample]) -> Measured:
    """Quantiles of each stage, over the samples in which it ran."""
    totals = [sample.latency_ms["total"] for sample in samples]
    middle = sorted(samples, key=lambda sample: sample.latency_ms["total"])[len(samples) // 2]
    stages = {
        name: quantiles([sample.latency_ms[name] for sample in samples if name in sample.latency_ms])
        for name in stage_names(samples)
    }
    covered = float(np.median([_covered(sample) for sample in samples]))
    return Measured(build_facts(build), tuple(samples), quantiles(totals), stages, covered, middle.timeline)


def _covered(sample: Sample) -> float:
    """Share of the whole during which at least one stage ran."""
    busy, until = 0.0, 0.0
    for _, begin, end in sample.timeline:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / sample.latency_ms["total"]


def build_facts(build: Build) -> BuildFacts:
    """What a build says of itself, and the size of its folder."""
    data = build.manifest.data
    return BuildFacts(
        name=build.folder.resolve().name,
        digest=build.digest,
        recipe=data["recipe"]["name"],
        source=data["source"]["name"],
        target=data["target"]["name"],
        trained=build.manifest.trained,
        bytes=sum(path.stat().st_size for path in build.folder.iterdir()),
        stage_bytes={stage: entry["bytes"] for stage, entry in data["stages"].items()},
    )


def _energy(judge: Callable[[], object], machine: Machine, settings: Settings) -> Energy:
    meter = find_meter()
    if machine.jetson:
        import time

        wait_for_steady_heat(read_temperature, judge, _HEAT_SECONDS, time.monotonic)
    return measure_energy(meter, judge, settings.seconds * 2, settings.seconds)


def _fresh(build: Build, image: Image.Image, settings: Settings) -> Fresh:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        image.save(path)
        return measure_fresh(build.folder, path, settings.gate, settings.threads, settings.fresh)


def _roofline(
    build: Build, calls: Sequence[Call], measured: Measured, settings: Settings, device: Device | None
) -> tuple[Any, tuple[Any, ...], tuple[str, ...]]:
    """Peaks, a roofline for each stage, and what is missing; counting needs the package onnx."""
    if importlib.util.find_spec("onnx") is None:
        return None, (), ("roofline and peaks: counting work needs the package onnx; pip install onnx",)
    from defaker_opt.profiles.peaks import measure_peaks
    from defaker_opt.profiles.roofline import stage_roofline
    from defaker_opt.profiles.work import add_work, count_file

    peaks = measure_peaks(settings.threads, settings.seconds)
    rows = []
    for stage in dict.fromkeys(call.stage for call in calls):
        own = [call for call in calls if call.stage == stage]
        parts = [
            count_file(
                build.folder / f"{stage}.onnx",
                {name: array.shape for name, array in call.tensors.items()},
                call.outputs,
            )
            for call in own
        ]
        found = measured.stages.get(stage)
        # Measured over all pictures, counted on the first: both are of the first only if there is just one.
        first = [s.latency_ms[stage] for s in measured.samples if s.image == 0 and stage in s.latency_ms]
        spent = float(np.median(first)) if first else (found.median if found else 0.0)
        rows.append(stage_roofline(stage, add_work(parts), spent, peaks, device))
    return peaks, tuple(rows), ()


def pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """Read pictures, or draw the one that builds test themselves with. Raises ImageError."""
    from defaker_opt.runtime.images import load_image
    from defaker_opt.sample import sample_image

    return [load_image(str(path)) for path in paths] or [Image.fromarray(sample_image())]
