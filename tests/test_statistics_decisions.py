"""Exact chances, decisions, numbers of images, and looks, against loops over every outcome."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from defaker_opt.errors import DefakerError
from defaker_opt.statistics import Interval
from defaker_opt.statistics.crossing import (
    Boundaries,
    LimitTest,
    Rates,
    critical_scores,
    crossings,
    exact_tails,
    limit_test,
)
from defaker_opt.statistics.decision import (
    decide,
    decide_all,
    decide_interval,
    holm,
    is_implausible_gain,
    two_sided,
)
from defaker_opt.statistics.paired_proportions import PairedCounts, tango_score
from defaker_opt.statistics.sample_size import assumed_rates, images_needed
from defaker_opt.statistics.sequential import Plan, even_looks, judge_look, plan_looks, spending_boundaries
from tests.reference.statistics import crossing_plain


def counted(losses: float, gains: float, pictures: int) -> PairedCounts:
    return PairedCounts(losses, gains, pictures, pictures)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_looks(even_looks(1200), 0.01)


@pytest.mark.parametrize(
    ("looks", "accept", "reject"),
    [((6,), (0.5,), (0.8,)), ((3, 7), (0.9, 0.3), (1.2, 0.7)), ((2, 4, 6), (9.0, 0.4, 0.2), (0.9, 9.0, 0.5))],
)
@pytest.mark.parametrize("rates", [Rates(0.3, 0.1), Rates(0.25, 0.0), Rates(0.0, 0.4), Rates(0.6, 0.4)])
def test_crossings_are_sums_over_all_paths(looks, accept, reject, rates) -> None:
    accepted, rejected = crossings(Boundaries(looks, accept, reject), 0.2, rates)
    plain = crossing_plain(looks, accept, reject, 0.2, rates.loss, rates.gain, tango_score)
    assert (accepted.sum(), rejected.sum()) == pytest.approx(plain, abs=1e-10)


def test_exact_tails_cover_all_outcomes() -> None:
    # Both tails hold the observed outcome itself, so together they are at least 1.
    for score in (-2.0, -0.3, 0.0, 1.1):
        low, high = exact_tails(40, 0.05, score)
        assert low + high >= 1.0


def test_exact_tails_with_a_discordance_of_the_limit() -> None:
    # All discordant pictures are then losses: "none in 300" has chance 0.99^300.
    score = float(tango_score(0, 0, 300, 0.01))
    assert exact_tails(300, 0.01, score)[0] == pytest.approx(0.99**300, rel=1e-9)


@pytest.mark.parametrize(("pictures", "limit"), [(60, 0.05), (300, 0.01), (1200, 0.005), (5000, 0.005)])
def test_critical_scores_are_the_least_that_keep_the_error(pictures: int, limit: float) -> None:
    accept, reject = critical_scores(pictures, limit, 0.05)
    assert exact_tails(pictures, limit, -accept)[0] <= 0.05 + 1e-9
    assert exact_tails(pictures, limit, reject)[1] <= 0.05 + 1e-9
    # Of all outcomes near, just those beyond the critical score have a tail that small.
    losses, gains = np.meshgrid(np.arange(12), np.arange(6))
    scores = tango_score(losses, gains, pictures, limit).reshape(-1)
    for score in scores[(np.abs(scores) > 1.2) & (np.abs(scores) < 2.4)]:
        low, high = exact_tails(pictures, limit, float(score))
        assert (low <= 0.05) == (score <= -accept)
        assert (high <= 0.05) == (score >= reject)


def test_chance_of_a_false_answer_at_the_limit() -> None:
    # Every outcome with any weight, decided by the function itself, at discordances between those it looks at.
    pictures, limit = 240, 0.01
    losses, gains = np.meshgrid(np.arange(20), np.arange(16))
    answers = np.array(
        [decide(limit_test(counted(b, c, pictures), limit)) for b, c in zip(losses.reshape(-1), gains.reshape(-1))]
    )
    outcomes = np.stack([losses, gains, pictures - losses - gains], axis=-1).reshape(-1, 3)
    for discordance in (0.01, 0.0123, 0.019, 0.031, 0.05):
        shares = [(discordance + limit) / 2, (discordance - limit) / 2, 1 - discordance]
        chances = stats.multinomial.pmf(outcomes, pictures, shares)
        assert chances.sum() > 0.999
        assert chances[answers == "ACCEPT"].sum() <= 0.05
        assert chances[answers == "REJECT"].sum() <= 0.05


def test_many_discordant_pictures_are_tested_by_the_normal_distribution() -> None:
    counts = counted(2600, 2400, 100_000)
    test = limit_test(counts, 0.005)
    score = float(tango_score(2600, 2400, 100_000, 0.005))
    assert test.p_accept == pytest.approx(stats.norm.cdf(score), rel=0.05)


def test_clustered_counts_are_never_surer_than_students_distribution() -> None:
    few = PairedCounts(0.0, 0.0, 1200.0, 4, 10.0)
    assert limit_test(few, 0.005).p_accept >= stats.t.cdf(float(tango_score(0, 0, 1200, 0.005)), 3)
    assert limit_test(few, 0.005).p_accept > limit_test(counted(0, 0, 1200), 0.005).p_accept


@pytest.mark.parametrize(
    ("losses", "gains", "expected"),
    [
        (0, 0, "ACCEPT"),
        (1, 1, "ACCEPT"),
        (3, 8, "ACCEPT"),
        (12, 12, "UNDECIDED"),
        (12, 0, "REJECT"),
        (9, 0, "UNDECIDED"),
    ],
)
def test_decisions_on_the_embedded_set(losses: int, gains: int, expected: str) -> None:
    assert decide(limit_test(counted(losses, gains, 1200), 0.005)) == expected


def test_a_planted_point_is_never_accepted() -> None:
    # 1 pp over 1,200 pictures: 12 pictures lost, and up to 1 % of flips in either direction beside them.
    for flips in range(13):
        assert decide(limit_test(counted(12 + flips, flips, 1200), 0.005)) != "ACCEPT"


def test_decision_is_a_matter_of_confidence() -> None:
    test = LimitTest(p_accept=0.04, p_reject=0.98)
    assert (decide(test), decide(test, 0.99)) == ("ACCEPT", "UNDECIDED")


def test_decision_by_interval() -> None:
    assert decide_interval(Interval(-0.01, 0.004), 0.005) == "ACCEPT"
    assert decide_interval(Interval(-0.01, 0.005), 0.005) == "UNDECIDED"
    assert decide_interval(Interval(0.006, 0.02), 0.005) == "REJECT"
    assert two_sided(0.95) == pytest.approx(0.9)


def test_all_required_benchmarks_must_be_accepted() -> None:
    assert decide_all(["ACCEPT", "ACCEPT"]) == "ACCEPT"
    assert decide_all(["ACCEPT", "UNDECIDED"]) == "UNDECIDED"
    assert decide_all(["UNDECIDED", "REJECT"]) == "REJECT"
    assert decide_all([]) == "UNDECIDED"


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5], [], [0.02, 0.02, 0.9, 1.0], [0.3, 0.001, 0.001]])
def test_holm_is_that_of_statsmodels(p: list[float]) -> None:
    expected = multipletests(p, method="holm")[1] if p else []
    assert holm(p).tolist() == pytest.approx(list(expected))


def test_a_gain_beyond_the_limit_is_implausible() -> None:
    assert is_implausible_gain(Interval(-0.02, -0.006), 0.005)
    assert not is_implausible_gain(Interval(-0.02, -0.004), 0.005)


def test_images_needed_grow_with_discordance_and_shrink_with_the_limit() -> None:
    few, many = images_needed(counted(6, 6, 1200), 0.005), images_needed(counted(12, 12, 1200), 0.005)
    loose = images_needed(counted(12, 12, 1200), 0.01)
    assert few and many and loose and loose.images < few.images < many.images
    assert many.more == many.images - 1200 and many.answer == "ACCEPT"
    # n = (1.645 + 0.842)² · discordance / limit² (Lachenbruch and Lynch 1998) is close where flips are many.
    assert many.images == pytest.approx((1.645 + 0.842) ** 2 * 0.02 / 0.005**2, rel=0.15)


def test_images_needed_to_reject() -> None:
    needed = images_needed(counted(20, 4, 1200), 0.005)
    assert needed and needed.answer == "REJECT" and needed.more > 0 and needed.power >= 0.8


def test_no_number_of_images_tells_a_drop_from_itself() -> None:
    assert images_needed(counted(6, 0, 1200), 0.005) is None
    assert images_needed(counted(6, 0, 1200), 0.005, drop=0.0) is not None


def test_a_discordance_of_none_is_not_believed() -> None:
    assert assumed_rates(counted(0, 0, 99), 0.0) == Rates(0.005, 0.005)


def test_a_design_effect_multiplies_images() -> None:
    single = images_needed(counted(6, 6, 1200), 0.005)
    paired = images_needed(PairedCounts(6, 6, 1200, 1200, 2.0), 0.005)
    assert single and paired and paired.images == 2 * single.images and paired.more == paired.images - 2400


def test_spent_error_is_crossed_by_brownian_motion() -> None:
    times = np.array([0.1, 0.3, 0.35, 0.8, 1.0])
    scores = spending_boundaries(times, 0.05)
    random = np.random.default_rng(0)
    steps = random.normal(size=(400_000, 5)) * np.sqrt(np.diff(times, prepend=0.0))
    walks = np.cumsum(steps, axis=1) / np.sqrt(times)
    crossed = np.maximum.accumulate(walks >= scores, axis=1).mean(axis=0)
    np.testing.assert_allclose(crossed, 0.05 * times**1.25, atol=3 * np.sqrt(0.05 / 400_000))
    assert spending_boundaries(np.array([1.0]), 0.05) == pytest.approx(stats.norm.isf(0.05))


@pytest.mark.parametrize(("pictures", "limit"), [(1200, 0.005), (1200, 0.01), (300, 0.02)])
def test_looks_keep_their_error_at_the_limit(pictures: int, limit: float) -> None:
    plan = plan_looks(even_looks(pictures), limit)
    for factor in (1.0, 1.1, 1.7, 2.6, 4.4, 9.0):
        rates = Rates(limit * (factor + 1) / 2, limit * (factor - 1) / 2)
        accepted, rejected = crossings(plan.boundaries, limit, rates)
        assert accepted.sum() <= 0.0505 and rejected.sum() <= 0.0505


def test_looks_save_pictures_where_the_answer_is_clear(plan: Plan) -> None:
    looks = np.array(plan.boundaries.looks)
    for flips, least in ((0.0, 0.5), (0.005, 0.35), (0.01, 0.3)):
        accepted, rejected = crossings(plan.boundaries, 0.01, Rates(flips / 2, flips / 2))
        stopped = accepted + rejected
        used = float(stopped @ looks) + (1 - float(stopped.sum())) * 1200
        assert 1 - used / 1200 >= least


def test_a_look_decides(plan: Plan) -> None:
    assert judge_look(plan, 1, counted(0, 0, 240)).decision == "UNDECIDED"
    clear = judge_look(plan, 4, counted(0, 0, 600))
    assert clear.decision == "ACCEPT" and clear.finished and clear.score < -plan.boundaries.accept[4]
    worse = judge_look(plan, 4, counted(30, 2, 600))
    assert worse.decision == "REJECT" and worse.finished


def test_the_last_look_finishes(plan: Plan) -> None:
    last = judge_look(plan, 9, counted(12, 6, 1200))
    assert last.decision == "UNDECIDED" and last.finished


def test_a_hopeless_test_is_given_up_and_one_without_that_wish_goes_on() -> None:
    counts = counted(30, 27, 600)
    plan = plan_looks(even_looks(1200), 0.005)
    hopeless = judge_look(plan, 4, counts)
    assert hopeless.decision == "UNDECIDED" and hopeless.finished and hopeless.hope < 0.1
    stubborn = dataclasses.replace(plan, hopeless=0.0)
    assert not judge_look(stubborn, 4, counts).finished


def test_few_clusters_need_more_to_stop(plan: Plan) -> None:
    assert judge_look(plan, 4, counted(0, 0, 600)).decision == "ACCEPT"
    assert judge_look(plan, 4, PairedCounts(0, 0, 600, 8)).decision == "UNDECIDED"


def test_even_looks_end_with_all_pictures() -> None:
    assert even_looks(1200) == tuple(range(120, 1201, 120))
    assert even_looks(3) == (1, 2, 3)


@pytest.mark.parametrize(
    ("looks", "limit", "hopeless", "message"),
    [
        ((), 0.01, 0.1, "looks: must be rising numbers of images from 1"),
        ((100, 100), 0.01, 0.1, "looks: must be rising"),
        ((0, 100), 0.01, 0.1, "looks: must be rising"),
        ((100, 200), 0.0, 0.1, "limit: must be above 0"),
        ((100, 200), 1.0, 0.1, "limit: must be above 0"),
        ((100, 200), 0.01, 1.0, "hopeless: must be 0"),
    ],
)
def test_wrong_plans_are_refused(looks, limit: float, hopeless: float, message: str) -> None:
    with pytest.raises(DefakerError, match=message):
        plan_looks(looks, limit, hopeless=hopeless)


def test_a_look_at_another_number_of_images_is_refused() -> None:
    plan = plan_looks((100, 200), 0.01)
    with pytest.raises(DefakerError, match="look 1 was declared at 100 images, but 90 were judged"):
        judge_look(plan, 0, counted(0, 0, 90))
