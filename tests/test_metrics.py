"""Figures of verdicts and masks against scikit-learn, slow twins, and rows that are copied instead of weighted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sklearn_metrics

from defaker_opt.benchmarks import localization as masks
from defaker_opt.benchmarks import metrics
from defaker_opt.benchmarks.metrics import VERDICT_METRICS, VerdictRows
from defaker_opt.benchmarks.refit import at_temperature, fit_temperature, fit_threshold
from defaker_opt.errors import DefakerError
from tests.reference.statistics import (
    auc_plain,
    best_f1_plain,
    calibration_error_plain,
    crossing_of_line,
    roc_plain,
)


def judged(seed: int, pictures: int = 150, decimals: int = 2) -> VerdictRows:
    random = np.random.default_rng(seed)
    labels = (random.random(pictures) < 0.4).astype(np.int64)
    logits = 2 * labels - 1 + random.normal(0, 1.5, pictures)
    first = np.round(special.expit(logits), decimals)
    second = np.round(special.expit(logits + random.normal(0, 0.4, pictures)), decimals)
    return VerdictRows(labels, first, second, 0.5, 0.55)


@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_figures_of_one_build_are_those_of_scikit_learn(decimals: int) -> None:
    rows = judged(1, decimals=decimals)
    labels, scores, one = rows.labels, rows.build, np.ones((1, 150))
    found = scores > 0.55
    expected = {
        metrics.accuracy(labels, scores, 0.55, one)[0]: sklearn_metrics.accuracy_score(labels, found),
        metrics.balanced_accuracy(labels, scores, 0.55, one)[0]: sklearn_metrics.balanced_accuracy_score(labels, found),
        metrics.area_under_curve(labels, scores, one)[0]: sklearn_metrics.roc_auc_score(labels, scores),
        metrics.average_precision(labels, scores, one)[0]: sklearn_metrics.average_precision_score(labels, scores),
        metrics.brier(labels, scores, one)[0]: sklearn_metrics.brier_score_loss(labels, scores),
        metrics.true_positive_rate(labels, scores, 0.55, one)[0]: sklearn_metrics.recall_score(labels, found),
    }
    for ours, theirs in expected.items():
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_weighted_figures_are_those_of_scikit_learn() -> None:
    rows = judged(2)
    weights = np.random.default_rng(0).exponential(size=(1, 150))
    labels, scores = rows.labels, rows.reference
    for ours, theirs in (
        (metrics.area_under_curve, sklearn_metrics.roc_auc_score),
        (metrics.average_precision, sklearn_metrics.average_precision_score),
        (metrics.brier, sklearn_metrics.brier_score_loss),
    ):
        expected = theirs(labels, scores, sample_weight=weights[0])
        assert ours(labels, scores, weights)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_figures_on_the_roc_are_those_of_its_corners(decimals: int) -> None:
    rows = judged(3, decimals=decimals)
    corners, one = roc_plain(rows.labels, rows.build), np.ones((1, 150))
    assert metrics.area_under_curve(rows.labels, rows.build, one)[0] == pytest.approx(
        auc_plain(rows.labels, rows.build)
    )
    equal = crossing_of_line(corners, lambda point: point[0] + point[1] - 1)
    assert metrics.equal_error_rate(rows.labels, rows.build, one)[0] == pytest.approx(equal[0])
    for rate in (0.013, 0.1, 0.34, 0.77):
        expected = crossing_of_line(corners, lambda point, rate=rate: point[0] - rate)[1]
        found = metrics.hits_at_false_positives(rows.labels, rows.build, np.array([rate]), one)[0]
        assert found == pytest.approx(expected)


def test_hits_at_the_ends_of_the_roc() -> None:
    labels, scores, one = np.array([1, 1, 0, 0]), np.array([0.9, 0.6, 0.6, 0.1]), np.ones((1, 4))
    # One forged picture is above all authentic ones; the other is tied with one of them.
    assert metrics.hits_at_false_positives(labels, scores, np.array([0.0]), one)[0] == pytest.approx(0.5)
    assert metrics.hits_at_false_positives(labels, scores, np.array([0.25]), one)[0] == pytest.approx(0.75)
    assert metrics.hits_at_false_positives(labels, scores, np.array([1.0]), one)[0] == pytest.approx(1.0)


def test_hits_at_a_vertical_step_are_those_at_its_top() -> None:
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    assert metrics.hits_at_false_positives(labels, scores, np.array([0.5]), np.ones((1, 4)))[0] == 1.0


def test_a_perfect_and_an_inverted_detector() -> None:
    labels, one = np.array([0, 0, 1, 1]), np.ones((1, 4))
    for scores, auc, error in ((np.array([0.1, 0.2, 0.8, 0.9]), 1.0, 0.0), (np.array([0.9, 0.8, 0.2, 0.1]), 0.0, 1.0)):
        assert metrics.area_under_curve(labels, scores, one)[0] == auc
        assert metrics.equal_error_rate(labels, scores, one)[0] == error


def test_constant_scores_are_a_coin() -> None:
    labels, scores, one = np.array([0, 1, 1, 0, 1]), np.full(5, 0.7), np.ones((1, 5))
    assert metrics.area_under_curve(labels, scores, one)[0] == 0.5
    assert metrics.equal_error_rate(labels, scores, one)[0] == 0.5
    assert metrics.average_precision(labels, scores, one)[0] == pytest.approx(0.6)
    assert metrics.calibration_error(labels, scores, one)[0] == pytest.approx(0.1)


def test_a_tie_with_the_threshold_is_authentic() -> None:
    assert metrics.accuracy(np.array([0, 1]), np.array([0.5, 0.5]), 0.5, np.ones((1, 2)))[0] == 0.5


@pytest.mark.parametrize(("decimals", "bins"), [(1, 15), (2, 15), (12, 15), (12, 7)])
def test_calibration_error_is_that_of_loops(decimals: int, bins: int) -> None:
    rows = judged(4, decimals=decimals)
    found = metrics.calibration_error(rows.labels, rows.build, np.ones((1, 150)), bins)[0]
    assert found == pytest.approx(calibration_error_plain(rows.labels, rows.build, bins))


def test_calibration_error_of_a_known_overconfidence() -> None:
    random = np.random.default_rng(0)
    truth = random.random(200_000)
    labels = (random.random(200_000) < truth).astype(np.int64)
    one = np.ones((1, 200_000))
    assert metrics.calibration_error(labels, truth, one)[0] < 0.005
    assert metrics.calibration_error(labels, truth + 0.1, one)[0] == pytest.approx(0.1, abs=0.005)


def test_bins_hold_equally_many_pictures_where_probabilities_crowd() -> None:
    random = np.random.default_rng(1)
    crowded = special.expit(random.normal(0, 8, 1500))
    edges = np.quantile(crowded, np.arange(1, 15) / 15)
    assert np.bincount(np.searchsorted(edges, crowded, side="left")).tolist() == [100] * 15


@pytest.mark.parametrize("name", sorted(VERDICT_METRICS))
def test_weights_are_copies_of_rows(name: str) -> None:
    rows, random = judged(5), np.random.default_rng(6)
    times = random.integers(0, 4, (3, 150))
    metric = VERDICT_METRICS[name]
    weighted = metric.compute(rows, times.astype(np.float64))
    for number, copies in enumerate(times):
        chosen = np.repeat(np.arange(150), copies)
        copied = VerdictRows(rows.labels[chosen], rows.reference[chosen], rows.build[chosen], 0.5, 0.55)
        if name == "calibration_error":
            continue  # its bins stay those of the rows at hand; see the next test
        expected = metric.compute(copied, np.ones((1, len(chosen))))
        assert [side[number] for side in weighted] == pytest.approx([side[0] for side in expected])


def test_weights_do_not_move_the_bins_of_calibration() -> None:
    rows = judged(7)
    times = np.random.default_rng(8).integers(0, 4, 150)
    edges = np.quantile(rows.build, np.arange(1, 15) / 15)
    bins = np.array([sum(p > edge for edge in edges) for p in rows.build])
    gaps = [abs(sum(times[bins == b] * (rows.build - rows.labels)[bins == b])) for b in range(15)]
    found = metrics.calibration_error(rows.labels, rows.build, times[None].astype(np.float64), 15)[0]
    assert found == pytest.approx(sum(gaps) / times.sum())


@pytest.mark.parametrize("name", sorted(VERDICT_METRICS))
def test_figures_without_a_class_are_undefined_and_nothing_else_is(name: str) -> None:
    rows = judged(9)
    for label in (0, 1):
        weights = np.stack([np.ones(150), (rows.labels == label).astype(np.float64)])
        for side in VERDICT_METRICS[name].compute(rows, weights):
            assert np.isfinite(side[0])
            needs_both = name not in ("accuracy", "calibration_error", "brier")
            one_class = {
                "true_positive_rate": label == 1,
                "false_positive_rate": label == 0,
                "average_precision": label == 1,
            }
            assert np.isnan(side[1]) == (needs_both and not one_class.get(name, False))


@pytest.mark.parametrize("name", sorted(VERDICT_METRICS))
def test_a_worse_build_has_a_positive_drop(name: str) -> None:
    random = np.random.default_rng(10)
    labels = np.tile([0, 1], 2000)
    good = special.expit(3 * (2 * labels - 1) + random.normal(0, 1.5, 4000))
    bad = special.expit(special.logit(good) + random.normal(0, 4, 4000))
    metric = VERDICT_METRICS[name]
    reference, build = metric.compute(VerdictRows(labels, good, bad), np.ones((1, 4000)))
    assert metric.drop(reference, build)[0] > 0.01


# Masks


def histogram_of(logits: np.ndarray, truth: np.ndarray, edges: np.ndarray) -> np.ndarray:
    bins = np.searchsorted(edges, logits, side="right")
    return np.stack([np.bincount(bins[truth == kind], minlength=len(edges) + 1) for kind in (False, True)])


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits with ties, and a truth they know something of."""
    random = np.random.default_rng(seed)
    truth = random.random((40, 61)) < 0.1
    return np.round(random.normal(-1, 2, truth.shape) + 2 * truth, 1), truth


def test_pixel_auc_is_that_of_scikit_learn_on_bins() -> None:
    logits, truth = drawn(6)
    edges = np.arange(-60, 60) / 10
    binned = np.searchsorted(edges, logits, side="right")
    expected = sklearn_metrics.roc_auc_score(truth.reshape(-1), binned.reshape(-1))
    assert masks.pixel_auc(histogram_of(logits, truth, edges)) == pytest.approx(expected, abs=1e-12)


def test_pixel_auc_needs_both_kinds_of_pixels() -> None:
    for histogram in ([[4, 5], [0, 0]], [[0, 0], [4, 5]]):
        assert masks.pixel_auc(np.array(histogram)) is None


def test_best_f1_is_that_of_all_thresholds() -> None:
    logits, truth = drawn(7)
    edges = np.array([-3.05, -0.55, 0.15, 1.25, 1.95, 4.05])
    expected = best_f1_plain(logits, truth, [-np.inf, *edges])
    assert masks.best_f1(histogram_of(logits, truth, edges)) == pytest.approx(expected)


def test_best_f1_can_be_to_find_everything_and_needs_something_forged() -> None:
    assert masks.best_f1(np.array([[0, 1, 0], [9, 0, 0]])) == pytest.approx(18 / 19)
    assert masks.best_f1(np.array([[0, 1, 0], [0, 0, 0]])) is None


@pytest.mark.parametrize("shift", [-1.5, -0.2, 0.0, 0.3, 2.0])
def test_a_refitted_threshold_restores_the_rate(shift: float) -> None:
    random = np.random.default_rng(11)
    labels = np.tile([0, 1], 150)
    logits = 2 * labels - 1 + random.normal(0, 1.5, 300)
    reference, build = special.expit(logits), special.expit(logits + shift + random.normal(0, 0.2, 300))
    found = fit_threshold(labels, reference, build)
    assert found.rate == found.reference_rate == (reference[labels == 0] > 0.5).mean()
    assert (build[labels == 0] > found.threshold).mean() == found.rate and found.authentic == 150


def test_a_threshold_that_holds_is_kept() -> None:
    labels, scores = np.array([0, 0, 0, 1]), np.array([0.1, 0.4, 0.7, 0.9])
    assert fit_threshold(labels, scores, scores + 0.01).threshold == 0.5


def test_ties_allow_no_more_than_the_reference_rate() -> None:
    labels = np.zeros(6, np.int64)
    found = fit_threshold(labels, np.array([0.9, 0.8, 0.1, 0.1, 0.1, 0.1]), np.array([0.9, 0.6, 0.6, 0.6, 0.2, 0.2]))
    assert (found.rate, found.reference_rate) == (pytest.approx(1 / 6), pytest.approx(2 / 6))
    assert found.threshold == pytest.approx(0.75)


@pytest.mark.parametrize(("reference", "rate"), [([0.9, 0.8], 1.0), ([0.1, 0.2], 0.0)])
def test_all_or_none_called_forged(reference: list[float], rate: float) -> None:
    build = np.array([0.3, 0.4]) if rate else np.array([0.8, 0.9])
    found = fit_threshold(np.zeros(2, np.int64), np.array(reference), build)
    assert found.rate == rate


def test_neighbouring_probabilities_leave_a_threshold_between() -> None:
    low = 0.7
    high = float(np.nextafter(low, 1.0))
    found = fit_threshold(np.zeros(2, np.int64), np.array([0.9, 0.1]), np.array([high, low]))
    assert found.rate == 0.5


def test_a_threshold_needs_authentic_images() -> None:
    with pytest.raises(DefakerError, match="no authentic images"):
        fit_threshold(np.ones(3, np.int64), np.ones(3), np.ones(3))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_planted_temperature_is_found(temperature: float) -> None:
    random = np.random.default_rng(12)
    logits = random.normal(0, 2, 40_000)
    labels = (random.random(40_000) < special.expit(logits)).astype(np.int64)
    found = fit_temperature(labels, special.expit(logits * temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.loss <= found.loss_before
    expected = sklearn_metrics.log_loss(labels, at_temperature(special.expit(logits * temperature), found.temperature))
    assert found.loss == pytest.approx(expected)


def test_the_temperature_is_the_best_of_many() -> None:
    rows = judged(13)
    found = fit_temperature(rows.labels, rows.build)
    losses = [sklearn_metrics.log_loss(rows.labels, at_temperature(rows.build, t)) for t in np.geomspace(0.06, 19, 300)]
    assert found.loss <= min(losses) + 1e-9


def test_certain_probabilities_keep_a_temperature() -> None:
    labels, probabilities = np.array([0, 1, 1, 0, 0, 1]), np.array([0.0, 1.0, 0.0, 0.2, 0.6, 0.9])
    assert np.isfinite(fit_temperature(labels, probabilities).loss)


def test_verdicts_without_a_best_temperature_are_refused() -> None:
    labels, right = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])
    with pytest.raises(DefakerError, match=r"no temperature in 0\.05…20 fits 4 verdicts best.*or keep temperature 1"):
        fit_temperature(labels, right)
    with pytest.raises(DefakerError, match="no temperature in"):
        fit_temperature(labels, 1 - right)
    with pytest.raises(DefakerError, match="needs authentic and forged images"):
        fit_temperature(np.ones(2, np.int64), right[:2])
