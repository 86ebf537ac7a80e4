"""Intervals of ratios: exact on small samples, valid on a noisy machine, and able to find 10 %."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from defaker_opt.errors import DefakerError
from defaker_opt.profiles.compare import compare_samples, diff_results
from defaker_opt.profiles.measure import Sample
from defaker_opt.profiles.ratios import (
    _rank_quantile,
    difference_interval,
    paired_ratio,
    quantiles,
    unpaired_ratio,
)

STAGES = {"preprocess": 8.0, "vision_encoder": 40.0, "language": 15.0, "mask_encoder": 55.0, "mask_decoder": 1.5}


def test_quantiles_are_samples_that_were_taken() -> None:
    found = quantiles(list(range(1, 101)))
    assert (found.n, found.median, found.p90, found.p99, found.smallest) == (100, 50.5, 90, 99, 1)
    assert quantiles([3.0, 9.0]).p99 == 9


@pytest.mark.parametrize("pairs", [1, 4, 6, 9, 12])
@pytest.mark.parametrize("tail", [0.025, 0.005])
def test_the_rank_quantile_is_that_of_all_signs(pairs: int, tail: float) -> None:
    sums = [
        sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in itertools.product((0, 1), repeat=pairs)
    ]
    counts = np.bincount(sums, minlength=pairs * (pairs + 1) // 2 + 1)
    cumulated = np.cumsum(counts) / 2**pairs
    expected = max((k for k in range(len(cumulated)) if cumulated[k] <= tail), default=-1)
    assert _rank_quantile(pairs, tail) == expected


def test_many_pairs_go_on_where_few_end() -> None:
    ways = np.ones(1)
    for rank in range(1, 81):
        step = np.zeros(rank + 1)
        step[[0, -1]] = 0.5
        ways = np.convolve(ways, step)
    exact = int(np.flatnonzero(np.cumsum(ways) <= 0.025)[-1])
    assert abs(_rank_quantile(80, 0.025) - exact) <= 0.01 * exact


def test_too_few_pairs_have_no_interval() -> None:
    found = paired_ratio([1.0] * 5, [2.0] * 5)
    assert (found.value, found.low, found.high) == (pytest.approx(2), 0, math.inf)
    assert difference_interval([1.0] * 4, [2.0] * 4, 0.95)[1:] == (-math.inf, math.inf)


def test_an_exact_ratio_has_an_interval_of_no_width() -> None:
    first = np.linspace(1, 3, 20)
    found = paired_ratio(first, 1.1 * first)
    assert (found.low, found.high) == pytest.approx((1.1, 1.1))
    assert found.differs


def noise(generator: np.random.Generator, count: int) -> np.ndarray:
    """Factors of a machine that others use too: slow drift, and pauses of many milliseconds now and then."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.03, count)))
    pauses = np.where(generator.random(count) < 0.1, generator.uniform(1.5, 4, count), 1.0)
    return drift * pauses * np.exp(generator.normal(0, 0.03, count))


def trial(generator: np.random.Generator, rounds: int, factors: dict[str, float]) -> tuple[list[Sample], list[Sample]]:
    """Samples of a build and of one whose stages take `factors` as long, taken in turns in a drawn order."""
    machine = noise(generator, 2 * rounds).reshape(rounds, 2)
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for number in range(rounds):
        order = generator.permutation(2)
        for side in (0, 1):
            shared = machine[number, order[side]]
            own = {name: ms * (factors.get(name, 1.0) if side else 1.0) for name, ms in STAGES.items()}
            latency = {name: ms * shared * np.exp(generator.normal(0, 0.02)) for name, ms in own.items()}
            sides[side].append(Sample(number, 0, {**latency, "total": sum(latency.values())}, ()))
    return sides


def test_equal_builds_agree_in_at_least_19_of_20_trials() -> None:
    generator = np.random.default_rng(5)
    trials = [compare_samples(*trial(generator, 30, {})) for _ in range(400)]
    agree = sum(not found.total.ratio.differs for found in trials) / len(trials)
    blamed = sum(bool(found.attributed) for found in trials) / len(trials)
    assert agree >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / len(trials))
    assert blamed <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(trials))


def test_a_stage_that_is_slower_by_a_tenth_is_found() -> None:
    generator = np.random.default_rng(6)
    found = [compare_samples(*trial(generator, 120, {"vision_encoder": 1.1})).attributed for _ in range(20)]
    assert found.count("vision_encoder") >= 18


def result(samples: list[Sample], **settings: object) -> dict[str, object]:
    rows = [{"round": s.round, "image": s.image, "latency_ms": dict(s.latency_ms)} for s in samples]
    machine = {"processor": "a", "cores": 2, "power_mode": "", "jetson": "", "versions": {"numpy": "1"}}
    return {"samples": rows, "settings": {"images": 1, "gate": 0.0, **settings}, "machine": machine, "peaks": None}


def steady(seed: int, **factors: float) -> list[Sample]:
    generator = np.random.default_rng(seed)
    samples = []
    for number in range(100):
        latency = {name: ms * factors.get(name, 1.0) * np.exp(generator.normal(0, 0.03)) for name, ms in STAGES.items()}
        samples.append(Sample(number, 0, {**latency, "total": sum(latency.values())}, ()))
    return samples


def test_a_kept_result_shows_which_stage_got_slower() -> None:
    found = diff_results(result(steady(1)), result(steady(2, language=1.1)))
    assert found.regressed
    assert found.attributed == "language"
    assert [row.stage for row in found.rows if row.regressed] == ["language"]
    assert not diff_results(result(steady(1)), result(steady(3))).regressed
    assert not diff_results(result(steady(2, language=1.1)), result(steady(1))).regressed


def test_results_of_other_work_are_not_compared() -> None:
    with pytest.raises(DefakerError, match=r"differ in gate \(0.0 and 0.5\)"):
        diff_results(result(steady(1)), result(steady(1), gate=0.5))


def test_another_machine_is_warned_of() -> None:
    other = result(steady(1))
    other["machine"] = {**other["machine"], "processor": "b", "versions": {"numpy": "2"}}  # type: ignore[dict-item]
    warnings = diff_results(result(steady(1)), other).warnings
    assert any("processor 'a', then 'b'" in line for line in warnings)
    assert any("numpy 1, then 2" in line for line in warnings)


def test_separate_runs_with_a_slow_hour_are_not_told_apart_by_luck() -> None:
    generator = np.random.default_rng(7)
    wrong = 0
    for _ in range(40):
        first, second = (10 * np.exp(generator.normal(0, 0.03, 60)) for _ in range(2))
        wrong += unpaired_ratio(first, second).differs
    assert wrong <= 6
