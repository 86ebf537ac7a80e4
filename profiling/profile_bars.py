"""Does `profile` keep its promises? Overhead, agreement of equal builds, a planted slowdown, and what operators cover.

    python profiling/profile_bars.py BUILD [--trials 20] [--rounds 12]

Every trial runs the same build twice in turns; a planted slowdown is a pause after each call of the vision encoder, a
tenth as long as the call. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from defaker_opt.machine import read_machine
from defaker_opt.profiles.compare import compare_samples, diff_results
from defaker_opt.profiles.measure import judge_in_turns
from defaker_opt.profiles.operators import measure_operators
from defaker_opt.profiles.profile import summarize
from defaker_opt.runtime import Session, open_build, open_session
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.recording import record_calls
from defaker_opt.sample import sample_image

SLOW = "vision_encoder"


@dataclass
class SlowerSession(Session):
    """A session whose vision encoder takes a tenth longer."""

    def run(
        self, stage: str, tensors: Mapping[str, Any], clock: Clock, outputs: tuple[str, ...] = ()
    ) -> dict[str, np.ndarray]:
        """See `Session`."""
        started = time.perf_counter()
        done = super().run(stage, tensors, clock, outputs)
        if stage == SLOW:
            until = time.perf_counter() + 0.1 * (time.perf_counter() - started)
            with clock(stage):
                while time.perf_counter() < until:
                    pass
        return done


def nothing(what: str, part: float) -> None:
    pass


def overhead(session: Session, image: Image.Image, count: int) -> float:
    """Milliseconds that harness and spans add to an image, over an image's milliseconds."""
    samples = judge_in_turns([session], [image], 0.0, 1, count, nothing)[0]
    spans = len(samples[0].timeline)
    clock, started = Clock(), time.perf_counter()
    for _ in range(1000):
        with clock("x"):
            pass
    a_span = (time.perf_counter() - started) / 1000 * 1e3
    return spans * a_span / float(np.median([sample.latency_ms["total"] for sample in samples]))


def as_result(samples: Any) -> dict[str, Any]:
    rows = [{"round": s.round, "image": s.image, "latency_ms": dict(s.latency_ms)} for s in samples]
    machine = {"processor": "", "cores": 0, "power_mode": "", "jetson": "", "versions": {}}
    return {"samples": rows, "settings": {"images": 1, "gate": 0.0}, "machine": machine, "peaks": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--planted", type=int, default=60, help="rounds in which the planted slowdown has to be found")
    arguments = parser.parse_args()
    build, image = open_build(arguments.build), Image.fromarray(sample_image())
    session, twin, slower = open_session(build), open_session(build), SlowerSession(build)
    agree = []
    for _ in range(arguments.trials):
        taken = judge_in_turns([session, twin], [image], 0.0, 1, arguments.rounds, nothing)
        agree.append(not compare_samples(*taken).total.ratio.differs)
    taken = judge_in_turns([session, slower], [image], 0.0, 1, arguments.planted, nothing)
    found, kept = compare_samples(*taken), diff_results(*map(as_result, taken))
    by_name = {change.stage: change for change in found.stages}
    measured = summarize(build, taken[0])
    operators = measure_operators(session, record_calls(build, image, 0.0), repeat=10)
    results = {
        "overhead": overhead(session, image, 5),
        "trials": arguments.trials,
        "trials_whose_interval_has_1": sum(agree),
        "planted_stage_ratio": [by_name[SLOW].ratio.value, by_name[SLOW].ratio.low, by_name[SLOW].ratio.high],
        "compare_blames": found.attributed,
        "diff_blames": kept.attributed,
        "stages_cover": measured.covered,
        "operators_cover": {stage.stage: stage.covered for stage in operators},
        "tracing_us": {stage.stage: 1e3 * stage.tracing_ms for stage in operators},
    }
    table = Table("promise", "measured", title=f"{arguments.build.name}, {measured.total.median:.0f} ms an image")
    for name, value in results.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    machine = read_machine()
    facts = {"machine": machine.fingerprint, "versions": dict(machine.versions), "load_average": os.getloadavg()[0]}
    print(json.dumps({**results, "median_ms": measured.total.median, "rounds": arguments.rounds, **facts}))


if __name__ == "__main__":
    main()
