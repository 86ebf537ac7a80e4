"""AUC comparison, influences and intervals from them against scikit-learn, SciPy, slow twins and simulation."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import roc_auc_score

from defaker_opt.benchmarks import influence
from defaker_opt.benchmarks.metrics import VERDICT_METRICS, VerdictRows
from defaker_opt.statistics import Interval
from defaker_opt.statistics.auc import auc_influence, compare_auc
from defaker_opt.statistics.intervals import unseen_change
from defaker_opt.statistics.spread import (
    FEWEST_CARRIERS,
    Spread,
    deciding_interval,
    more_needed,
    spread_interval,
    spread_of,
    spread_p,
)
from tests.reference.statistics import auc_plain, delong_variance_plain


def scored(seed: int, pictures: int = 80, decimals: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two correlated scorings, rounded so that many are tied."""
    random = np.random.default_rng(seed)
    labels = (random.random(pictures) < 0.4).astype(np.int64)
    first = np.round(labels + random.normal(size=pictures), decimals)
    return labels, first, np.round(first + random.normal(0, 0.5, pictures), decimals)


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_delong_is_that_of_loops(decimals: int) -> None:
    labels, first, second = scored(3, decimals=decimals)
    found = compare_auc(labels, first, second)
    assert found is not None
    assert found.reference == pytest.approx(auc_plain(labels, first))
    assert found.build == pytest.approx(roc_auc_score(labels, second))
    assert found.spread.standard_error == pytest.approx(np.sqrt(delong_variance_plain(labels, first, second)))
    assert found.drop == pytest.approx(found.reference - found.build)


def test_influence_sums_to_nothing_and_is_the_derivative_of_the_area() -> None:
    labels, first, _ = scored(4)
    areas, influence = auc_influence(labels, first[None])
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    # A picture that counts a little more moves the area by its influence times that little.
    forged, authentic = first[labels == 1], first[labels == 0]
    order = (forged[:, None] > authentic) + (forged[:, None] == authentic) / 2
    weights = np.ones(len(forged))
    weights[5] += 1e-6
    moved = (weights @ order).sum() / weights.sum() / len(authentic)
    assert (moved - areas[0]) / 1e-6 == pytest.approx(influence[0, np.flatnonzero(labels == 1)[5]], rel=1e-4)


def test_pictures_copied_as_clusters_change_nothing() -> None:
    labels, first, second = scored(5, 120)
    once = compare_auc(labels, first, second, np.arange(120))
    thrice = compare_auc(*(np.repeat(part, 3) for part in (labels, first, second)), np.repeat(np.arange(120), 3))
    assert once and thrice
    assert (thrice.drop, thrice.spread.standard_error) == pytest.approx((once.drop, once.spread.standard_error))


def test_clusters_of_one_are_nearly_independent_pictures() -> None:
    labels, first, second = scored(6, 400)
    plain, clustered = compare_auc(labels, first, second), compare_auc(labels, first, second, np.arange(400))
    assert plain and clustered
    assert clustered.spread.standard_error == pytest.approx(plain.spread.standard_error, rel=0.01)


def test_auc_without_a_class_is_none() -> None:
    scores = np.linspace(0, 1, 5)
    assert compare_auc(np.ones(5, np.int64), scores, scores) is None
    assert compare_auc(np.zeros(5, np.int64), scores, scores) is None


@pytest.mark.parametrize("constant", [True, False])
def test_unchanged_ranks_leave_what_was_not_seen(constant: bool) -> None:
    labels = np.tile([0, 1], 50)
    first = np.full(100, 0.5) if constant else np.arange(100.0)
    found = compare_auc(labels, first, first * 2 + 1)
    assert found and found.drop == 0 and found.spread.standard_error == 0
    assert found.interval == Interval(-unseen_change(50, 0.95), unseen_change(50, 0.95))
    assert found.reference == (0.5 if constant else found.build)


def test_one_picture_of_each_class_says_nothing() -> None:
    found = compare_auc(np.array([0, 1]), np.array([0.1, 0.9]), np.array([0.9, 0.1]))
    assert found and found.drop == 1 and found.interval.width >= 0.9


# Influences of other figures

EXACT = ("balanced_accuracy", "true_positive_rate", "false_positive_rate", "average_precision", "brier")
SMOOTHED = ("equal_error_rate", "tpr_at_reference_fpr", "calibration_error")


def judged(random: np.random.Generator, pictures: int, decimals: int = 12) -> VerdictRows:
    labels = (random.random(pictures) < 0.4).astype(np.int64)
    logits = 2.4 * labels - 1.2 + random.normal(0, 1.3, pictures)
    sides = (logits, 1.1 * logits + random.normal(0, 0.4, pictures))
    return VerdictRows(labels, *(np.round(special.expit(side), decimals) for side in sides), 0.5, 0.55)


def test_every_figure_without_a_method_of_its_own_has_an_influence() -> None:
    assert set(influence.DROPS) == {*EXACT, *SMOOTHED} == set(VERDICT_METRICS) - {"accuracy", "auc"}


@pytest.mark.parametrize("decimals", [1, 12])
@pytest.mark.parametrize("name", EXACT)
def test_influence_is_the_derivative_by_the_weight(name: str, decimals: int) -> None:
    rows, metric, little = judged(np.random.default_rng(1), 90, decimals), VERDICT_METRICS[name], 1e-6
    value = metric.drop(*metric.compute(rows, np.ones((1, 90))))
    moved = metric.drop(*metric.compute(rows, np.ones((90, 90)) + little * np.eye(90)))
    np.testing.assert_allclose(influence.DROPS[name](rows), (moved - value) / little, atol=1e-7)


@pytest.mark.parametrize("name", [*EXACT, *SMOOTHED])
def test_influence_foretells_how_far_figures_spread(name: str) -> None:
    metric, drops, errors = VERDICT_METRICS[name], [], []
    for seed in range(300):
        rows = judged(np.random.default_rng((2, seed)), 600)
        found = influence.DROPS[name](rows)
        assert abs(found.sum()) < 1e-9
        drops.append(float(metric.drop(*metric.compute(rows, np.ones((1, 600))))[0]))
        errors.append(float(np.sqrt((found**2).sum())))
    # A standard deviation of 300 is known within 4 %, and three times that is allowed.
    assert np.mean(errors) == pytest.approx(np.std(drops), rel=0.15)


# Intervals from influences


def spread_of_mean(values: np.ndarray, clusters: np.ndarray | None = None) -> Spread:
    """Of a mean of rows [N]."""
    used = np.ones(len(values), bool)
    return spread_of(
        float(values.mean()), influence.of_mean(values, used), np.arange(len(values)) if clusters is None else clusters
    )


def test_the_spread_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(5).exponential(1.0, 200)
    found = spread_of_mean(values)
    assert found.standard_error == pytest.approx(stats.sem(values))
    assert found.skew == pytest.approx(stats.skew(values) / 6 / np.sqrt(200))
    assert found.highest == pytest.approx((values.max() - values.mean()) / 200)
    assert found.lowest == pytest.approx((values.mean() - values.min()) / 200)


def test_rows_of_a_cluster_are_one() -> None:
    values = np.random.default_rng(6).exponential(1.0, 50)
    once, thrice = spread_of_mean(values), spread_of_mean(np.repeat(values, 3), np.repeat(np.arange(50), 3))
    assert dataclasses.astuple(thrice) == pytest.approx(dataclasses.astuple(once))


def test_intervals_of_many_normal_clusters_are_students() -> None:
    values = np.random.default_rng(7).normal(0.1, 0.2, 4000)
    found = spread_interval(spread_of_mean(values))
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 3999, values.mean(), stats.sem(values)), abs=1e-4
    )


def test_intervals_of_skewed_clusters_reach_as_far_as_bca() -> None:
    values = np.random.default_rng(2).exponential(1.0, 300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="BCa", rng=0).confidence_interval
    spread = spread_of_mean(values)
    found = spread_interval(spread, within=Interval(0, 10))
    # The lower end is Student's, which reaches farther there.
    assert found.low == pytest.approx(stats.t.interval(0.95, 299, values.mean(), stats.sem(values))[0])
    assert found.low < theirs.low
    assert found.high == pytest.approx(theirs.high, abs=0.02)


@pytest.mark.parametrize("losses", [1, 2, 3, 5, 10])
def test_the_upper_end_of_few_losses_is_hardly_below_that_of_a_poisson_number(losses: int) -> None:
    values = np.zeros(2000)
    values[:losses] = 1.0
    exact = stats.chi2.ppf(0.95, 2 * losses + 2) / 2
    spread = spread_of_mean(values)
    assert 0.95 <= 2000 * spread_interval(spread, 0.9).high / exact <= 1.2
    assert 1.0 <= 2000 * deciding_interval(spread, 0.9).high / exact <= 1.6


def test_an_interval_that_decides_allows_for_one_more_like_the_farthest() -> None:
    values = np.random.default_rng(4).exponential(0.1, 400)
    spread = spread_of_mean(values)
    shown, deciding = spread_interval(spread, 0.9), deciding_interval(spread, 0.9)
    assert deciding.low <= shown.low and deciding.high > shown.high
    assert deciding.high - shown.high < 2 * values.max() / 400


def test_with_as_many_groups_as_are_needed_the_deciding_end_meets_the_limit() -> None:
    spread = spread_of_mean(np.random.default_rng(5).exponential(0.1, 200) - 0.1)
    limit = spread.estimate + spread.standard_error
    times = more_needed(spread, limit, 0.95, 0.5)
    assert times and 2.5 < times < 5
    # With a power of a half the estimate itself must do.
    more = replace(
        spread,
        standard_error=spread.standard_error / times**0.5,
        skew=spread.skew / times**0.5,
        highest=spread.highest / times,
        lowest=spread.lowest / times,
        clusters=10**9,
    )
    assert deciding_interval(more, 0.9).high == pytest.approx(limit)
    assert (more_needed(spread, limit, 0.95, 0.8) or 0) > times
    assert more_needed(spread, spread.estimate, 0.95, 0.8) is None


def test_the_rarer_class_says_how_much_is_known_of_an_auc() -> None:
    random = np.random.default_rng(6)
    labels = np.array([1] * 300 + [0] * 5)
    reference = labels + random.normal(0, 1, 305)
    build = reference + random.normal(0, 0.5, 305)
    alone = compare_auc(labels, reference, build, None, 0.9)
    grouped = compare_auc(labels, reference, build, np.arange(305), 0.9)
    for found in (alone, grouped):
        assert found and found.spread.clusters == 5
        assert found.deciding.low <= found.interval.low and found.deciding.high >= found.interval.high


def test_p_is_where_an_end_meets_the_value() -> None:
    spread = spread_of_mean(np.random.default_rng(3).exponential(0.1, 60))
    for tail in (0.2, 0.05, 0.01):
        bounds = spread_interval(spread, 1 - 2 * tail)
        assert spread_p(spread, bounds.low) == pytest.approx(tail)
        assert spread_p(spread, bounds.high) == pytest.approx(1 - tail)
    assert spread_p(spread, -9.0) < 1e-9 and spread_p(spread, 9.0) > 1 - 1e-9


def test_nothing_changed_leaves_what_was_not_seen() -> None:
    spread = spread_of_mean(np.zeros(600), np.repeat(np.arange(300), 2))
    assert spread_interval(spread) == Interval(-unseen_change(300, 0.95), unseen_change(300, 0.95))
    assert spread_interval(spread, within=Interval(0.0, 1.0)).low == 0.0
    assert spread_p(spread, -0.005) == pytest.approx(0.995**300) and spread_p(spread, 0.0) == 1
    assert spread.carriers == 0


def test_carriers_count_the_clusters_that_changed() -> None:
    few, many = np.zeros(400), np.random.default_rng(0).normal(size=400)
    few[:3] = 0.5
    carriers = [spread_of_mean(values).carriers for values in (few, many)]
    assert carriers[0] == pytest.approx(3, abs=0.1) and carriers[0] < FEWEST_CARRIERS < 100 < carriers[1]


def test_one_cluster_says_nothing() -> None:
    assert spread_interval(spread_of_mean(np.array([0.1, 0.4]), np.zeros(2, np.int64))).width >= 0.9
