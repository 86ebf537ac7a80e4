"""AUC comparison and bootstrap against scikit-learn, slow twins, and each other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from defaker_opt.errors import DefakerError
from defaker_opt.statistics import Interval
from defaker_opt.statistics.auc import auc_influence, compare_auc
from defaker_opt.statistics.bootstrap import FEWEST_CARRIERS, bca_interval, bca_p, bootstrap_clusters
from defaker_opt.statistics.intervals import unseen_change
from tests.reference.statistics import auc_plain, bca_plain, delong_variance_plain, resamples_plain


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
    assert found.standard_error == pytest.approx(np.sqrt(delong_variance_plain(labels, first, second)))
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
    assert (thrice.drop, thrice.standard_error) == pytest.approx((once.drop, once.standard_error))


def test_clusters_of_one_are_nearly_independent_pictures() -> None:
    labels, first, second = scored(6, 400)
    plain, clustered = compare_auc(labels, first, second), compare_auc(labels, first, second, np.arange(400))
    assert plain and clustered and clustered.standard_error == pytest.approx(plain.standard_error, rel=0.01)


def test_auc_without_a_class_is_none() -> None:
    scores = np.linspace(0, 1, 5)
    assert compare_auc(np.ones(5, np.int64), scores, scores) is None
    assert compare_auc(np.zeros(5, np.int64), scores, scores) is None


@pytest.mark.parametrize("constant", [True, False])
def test_unchanged_ranks_leave_what_was_not_seen(constant: bool) -> None:
    labels = np.tile([0, 1], 50)
    first = np.full(100, 0.5) if constant else np.arange(100.0)
    found = compare_auc(labels, first, first * 2 + 1)
    assert found and found.drop == 0 and found.standard_error == 0
    assert found.interval == Interval(-unseen_change(50, 0.95), unseen_change(50, 0.95))
    assert found.reference == (0.5 if constant else found.build)


def test_one_picture_of_each_class_says_nothing() -> None:
    found = compare_auc(np.array([0, 1]), np.array([0.1, 0.9]), np.array([0.9, 0.1]))
    assert found and found.drop == 1 and found.interval.width >= 0.9


def mean_of(values: np.ndarray):
    def figures(weights: np.ndarray) -> np.ndarray:
        return (weights @ values / weights.sum(axis=1))[:, None]

    return figures


def skewed(clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values of rows in clusters of 1 … 5, alike within each, with a long tail."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, clusters)
    level = random.exponential(0.1, clusters)
    names = np.repeat(random.permutation(clusters) * 7 - 3, sizes)
    return np.repeat(level, sizes) + random.normal(0, 0.02, sizes.sum()), names


def test_weights_draw_what_copying_rows_draws() -> None:
    values, names = skewed(31)
    result = bootstrap_clusters(mean_of(values), names, resamples=50, seed=9)
    plain = resamples_plain(lambda rows: values[rows].mean(), names, 50, 9)
    np.testing.assert_allclose(result.replicates[:, 0], plain, rtol=1e-12)
    assert result.estimate[0] == pytest.approx(values.mean())


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bca_is_that_of_efrons_formulas(confidence: float) -> None:
    values, names = skewed(25)
    result = bootstrap_clusters(mean_of(values), names, resamples=900, seed=1)
    left_out = np.array([values[names != name].mean() for name in np.unique(names)])
    expected = bca_plain(values.mean(), result.replicates[:, 0], left_out, confidence)
    found = bca_interval(result, 0, confidence)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_bca_is_close_to_scipys_where_clusters_are_many() -> None:
    values = np.random.default_rng(2).exponential(1.0, 300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="BCa", rng=0).confidence_interval
    found = bca_interval(bootstrap_clusters(mean_of(values), np.arange(300), 4000), 0, within=Interval(0, 10))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_blocks_and_seeds() -> None:
    values, names = skewed(30)
    one, same, other = (bootstrap_clusters(mean_of(values), names, 40, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.replicates, same.replicates)
    assert not np.array_equal(one.replicates, other.replicates)
    # So many rows that a block holds a few resamples only.
    many = bootstrap_clusters(mean_of(np.tile(values, 20_000)), np.tile(names, 20_000), 40, 1)
    np.testing.assert_allclose(many.replicates, one.replicates, rtol=1e-9)


def test_grouped_jackknife_agrees_with_the_whole_one() -> None:
    values = np.random.default_rng(5).exponential(1.0, 4000)
    result = bootstrap_clusters(mean_of(values), np.arange(4000), 10)
    whole = stats.skew(values) / 6 / np.sqrt(4000)
    assert result.acceleration[0] == pytest.approx(whole, rel=0.35)


def test_p_is_where_the_upper_bound_meets_the_value() -> None:
    values, names = skewed(60)
    result = bootstrap_clusters(mean_of(values), names, 2000)
    for tail in (0.2, 0.05, 0.01):
        bound = bca_interval(result, 0, 1 - 2 * tail).high
        assert bca_p(result, 0, bound) == pytest.approx(tail, rel=0.1)
    assert 1 / 2001 <= bca_p(result, 0, 9.0) < 0.005 and bca_p(result, 0, -9.0) > 0.99


def test_nothing_changed_leaves_what_was_not_seen() -> None:
    result = bootstrap_clusters(mean_of(np.zeros(600)), np.repeat(np.arange(300), 2), 100)
    assert bca_interval(result, 0) == Interval(-unseen_change(300, 0.95), unseen_change(300, 0.95))
    assert bca_interval(result, 0, within=Interval(0.0, 1.0)).low == 0.0
    assert bca_p(result, 0, 0.005) == pytest.approx(0.995**300)
    assert result.carriers[0] == 0


def test_carriers_count_the_clusters_that_changed() -> None:
    few, many = np.zeros(400), np.random.default_rng(0).normal(size=400)
    few[:3] = 0.5
    carriers = [bootstrap_clusters(mean_of(v), np.arange(400), 20).carriers[0] for v in (few, many)]
    assert carriers[0] == pytest.approx(3, abs=0.1) and carriers[0] < FEWEST_CARRIERS < 100 < carriers[1]


def share_of_positive(weights: np.ndarray) -> np.ndarray:
    """Undefined where the first row was not drawn."""
    return np.where(weights[:, :1] > 0, 1.0, np.nan)


def test_a_figure_that_is_often_undefined_is_refused() -> None:
    with pytest.raises(
        DefakerError, match=r"undefined in .* of the resamples of 30 clusters .*too few images of one class"
    ):
        bootstrap_clusters(share_of_positive, np.arange(30), 200)


def test_a_figure_that_is_seldom_undefined_is_counted() -> None:
    def figures(weights: np.ndarray) -> np.ndarray:
        return np.where(weights[:, :4].sum(axis=1, keepdims=True) > 0, weights[:, :1], np.nan)

    result = bootstrap_clusters(figures, np.arange(40), 400)
    assert 0 < result.undefined[0] < 20
    assert np.isfinite(bca_interval(result, 0, within=Interval(0, 40)).high)


def test_one_cluster_spans_all_its_resamples() -> None:
    result = bootstrap_clusters(mean_of(np.array([0.1, 0.4])), np.zeros(2), 20)
    assert bca_interval(result, 0).width >= 0.9
