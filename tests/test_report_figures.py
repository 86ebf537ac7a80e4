"""Figures of a report against plain loops over the same rows, and decisions on rows that were never judged."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.rows import LOGIT_EDGES, ImageRow, Problem, TruthCounts
from defaker_opt.errors import SuiteError
from defaker_opt.limits import LIMITABLE, Limit
from defaker_opt.report.columns import column
from defaker_opt.report.curves import curves
from defaker_opt.report.evidence import Evidence, gather, merge
from defaker_opt.report.figures import METRICS, Sample, count_flips, measure
from defaker_opt.report.judge import judge, report_suite, sample_of
from defaker_opt.report.slices import slice_up
from defaker_opt.report.values import Check, Figure
from defaker_opt.report.words import NAMES
from defaker_opt.statistics.auc import compare_auc
from defaker_opt.statistics.decision import decide_interval
from defaker_opt.statistics.paired_proportions import count_pairs
from defaker_opt.statistics.sample_size import images_needed
from defaker_opt.statistics.spread import spread_interval, spread_of
from tests.drift_rows import Change, benchmark_of, comparison_of, flip, image_row, judged, paired, same, synthetic_rows

LIMITS = {"verdict_accuracy": Limit(0.005), "mask_iou": Limit(0.005)}
ACCURACY = {"verdict_accuracy": Limit(0.005)}
HALVES = (0.5, 0.5)


def worse(row: ImageRow) -> ImageRow:
    """The same verdict, less sure, and a mask that lost its left half."""
    assert row.mask.truth is not None
    truth = row.mask.truth
    lost = truth.tp // 2
    counts = dataclasses.replace(truth, tp=truth.tp - lost, fn=truth.fn + lost)
    probability = 0.5 + 0.7 * (row.fake_probability - 0.5)
    return dataclasses.replace(
        row, fake_probability=probability, mask=dataclasses.replace(row.mask, truth=counts, area=row.mask.area / 2)
    )


def some_worse(place: int, row: ImageRow) -> ImageRow:
    return flip(row) if place % 31 == 0 else worse(row) if place % 3 else row


@pytest.fixture(scope="module")
def rows() -> tuple[ImageRow, ...]:
    return synthetic_rows(120, seed=4, spread=1.4)


@pytest.fixture(scope="module")
def sample(rows: tuple[ImageRow, ...]) -> Sample:
    return sample_of(gather(paired(rows, some_worse)), HALVES)


@pytest.fixture(scope="module")
def figures(sample: Sample) -> dict[str, Figure]:
    measured = measure(sample, {})
    assert not measured.missing
    return {figure.metric: figure for figure in measured.figures}


def plain_auc(forged: list[float], authentic: list[float]) -> float:
    wins = [(a > b) + (a == b) / 2 for a, b in itertools.product(forged, authentic)]
    return sum(wins) / len(wins)


def test_every_metric_has_a_figure_a_name_and_one_place(figures: dict[str, Figure]) -> None:
    assert tuple(figures) == METRICS
    assert set(METRICS) - set(LIMITABLE) == {"mask_area"}
    assert set(NAMES) == set(METRICS)
    for figure in figures.values():
        assert figure.low <= figure.drop <= figure.high
        assert figure.clusters == 120
        sign = -1 if figure.better == "lower" else 1
        assert figure.drop == pytest.approx(sign * (figure.reference - figure.build))


def test_figures_are_those_of_plain_loops(rows: tuple[ImageRow, ...], figures: dict[str, Figure]) -> None:
    pairs = [row for row in paired(rows, some_worse) if isinstance(row, PairRow)]
    for side in ("reference", "build"):
        judged_rows = [row.reference if side == "reference" else row.candidate for row in pairs]
        right = [row.predicted == row.label for row in judged_rows]
        authentic = [row for row in judged_rows if row.label == 0]
        forged = [row for row in judged_rows if row.label == 1]
        truths = [row.mask.truth for row in forged]
        expected = {
            "verdict_accuracy": sum(right) / len(right),
            "verdict_false_positive_rate": sum(row.predicted for row in authentic) / len(authentic),
            "verdict_true_positive_rate": sum(row.predicted for row in forged) / len(forged),
            "verdict_auc": plain_auc(
                [row.fake_probability for row in forged], [row.fake_probability for row in authentic]
            ),
            "verdict_brier": sum((row.fake_probability - row.label) ** 2 for row in judged_rows) / len(judged_rows),
            "mask_iou": sum(t.tp / (t.tp + t.fp + t.fn) for t in truths if t) / len(truths),
            "mask_f1": sum(2 * t.tp / (2 * t.tp + t.fp + t.fn) for t in truths if t) / len(truths),
            "mask_area": sum(row.mask.area for row in judged_rows) / len(judged_rows),
        }
        for metric, value in expected.items():
            assert getattr(figures[metric], side) == pytest.approx(value), (metric, side)
    agreement = [row.mask_agreement for row in pairs]
    assert figures["mask_agreement"].build == pytest.approx(sum(agreement) / len(agreement))
    assert figures["mask_agreement"].reference == 1
    assert {figures[metric].n for metric in ("mask_iou", "mask_f1", "mask_best_f1", "mask_pixel_auc")} == {120}
    assert figures["verdict_accuracy"].n == 240


def test_mask_figures_of_one_picture_are_those_of_all_thresholds() -> None:
    random = np.random.default_rng(3)
    truth = random.random((12, 16)) < 0.2
    logits = np.round(random.normal(-1, 3, truth.shape) + 2 * truth, 2).astype(np.float32)
    row = image_row("00000-1", 1, 0.9, logits, truth)
    scores = []
    for edge in (-np.inf, *LOGIT_EDGES):
        found = logits >= edge
        scores.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    evidence = gather(paired([row], same))
    assert evidence.reference["mask_best_f1"][0] == pytest.approx(max(scores))
    binned = np.searchsorted(LOGIT_EDGES, logits, side="right")
    expected = plain_auc(binned[truth].tolist(), binned[~truth].tolist())
    assert evidence.reference["mask_pixel_auc"][0] == pytest.approx(expected)


def test_authentic_pictures_have_no_mask_figures(sample: Sample) -> None:
    evidence = sample.evidence
    for metric in ("mask_iou", "mask_f1", "mask_best_f1", "mask_pixel_auc"):
        assert np.isnan(evidence.build[metric]).tolist() == (evidence.labels == 0).tolist()


def test_flips_are_counted_with_a_bound(sample: Sample) -> None:
    flips = count_flips(sample)
    expected = len(range(0, 240, 31))
    assert (flips.flips, flips.n) == (expected, 240)
    assert flips.losses + flips.gains == expected
    assert flips.rate < flips.upper < 3 * flips.rate
    nothing = count_flips(sample_of(sample.evidence.where(~sample.evidence.flipped), HALVES))
    # Twins may all flip together, so without a flip only pairs count.
    assert nothing.upper == pytest.approx(1 - 0.05 ** (1 / 116), rel=0.05)


def test_left_out_pictures_leave_the_others_in_place(rows: tuple[ImageRow, ...]) -> None:
    run = paired(rows, some_worse)
    holed = dataclasses.replace(
        run, reference=dataclasses.replace(run.reference, problems={3: Problem(rows[3].key, "x")})
    )
    left, whole = gather(holed), gather(run)
    assert len(left) == len(whole) - 1
    kept = np.arange(len(whole)) != 3
    assert left.build["probability"].tolist() == whole.build["probability"][kept].tolist()
    assert left.slices["domain"] == whole.where(kept).slices["domain"]


def test_suites_merge_without_mixing_their_clusters(rows: tuple[ImageRow, ...]) -> None:
    parts = [gather(paired(rows[:40], same, name)) for name in ("first", "second")]
    merged = merge(parts)
    assert merged.clusters().count == 40
    assert merged.slices["suite"] == ("first",) * 40 + ("second",) * 40
    assert len(merged) == 80


def test_photographs_are_the_clusters_where_there_are_enough(rows: tuple[ImageRow, ...]) -> None:
    few = gather(paired(rows, same)).clusters()
    assert (few.unit, few.count) == ("pair", 120)
    assert "1 of unit photograph" in few.note
    many = benchmark_of(rows)
    items = tuple(dataclasses.replace(item, source=str(place // 8)) for place, item in enumerate(many.items))
    benchmark = dataclasses.replace(many, items=items)
    side = judged(rows, benchmark)
    run = dataclasses.replace(paired(rows, same), reference=side, candidate=side)
    enough = gather(run).clusters()
    assert (enough.unit, enough.count, enough.note) == ("photograph", 30, "")


def plant(rate: float, seed: int, pictures: int) -> Change:
    chosen = set(np.random.default_rng(seed).choice(pictures, round(rate * pictures), replace=False).tolist())
    return lambda place, row: flip(row) if place in chosen else row


def accuracy_of(rows: tuple[ImageRow, ...], change: Change) -> tuple[Figure, Sample]:
    found = sample_of(gather(paired(rows, change)), HALVES)
    [figure] = measure(found, ACCURACY, only=ACCURACY).figures
    return figure, found


@pytest.fixture(scope="module")
def many() -> tuple[ImageRow, ...]:
    return synthetic_rows(600)


def test_an_identical_build_is_accepted(many: tuple[ImageRow, ...], tmp_path: Path) -> None:
    found = report_suite("drawn", sample_of(gather(paired(many, same)), HALVES), LIMITS)
    assert found.decision == "ACCEPT"
    assert found.flips.flips == 0
    limited = {figure.metric: figure.check for figure in found.figures if figure.check}
    assert set(limited) == set(LIMITS)
    for check in limited.values():
        assert check
        assert check.high < 0.005
        assert not check.implausible_gain
        assert check.more is None


@pytest.mark.parametrize("seed", range(12))
def test_a_planted_regression_is_never_accepted(seed: int, many: tuple[ImageRow, ...]) -> None:
    right_only = [place for place, row in enumerate(many) if row.predicted == row.label]
    chosen = set(np.random.default_rng(seed).choice(right_only, 12, replace=False).tolist())
    figure, found = accuracy_of(many, lambda place, row: flip(row) if place in chosen else row)
    assert figure.drop == pytest.approx(0.01)
    assert figure.check
    assert figure.check.decision in ("REJECT", "UNDECIDED")
    if figure.check.decision == "UNDECIDED":
        evidence = found.evidence
        counts = count_pairs(evidence.right(evidence.reference), evidence.right(evidence.build), found.clusters.index)
        needed = images_needed(counts, 0.005)
        assert needed
        assert (figure.check.images, figure.check.more) == (needed.images, needed.images - 1200)
        assert figure.check.answer == "REJECT"
        # As many pictures again as are asked for, at the same rates, do give the answer.
        times = -(-needed.images // 1200) + 1
        larger = Sample(
            merge([evidence] * times),
            dataclasses.replace(
                found.clusters,
                index=np.concatenate([found.clusters.index + 600 * turn for turn in range(times)]),
                count=600 * times,
            ),
            HALVES,
        )
        [again] = measure(larger, ACCURACY, only=ACCURACY).figures
        assert again.check
        assert again.check.decision == "REJECT"


@pytest.mark.parametrize(("rate", "expected"), [(0.0, "ACCEPT"), (0.06, "REJECT")])
def test_clear_cases_are_decided(rate: float, expected: str, many: tuple[ImageRow, ...]) -> None:
    figure, _ = accuracy_of(many, plant(rate, 5, 1200))
    assert figure.check
    assert figure.check.decision == expected


def test_too_few_pictures_are_undecided_with_a_number(rows: tuple[ImageRow, ...]) -> None:
    suite = report_suite("drawn", sample_of(gather(paired(rows, same)), HALVES), LIMITS)
    assert suite.decision == "UNDECIDED"
    for figure in suite.figures:
        if figure.check:
            assert figure.check.answer == "ACCEPT"
            assert figure.check.more is not None
            assert figure.check.images is not None
            # 598 pairs without any change are the fewest that show a change of less than half a point.
            assert 900 <= figure.check.images * (2 if figure.metric == "mask_iou" else 1) <= 6000


def test_a_surely_better_build_is_flagged(many: tuple[ImageRow, ...], tmp_path: Path) -> None:
    def repaired(place: int, row: ImageRow) -> ImageRow:
        return row if row.predicted == row.label else flip(row)

    report = judge(comparison_of([paired(many, repaired)], tmp_path), ACCURACY)
    assert report.decision == "ACCEPT"
    assert any("compression does not teach" in warning for warning in report.warnings)


def test_one_bad_suite_of_two_rejects(many: tuple[ImageRow, ...], tmp_path: Path) -> None:
    runs = [paired(many, same, "good"), paired(many, plant(0.1, 1, 1200), "bad")]
    report = judge(comparison_of(runs, tmp_path), ACCURACY)
    assert report.decision == "REJECT"
    assert [suite.decision for suite in report.suites] == ["ACCEPT", "REJECT"]
    assert report.pooled.images == 2400
    assert report.worst
    assert report.worst.worse
    assert report.summary.startswith("bad: accuracy is worse by")


def test_the_slice_that_is_broken_is_the_worst(many: tuple[ImageRow, ...]) -> None:
    def documents(place: int, row: ImageRow) -> ImageRow:
        broken = int(row.key[:5]) % 3 == 0 and place % 5 == 0
        return flip(row) if broken else row

    found = sample_of(gather(paired(many, documents)), HALVES)
    blurred = sample_of(gather(paired(many, same, perturbation="blur-1")), HALVES)
    sliced = slice_up(found, {"blur-1": blurred}, LIMITS)
    assert sliced.slices[0].name == "domain = document"
    assert sliced.slices[0].worse
    assert {each.dimension for each in sliced.slices} >= {"domain", "label", "forged_area", "perturbation"}
    assert not any(each.worse for each in sliced.slices if each.name in ("domain = natural", "domain = aigc"))
    authentic = next(each for each in sliced.slices if each.name == "label = authentic")
    labels = found.evidence.labels
    rate = found.evidence.build["predicted"][labels == 0].mean()
    assert 1 - authentic.build == pytest.approx(rate)


def test_small_slices_are_named_not_dropped_silently(rows: tuple[ImageRow, ...]) -> None:
    found = sample_of(gather(paired(rows[:24], same)), HALVES)
    sliced = slice_up(found, {}, LIMITS)
    assert any("domain = document: 8 images, fewer than 10" in line for line in sliced.skipped)
    assert not any(each.dimension == "domain" for each in sliced.slices)


def test_a_limit_that_nothing_can_measure_is_undecided(many: tuple[ImageRow, ...], tmp_path: Path) -> None:
    authentic = tuple(row for row in many if row.label == 0)
    report = judge(comparison_of([paired(authentic, same)], tmp_path), LIMITS)
    assert report.decision == "UNDECIDED"
    assert any("mask_iou: no forged image with a ground truth mask" in line for line in report.warnings)
    assert any(line.startswith("verdict_auc: ") for line in report.pooled.missing)


def test_nothing_judged_is_an_error(rows: tuple[ImageRow, ...], tmp_path: Path) -> None:
    run = paired(rows[:4], same)
    empty = dataclasses.replace(
        run, reference=dataclasses.replace(run.reference, problems={i: Problem(rows[i].key, "bad") for i in range(4)})
    )
    with pytest.raises(SuiteError, match="drawn: not one picture was judged by both builds"):
        judge(comparison_of([empty], tmp_path), LIMITS)


def test_curves_end_where_they_must(sample: Sample) -> None:
    found = curves(sample.evidence)
    for side in found.roc:
        assert side[0] == (0.0, 0.0)
        assert side[-1] == (1.0, 1.0)
    for bins in found.reliability:
        assert sum(n for *_, n in bins) == 240
        assert sum(share * n for _, share, n in bins) == pytest.approx(120)
    assert sum(each.n for each in found.area_bins) == 120
    names = [each.name for each in found.area_bins]
    for each in found.area_bins:
        inside = np.array([value == each.name for value in sample.evidence.slices["forged_area"]])
        assert each.mask_iou[1] == pytest.approx(sample.evidence.build["mask_iou"][inside].mean())
    assert names == [name for name in ("<0.5%", "0.5-2%", "2-10%", ">10%") if name in names]


def test_evidence_without_truth_has_no_mask_figures(rows: tuple[ImageRow, ...]) -> None:
    bare = tuple(dataclasses.replace(row, mask=dataclasses.replace(row.mask, truth=None)) for row in rows[:60])
    evidence: Evidence = gather(paired(bare, same))
    assert np.isnan(evidence.reference["mask_iou"]).all()
    measured = measure(sample_of(evidence, HALVES), {})
    assert sum(line.startswith("mask_") for line in measured.missing) == 4


def test_truth_counts_of_an_all_forged_picture_have_no_pixel_auc() -> None:
    row = image_row("00000-1", 1, 0.9, np.zeros((12, 16), np.float32), np.ones((12, 16), bool))
    assert isinstance(row.mask.truth, TruthCounts)
    assert np.isnan(gather(paired([row], same)).reference["mask_pixel_auc"][0])


@pytest.mark.parametrize("metric", ["mask_iou", "verdict_auc"])
def test_a_limit_is_held_against_the_interval_that_decides(metric: str, sample: Sample) -> None:
    evidence = sample.evidence
    if metric == "mask_iou":
        figure = column(metric, evidence, sample.thresholds)
        clusters = np.unique(sample.clusters.index[figure.used], return_inverse=True)[1]
        shown = spread_interval(spread_of(figure.drop, figure.influence, clusters), 0.9)
    else:
        scores = evidence.reference["probability"], evidence.build["probability"]
        compared = compare_auc(evidence.labels, *scores, sample.clusters.index, 0.9)
        assert compared
        shown = compared.interval

    def checked(limit: float) -> Check:
        (found,) = (each for each in measure(sample, {metric: Limit(limit)}).figures if each.metric == metric)
        assert found.check
        return found.check

    high = checked(1.0).high
    assert shown.high < high
    between = (shown.high + high) / 2
    assert decide_interval(shown, between) == "ACCEPT"
    undecided = checked(between)
    assert undecided.decision == "UNDECIDED" and undecided.images and undecided.images > len(evidence)
