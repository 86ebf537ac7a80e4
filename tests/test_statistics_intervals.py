"""Intervals and tests of shares and of their paired differences, against SciPy, statsmodels and slow twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from defaker_opt.statistics.clusters import choose_clusters
from defaker_opt.statistics.intervals import clopper_pearson_upper, unseen_change
from defaker_opt.statistics.paired_proportions import (
    PairedCounts,
    count_pairs,
    doubted,
    mcnemar_exact,
    score_tail,
    tango_bounds,
    tango_interval,
    tango_score,
)
from tests.reference.statistics import tango_score_plain

SHARES = [(0, 1), (1, 1), (0, 30), (30, 30), (1, 40), (17, 120), (600, 1200), (1199, 1200)]


def counted(losses: float, gains: float, pictures: int) -> PairedCounts:
    return PairedCounts(losses, gains, pictures, pictures)


@pytest.mark.parametrize(("successes", "trials"), SHARES)
@pytest.mark.parametrize("confidence", [0.51, 0.95, 0.999])
def test_the_bound_of_one_share_is_that_of_statsmodels(successes: int, trials: int, confidence: float) -> None:
    high = proportion_confint(successes, trials, 2 * (1 - confidence), "beta")[1]
    assert clopper_pearson_upper(successes, trials, confidence) == pytest.approx(high, abs=1e-12)


def test_without_trials_any_share_is_possible() -> None:
    assert clopper_pearson_upper(0, 0) == 1.0


def test_upper_bound_of_no_flips_is_about_three_in_n() -> None:
    assert clopper_pearson_upper(0, 600) == pytest.approx(1 - 0.05 ** (1 / 600))
    assert clopper_pearson_upper(0, 600) == pytest.approx(3 / 600, rel=0.01)


def test_unseen_change_is_the_two_sided_bound_of_none() -> None:
    assert unseen_change(600, 0.9) == pytest.approx(clopper_pearson_upper(0, 600, 0.95))


@pytest.mark.parametrize(("losses", "gains"), [(0, 0), (1, 0), (0, 7), (5, 5), (9, 2), (40, 61)])
def test_mcnemar_is_that_of_statsmodels(losses: int, gains: int) -> None:
    expected = mcnemar([[100, losses], [gains, 10]], exact=True).pvalue if losses + gains else 1.0
    assert mcnemar_exact(losses, gains) == pytest.approx(expected)


CELLS = [(0, 0, 50), (1, 0, 50), (0, 3, 50), (7, 1, 21), (12, 12, 1200), (0, 21, 21), (300, 200, 1000), (21, 0, 21)]


@pytest.mark.parametrize(("losses", "gains", "pictures"), CELLS)
def test_tango_score_is_that_of_a_searched_maximum(losses: int, gains: int, pictures: int) -> None:
    for drop in (-0.7, -0.02, 1e-3, 0.0, 0.005, 0.3, 0.9):
        if losses + gains == 0 and drop == 0:
            assert tango_score(0, 0, pictures, 0.0) == 0.0
            continue
        expected = tango_score_plain(losses, gains, pictures, drop)
        assert tango_score(losses, gains, pictures, drop) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("losses", "gains", "pictures"), CELLS)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_ends_of_the_tango_interval_score_at_its_critical_value(
    losses: int, gains: int, pictures: int, confidence: float
) -> None:
    z = stats.norm.isf((1 - confidence) / 2)
    found = tango_interval(counted(losses, gains, pictures), confidence)
    for end, wanted in ((found.low, z), (found.high, -z)):
        if abs(end) < 1 - 1e-9:
            assert tango_score(losses, gains, pictures, end) == pytest.approx(wanted, abs=1e-6)
    assert (losses - gains) / pictures in found


def test_tango_interval_of_a_published_table() -> None:
    # Fagerland, Lydersen and Laake 2014, table of airway hyper-responsiveness: −0.517 to −0.026.
    found = tango_interval(counted(1, 7, 21))
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)


def test_tango_without_discordant_pictures_is_robust() -> None:
    found = tango_interval(counted(0, 0, 1200), 0.9)
    z = stats.norm.isf(0.05)
    assert found.high == pytest.approx(z**2 / (1200 + z**2)) and found.low == pytest.approx(-found.high)


def test_mirrored_counts_mirror_the_interval() -> None:
    one, other = tango_interval(counted(9, 2, 300)), tango_interval(counted(2, 9, 300))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_tango_bounds_broadcast() -> None:
    losses = np.array([[0.0, 3.0, 7.5]])
    gains = np.array([[1.0], [2.0]])
    low, high = tango_bounds(losses, gains, 90.0, 1.96)
    for row, column in itertools.product(range(2), range(3)):
        single = tango_bounds(losses[0, column], gains[row, 0], 90.0, 1.96)
        assert (low[row, column], high[row, column]) == pytest.approx((float(single[0]), float(single[1])))


def outcomes(*kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference right and build right: 1 a loss, −1 a gain, 0 both right."""
    kind = np.array(kinds)
    return kind >= 0, kind <= 0


def test_counts_of_single_pictures() -> None:
    counts = count_pairs(*outcomes(1, 1, -1, 0, 0))
    assert counts == PairedCounts(2, 1, 5, 5)
    assert counts.drop == pytest.approx(0.2) and counts.discordance == pytest.approx(0.6)


def test_clusters_of_one_picture_change_nothing_but_a_little_for_the_mean() -> None:
    plain, clustered = count_pairs(*outcomes(*[1] * 5, *[0] * 95)), None
    clustered = count_pairs(*outcomes(*[1] * 5, *[0] * 95), clusters=np.arange(100))
    assert clustered.losses == pytest.approx(plain.losses, rel=0.011)
    assert tango_interval(clustered).high == pytest.approx(tango_interval(plain).high, rel=0.02)


def test_copies_of_a_picture_count_once() -> None:
    random = np.random.default_rng(0)
    kinds = random.choice([1, -1, 0], 200, p=[0.05, 0.04, 0.91])
    single = count_pairs(*outcomes(*kinds), clusters=np.arange(200))
    copied = count_pairs(*outcomes(*np.repeat(kinds, 3)), clusters=np.repeat(np.arange(200), 3))
    assert copied.design_effect == pytest.approx(3.0, rel=0.01)
    assert copied.losses == pytest.approx(single.losses, rel=0.01)
    assert tango_interval(copied).width == pytest.approx(tango_interval(single).width, rel=0.01)


def test_design_effect_of_a_few_clusters_by_hand() -> None:
    # Sums of 2, 1 and 0 over clusters of 2, drop 1/2: residuals 1, 0, −1, so 2 · 3/2 over 3 − 6/4.
    counts = count_pairs(*outcomes(1, 1, 1, 0, 0, 0), clusters=[7, 7, 3, 3, 5, 5])
    assert counts.design_effect == pytest.approx(2.0)
    # Without the factor for the mean it would be 4/3; it is held at 2, that of clusters of one mind.
    wide = count_pairs(*outcomes(1, 1, 0, 1, 0, 0, 0, 0), clusters=np.repeat(np.arange(4), 2))
    assert wide.design_effect == pytest.approx((1.25**2 + 0.25**2 + 2 * 0.75**2) * 4 / 3 / (3 - 9 / 8))


def test_pictures_never_count_more_than_once() -> None:
    # A loss and a gain in each pair cancel, which looks more certain than independent pictures.
    counts = count_pairs(*outcomes(*[1, -1] * 20, *[0] * 60), clusters=np.repeat(np.arange(50), 2))
    assert counts.design_effect == 1.0


def test_a_design_effect_of_few_discordant_clusters_is_doubted() -> None:
    clusters = np.repeat(np.arange(50), 4)
    for discordant in (0, 1, 3, 12):
        kinds = np.zeros(200, int)
        kinds[: 4 * discordant : 4] = 1
        counts = count_pairs(*outcomes(*kinds), clusters=clusters)
        careful = doubted(counts)
        assert counts.discordant_clusters == discordant and counts.largest_effect == 4
        expected = (discordant * counts.design_effect + 4) / (discordant + 1)
        assert careful.design_effect == pytest.approx(expected)
        assert careful.pictures * careful.design_effect == pytest.approx(200) and careful.drop == pytest.approx(
            counts.drop
        )


def test_single_pictures_are_not_doubted() -> None:
    counts = count_pairs(*outcomes(1, 0, 0, -1))
    assert doubted(counts) == counts


def test_without_discordance_each_cluster_counts_once() -> None:
    counts = count_pairs(*outcomes(*[0] * 1200), clusters=np.repeat(np.arange(100), 12))
    assert counts.design_effect == pytest.approx(12) and counts.pictures == pytest.approx(100)


def test_one_cluster_is_one_picture() -> None:
    counts = count_pairs(*outcomes(1, 0, 0, -1, 0, 0), clusters=np.zeros(6))
    assert counts.pictures == pytest.approx(1.0)
    found = tango_interval(counts)
    assert found.low < -0.9 and found.high > 0.9


def test_few_clusters_use_students_distribution() -> None:
    few = PairedCounts(3.0, 1.0, 100.0, 10, 5.0)
    assert tango_interval(few).width > tango_interval(counted(3, 1, 100)).width
    assert score_tail(few, 2.0) == pytest.approx(stats.t.sf(2.0, 9))


def test_the_coarsest_unit_with_enough_clusters_is_chosen() -> None:
    sources = [f"photo{n % 7}" for n in range(1200)]
    pairs = [f"pair{n // 2}" for n in range(1200)]
    chosen = choose_clusters({"photograph": sources, "pair": pairs})
    assert (chosen.unit, chosen.count) == ("pair", 600)
    assert "7 of unit photograph" in chosen.note and "more pictures of the same ones" in chosen.note
    assert choose_clusters({"photograph": sources, "pair": pairs}, fewest=7).unit == "photograph"


def test_pictures_without_a_source_stand_alone() -> None:
    chosen = choose_clusters({"source": ["a", "a", "", "", "b"]}, fewest=4)
    assert chosen.count == 4 and chosen.index[0] == chosen.index[1] and chosen.index[2] != chosen.index[3]
    assert not chosen.note


def test_single_pictures_are_the_last_resort() -> None:
    chosen = choose_clusters({"source": ["a", "a", "b"]})
    assert chosen.unit == "picture" and chosen.index.tolist() == [0, 1, 2] and "2 of unit source" in chosen.note
