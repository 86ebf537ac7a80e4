"""Time each quantized stage of a build against its float32 form here, and take back what does not pay.

Times differ from run to run and builds must not. So a time never enters a build: it decides about the recipe, whose
rules then say which stages stay float, with the reason, and equal recipes give equal builds as ever. The times
themselves lie beside the build.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from defaker_opt.detector import Detector, linear_weights
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.traced import traced_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.pipeline import Job
from defaker_opt.progress import Progress
from defaker_opt.recipe import Recipe
from defaker_opt.runtime.backends import OpenStage, find_backend
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.session import open_session
from defaker_opt.runtime.spec import STAGES
from defaker_opt.stage_build import Tensors, stage_inputs

# A stage pays if it takes at most this share of its float form's time; less than that is noise.
WORTH = 0.97

# Rounds that count; one before them opens what is lazily made.
ROUNDS = 7


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one stage in both forms, round by round; in each round both ran, one after the other."""

    stage: str
    scheme: str
    float_ms: tuple[float, ...]
    quantized_ms: tuple[float, ...]

    @property
    def share(self) -> float:
        """The median over rounds of quantized / float time: what disturbs a round disturbs both."""
        return statistics.median(q / f for q, f in zip(self.quantized_ms, self.float_ms))

    @property
    def pays(self) -> bool:
        """Whether the quantized form is the faster one."""
        return self.share <= WORTH

    def as_json(self) -> dict[str, Any]:
        """For the file beside the build."""
        return {
            **dataclasses.asdict(self),
            "median_float_ms": statistics.median(self.float_ms),
            "median_quantized_ms": statistics.median(self.quantized_ms),
            "share": self.share,
            "pays": self.pays,
        }


def time_stages(job: Job, build: Build, progress: Progress, rounds: int = ROUNDS) -> list[Timing]:
    """Time every stage of a build that has codes, on the sample picture, against a float form written for it."""
    entries: Mapping[str, Any] = build.manifest.data["stages"]
    quantized = [stage for stage in entries if stage in STAGES and entries[stage]["scheme"] != "float"]
    timings = []
    for index, stage in enumerate(quantized):
        progress(f"time {stage}", index / len(quantized))
        session = open_session(build)
        calls = list(stage_inputs(stage, session))
        session.close()
        with tempfile.TemporaryDirectory() as folder:
            plain = _open_float(job, stage, Path(folder))
            outputs = tuple(tensor.name for tensor in session.spec(stage).outputs)
            times = _time_in_turns((plain, session.open_stage(stage)), calls, outputs, rounds)
        session.close()
        timings.append(Timing(stage, entries[stage]["scheme"], *times))
    progress("timed", 1.0)
    return timings


def _open_float(job: Job, stage: str, folder: Path) -> OpenStage:
    plain = Detector(job.detector.config, job.detector.weights, savings=job.recipe.savings)
    graph = traced_stage(plain, stage)
    fill_weights_(graph, plain, job.target.encodings)
    file = write_graph(graph, folder)[0]
    options = dataclasses.asdict(job.target.session)
    return find_backend(job.target.backend).open_stage(file, graph.spec, options)


def _time_in_turns(
    both: tuple[OpenStage, OpenStage], calls: list[Tensors], outputs: tuple[str, ...], rounds: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for opened, taken in zip(both, times):
            started = time.perf_counter()
            for given in calls:
                opened(given, outputs)
            if turn:
                taken.append((time.perf_counter() - started) * 1e3)
    return tuple(times[0]), tuple(times[1])


def keep_float(recipe: Recipe, detector: Detector, timings: list[Timing]) -> Recipe:
    """The recipe with the stages that do not pay in float, and the reason; rules that then match nothing are gone."""
    slow = {timing.stage: timing for timing in timings if not timing.pays}
    reasons = {
        stage: f"{timing.scheme} was not faster than float32 where the build was made" for stage, timing in slow.items()
    }
    passes = tuple(
        _with_float(each, detector, tuple(slow)) if isinstance(each, Quantize) else each for each in recipe.passes
    )
    return dataclasses.replace(recipe, passes=passes, reverted={**recipe.reverted, **reasons})


def _with_float(each: Quantize, detector: Detector, stages: tuple[str, ...]) -> Quantize:
    rules = (*(Rule(f"{stage}.*", "float") for stage in stages), *each.rules)
    names = [name for stage in STAGES for name in linear_weights(detector.config, stage)]
    first = {next((i for i, rule in enumerate(rules) if fnmatchcase(name, rule.match)), None) for name in names}
    kept = dataclasses.replace(each, rules=tuple(rule for i, rule in enumerate(rules) if i in first))
    return kept if kept.attentions(detector.config) else dataclasses.replace(kept, scores=None)
