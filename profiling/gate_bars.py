"""Does the gate see a planted regression on a real suite? And does an identical build pass?

    python profiling/gate_bars.py exported/reference-int8 exported/reference-float32 [--suite embedded] [--trials 40]

The suite is judged by the build and by its reference as `validate` does, and rows come from its cache. Then verdicts
of the build are turned round on pictures drawn at random, so that its accuracy drops by exactly --drop against the
reference; its rows, with all else left as it is, are decided on as always. --trials draws are made for each number of
flips. The last line is one JSON object; the exit code is 1 if a planted regression was accepted, or the identical
build was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from defaker_opt.cli.progress import progress_bar
from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.rows import ImageRow, Problem
from defaker_opt.drift.validate import Comparison, PairedRun
from defaker_opt.files import default_cache_folder
from defaker_opt.limits import Limit
from defaker_opt.progress import part_of
from defaker_opt.report.judge import judge
from defaker_opt.report.validation import Hands, Request, validate_build
from defaker_opt.report.values import Figure
from defaker_opt.runtime import open_build

METRIC = "verdict_accuracy"
# Verdicts turned to wrong and as many to right, beside the drop.
EXTRA = (0, 5, 20)


@dataclasses.dataclass(frozen=True)
class Planted(PairedRun):
    """Rows of a pair of builds, the candidate's verdicts turned round on `turned`; or the reference twice."""

    rows: tuple[PairRow | Problem, ...]
    turned: frozenset[str]

    def __iter__(self) -> Iterator[PairRow | Problem]:
        for row in self.rows:
            turn = isinstance(row, PairRow) and row.key in self.turned
            yield dataclasses.replace(row, candidate=turned_round(row.candidate)) if turn else row  # type: ignore[type-var, union-attr]


def turned_round(row: ImageRow) -> ImageRow:
    """The same picture with the other verdict, as sure as before."""
    logits = (*row.verdict_logits[4:], *row.verdict_logits[:4])
    other = 1 - row.predicted
    return dataclasses.replace(
        row,
        predicted=other,  # type: ignore[arg-type]
        fake_probability=1 - row.fake_probability,
        verdict_logits=logits,
    )


def draw_turned(rows: list[PairRow], net: int, extra: int, random: np.random.Generator) -> frozenset[str]:
    """Keys of `net + extra` pictures that are right with both builds, and `extra` that are wrong with both."""
    right = [row.key for row in rows if not row.flipped and row.reference.predicted == row.label]
    wrong = [row.key for row in rows if not row.flipped and row.reference.predicted != row.label]
    if net < 0 or net + extra > len(right) or extra > len(wrong):
        raise SystemExit(
            f"{net + extra} of {len(right)} right and {extra} of {len(wrong)} wrong verdicts cannot be turned; "
            "give a larger --drop than the build has, or a larger suite"
        )
    losses, gains = random.permutation(right)[: net + extra], random.permutation(wrong)[:extra]
    return frozenset(map(str, (*losses, *gains)))


def decide_on(comparison: Comparison, planted: Planted, limit: Limit) -> tuple[str, Figure]:
    """The decision for accuracy alone, and its figure."""
    report = judge(dataclasses.replace(comparison, runs=(planted,), noise=()), {METRIC: limit})
    figure = next(figure for figure in report.suites[0].figures if figure.metric == METRIC)
    return report.decision, figure


def plant(comparison: Comparison, drop: float, extra: int, trials: int, limit: Limit) -> dict[str, Any]:
    """Decisions over the trials, and how many images the undecided ones ask for."""
    paired = comparison.runs[0]
    rows = tuple(paired)
    pairs = [row for row in rows if isinstance(row, PairRow)]
    now = sum(int(row.reference.predicted == row.label) - int(row.candidate.predicted == row.label) for row in pairs)
    net = round(drop * len(pairs)) - now
    decisions, asked = Counter[str](), []
    for trial in range(trials):
        turned = draw_turned(pairs, net, extra, np.random.default_rng((extra, trial)))
        decision, figure = decide_on(comparison, Planted(paired.reference, paired.candidate, rows, turned), limit)
        decisions[decision] += 1
        assert figure.check is not None and round(figure.drop * len(pairs)) == round(drop * len(pairs))
        if decision == "UNDECIDED" and figure.check.images:
            asked.append(figure.check.images)
    return {"drop": drop, "turned": net + 2 * extra, "decisions": dict(decisions), "images_asked": sorted(set(asked))}


def identical(comparison: Comparison, limit: Limit) -> dict[str, Any]:
    """The reference against its own rows."""
    rows = tuple(
        dataclasses.replace(row, candidate=row.reference, mask_agreement=1.0) if isinstance(row, PairRow) else row
        for row in comparison.runs[0]
    )
    paired = comparison.runs[0]
    planted = Planted(paired.reference, paired.candidate, rows, frozenset())
    decision, figure = decide_on(comparison, planted, limit)
    assert figure.check is not None
    return {"decision": decision, "low": figure.check.low, "high": figure.check.high}


def show(same: dict[str, Any], planted: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("candidate", "ACCEPT", "REJECT", "UNDECIDED", "images asked for"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    table.add_row(
        "identical", *("1" if same["decision"] == name else "0" for name in ("ACCEPT", "REJECT", "UNDECIDED"))
    )
    for row in planted:
        counts = (str(row["decisions"].get(name, 0)) for name in ("ACCEPT", "REJECT", "UNDECIDED"))
        asked = f"{row['images_asked'][0]:,} … {row['images_asked'][-1]:,}" if row["images_asked"] else ""
        table.add_row(f"{row['drop']:.1%} lost, {row['turned']} turned", *counts, asked)
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("reference")
    parser.add_argument("--suite", default="embedded")
    parser.add_argument("--drop", type=float, default=0.01)
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--trials", type=int, default=40)
    arguments = parser.parse_args()
    limit, started = Limit(arguments.max_drop, 0.95), time.time()
    request = Request((arguments.suite,), None, (), "calibration", 0, "", default_cache_folder())
    candidate, hands, limits = open_build(arguments.build), Hands("processes", 0, 0), {METRIC: limit}
    with progress_bar() as progress:
        judged = validate_build(candidate, arguments.reference, request, hands, limits, part_of(progress, 0.0, 0.7))
        same, planted = identical(judged.comparison, limit), []
        for place, extra in enumerate(EXTRA):
            progress(f"plant regressions, {extra} more turned each way", 0.7 + 0.1 * place)
            planted.append(plant(judged.comparison, arguments.drop, extra, arguments.trials, limit))
    show(same, planted, f"{arguments.suite}, limit {arguments.max_drop:.1%}, {arguments.trials} draws each")
    facts = {"suite": arguments.suite, "max_drop": arguments.max_drop, "trials": arguments.trials}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    seconds = {"seconds": round(time.time() - started)}
    print(
        json.dumps(
            {**facts, "identical": same, "planted": planted, "machine": machine, "versions": versions, **seconds}
        )
    )
    return int(same["decision"] != "ACCEPT" or any("ACCEPT" in row["decisions"] for row in planted))


if __name__ == "__main__":
    raise SystemExit(main())
