"""What `profiling/coverage.py` measures, with fewer runs: intervals cover, decisions err and looks save as promised."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from profiling import coverage
from profiling.coverage import Row

from defaker_opt.statistics import Interval


def assert_all_hold(rows: Iterator[Row]) -> None:
    found = list(rows)
    assert found
    assert not [row for row in found if not row.holds]


def test_a_row_that_is_outside_does_not_hold() -> None:
    assert Row("", "", 0.95, Interval(0.93, 0.97), 1000).holds
    assert not Row("", "", 0.90, Interval(0.93, 0.97), 1000).holds
    assert not Row("", "", 0.051, Interval(0.0, 0.05), 0).holds
    assert Row("", "", 0.90, Interval(0.93, 0.97), 20).tolerance > 0.1


@pytest.mark.parametrize(
    ("measured", "runs"),
    [
        (coverage.tango_independent, 200),
        (coverage.tango_clustered, 400),
        (coverage.flip_bound, 0),
        (coverage.delong, 400),
        (coverage.verdict_figures, 40),
        (coverage.mask_means, 200),
        (coverage.false_accept_clustered, 600),
        (coverage.power, 200),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_promises_are_kept(measured, runs: int) -> None:
    assert_all_hold(measured(runs))


def test_looks_keep_their_error_and_save() -> None:
    assert_all_hold(coverage.sequential(60))
