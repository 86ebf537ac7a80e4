"""Looks: the order of pictures, whole twins, early answers, and what stops a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest

from defaker_opt.benchmarks import Benchmark
from defaker_opt.drift.rows import ImageRow
from defaker_opt.drift.validate import Comparison, PairedRun
from defaker_opt.errors import DefakerError
from defaker_opt.limits import Limit
from defaker_opt.report.sequential import LOOKS, Compare, Stopped, cluster_unit, look_ends, run_looks, shuffled
from tests.drift_rows import Change, benchmark_of, comparison_of, flip, judged, same, synthetic_rows

ACCURACY = {"verdict_accuracy": Limit(0.02)}


@pytest.fixture(scope="module")
def rows() -> tuple[ImageRow, ...]:
    return synthetic_rows(600)


def comparing(rows: tuple[ImageRow, ...], change: Change, folder: Path) -> Compare:
    by_key = {row.key: (row, change(place, row)) for place, row in enumerate(rows)}

    def compare(suites: tuple[Benchmark, ...]) -> Comparison:
        [suite] = suites
        sides = zip(*(by_key[item.key] for item in suite.items))
        reference, build = (judged(side, suite) for side in sides)
        return comparison_of([PairedRun(reference, build)], folder)

    return compare


def looks_of(rows: tuple[ImageRow, ...], change: Change, folder: Path, limits: dict[str, Limit]) -> Stopped:
    return run_looks([benchmark_of(rows)], limits, comparing(rows, change, folder))


def test_order_is_by_chance_alike_every_time_and_twins_stay_together(rows: tuple[ImageRow, ...]) -> None:
    suite = benchmark_of(rows)
    mixed = shuffled(suite)
    assert mixed == shuffled(suite)
    assert mixed.items != suite.items
    assert Counter(item.key for item in mixed.items) == Counter(item.key for item in suite.items)
    for first, second in zip(mixed.items[::2], mixed.items[1::2], strict=True):
        assert first.pair == second.pair
    ends = look_ends(mixed)
    assert len(ends) == LOOKS
    assert ends[-1] == 1200
    assert all(end % 2 == 0 for end in ends)
    photographs = dataclasses.replace(
        suite, items=tuple(dataclasses.replace(item, source=item.key[:4]) for item in suite.items)
    )
    by_photograph = shuffled(photographs)
    assert cluster_unit(by_photograph) == "photograph"
    sources = [item.source for item in by_photograph.items]
    assert sum(first != second for first, second in itertools.pairwise(sources)) == 59
    assert all(end % 20 == 0 for end in look_ends(by_photograph))
    odd = shuffled(benchmark_of(rows[:50]))
    assert [end % 2 for end in look_ends(odd)] == [0] * len(look_ends(odd))


def test_a_good_build_is_accepted_early(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    stopped = looks_of(rows, same, tmp_path, ACCURACY)
    assert stopped.decisions == {"drawn": {"verdict_accuracy": "ACCEPT"}}
    assert stopped.report.judged <= 840
    assert stopped.report.judged == len(stopped.suites[0].items) == stopped.report.looks[-1].images
    assert [look.finished for look in stopped.report.looks] == [False] * (len(stopped.report.looks) - 1) + [True]


def test_a_bad_build_is_rejected_early_and_ends_the_other_suites(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    compare = comparing(rows, lambda place, row: flip(row) if place % 5 == 0 else row, tmp_path)
    suites = [benchmark_of(rows, "first"), benchmark_of(rows, "second")]
    stopped = run_looks(suites, ACCURACY, compare)
    assert stopped.decisions == {"first": {"verdict_accuracy": "REJECT"}}
    assert stopped.report.judged <= 360
    assert stopped.report.planned == 2400


def test_hopeless_runs_end_undecided(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    stopped = looks_of(rows[:80], same, tmp_path, {"verdict_accuracy": Limit(0.001)})
    assert stopped.decisions == {"drawn": {"verdict_accuracy": "UNDECIDED"}}


def test_every_limit_must_be_settled(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    both = {**ACCURACY, "mask_iou": Limit(0.03)}
    stopped = looks_of(rows, same, tmp_path, both)
    assert stopped.decisions == {"drawn": {"verdict_accuracy": "ACCEPT", "mask_iou": "ACCEPT"}}
    alone = looks_of(rows, same, tmp_path, ACCURACY)
    assert stopped.report.judged >= alone.report.judged
    assert "mask_iou ACCEPT" in stopped.report.looks[-1].detail


def test_looks_need_a_limit_of_accuracy(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    with pytest.raises(DefakerError, match="--sequential: looks are planned by a limit of verdict_accuracy"):
        looks_of(rows, same, tmp_path, {"mask_iou": Limit(0.01)})
