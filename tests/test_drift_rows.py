"""What is kept of a picture and a build, against pixel-by-pixel twins."""

from __future__ import annotations

import numpy as np
import pytest

from defaker_opt.benchmarks import Item, Locator
from defaker_opt.drift.compare import PairRow, derived_slices, join_rows, mask_agreement
from defaker_opt.drift.rows import (
    BINS,
    LOGIT_EDGES,
    ImageRow,
    MaskFacts,
    Problem,
    TruthCounts,
    count_truth,
    logit_bins,
    pack_mask,
    unpack_mask,
)
from tests.conftest import ROOT


def facts_of(mask: np.ndarray, truth: TruthCounts | None = None) -> MaskFacts:
    return MaskFacts(mask.shape[1], mask.shape[0], float(mask.mean()), pack_mask(mask), truth)


def row_of(mask: np.ndarray, key: str = "a", predicted: int = 0, truth: TruthCounts | None = None) -> ImageRow:
    return ImageRow(key, 0, 0.25, predicted, (0.0,) * 8, facts_of(mask, truth), 7, {"total": 1.0})  # type: ignore[arg-type]


def correlated(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth logits, and a ground truth that follows them loosely."""
    logits = rng.normal(0, 6, (height, width)).cumsum(0).cumsum(1)
    logits = (logits / np.abs(logits).max() * 40).astype(np.float32)
    return logits, logits + rng.normal(0, 8, logits.shape) > 5


def test_edges_rise_and_zero_is_one() -> None:
    assert len(LOGIT_EDGES) == BINS - 1
    assert (np.diff(LOGIT_EDGES) > 0).all()
    assert LOGIT_EDGES[BINS // 2 - 1] == 0
    np.testing.assert_array_equal(LOGIT_EDGES, -LOGIT_EDGES[::-1])
    assert LOGIT_EDGES[-1] == 30


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 31)])
@pytest.mark.parametrize("threshold", [0.0, 1.7, -50.0, 50.0])
def test_counts_equal_a_loop_over_pixels(shape: tuple[int, int], threshold: float) -> None:
    logits, truth = correlated(np.random.default_rng(shape[0]), *shape)
    logits.flat[:: max(1, logits.size // 9)] = np.resize(LOGIT_EDGES, logits.flat[:: max(1, logits.size // 9)].shape)
    mask = logits > threshold
    got = count_truth(mask, truth, logit_bins(logits))
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    forged, authentic = [0] * BINS, [0] * BINS
    for y in range(shape[0]):
        for x in range(shape[1]):
            name = ("t" if bool(mask[y, x]) == bool(truth[y, x]) else "f") + ("p" if mask[y, x] else "n")
            counts[name] += 1
            place = 0
            while place < BINS - 1 and logits[y, x] >= LOGIT_EDGES[place]:
                place += 1
            (forged if truth[y, x] else authentic)[place] += 1
    assert got == TruthCounts(**counts, forged=tuple(forged), authentic=tuple(authentic))


def test_iou_and_f1_are_those_of_pixel_sets() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        logits, truth = correlated(rng, 9, 12)
        truth[0, 0] = True
        mask = logits > 0
        counts = count_truth(mask, truth, logit_bins(logits))
        one, other = (set(map(tuple, np.argwhere(values).tolist())) for values in (mask, truth))
        assert counts.iou == pytest.approx(len(one & other) / len(one | other))
        assert counts.f1 == pytest.approx(2 * len(one & other) / (len(one) + len(other)))
        assert counts.forged_share == pytest.approx(len(other) / truth.size)


def test_an_empty_ground_truth_has_neither() -> None:
    none = np.zeros((4, 5), bool)
    counts = count_truth(~none, none, logit_bins(np.ones((4, 5), np.float32)))
    assert (counts.iou, counts.f1, counts.fp) == (None, None, 20)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 96), (101, 33)])
def test_a_mask_is_unpacked_as_it_was(shape: tuple[int, int]) -> None:
    mask = correlated(np.random.default_rng(1), *shape)[1]
    np.testing.assert_array_equal(unpack_mask(facts_of(mask)), mask)


def test_agreement_of_masks() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.random((13, 21)) > 0.3, rng.random((13, 21)) > 0.6
    expected = (one & other).sum() / (one | other).sum()
    assert mask_agreement(facts_of(one), facts_of(other)) == pytest.approx(expected)
    none = np.zeros((13, 21), bool)
    assert mask_agreement(facts_of(none), facts_of(none)) == 1.0
    assert mask_agreement(facts_of(none), facts_of(one)) == 0.0


@pytest.mark.parametrize(
    ("tp", "fn", "expected"),
    [(1, 3, "<0.5%"), (3, 2, "0.5-2%"), (10, 10, "2-10%"), (99, 1, ">10%"), (1000, 0, ">10%"), (0, 0, None)],
)
def test_forged_pictures_are_binned_by_area(tp: int, fn: int, expected: str | None) -> None:
    truth = TruthCounts(tp, 0, fn, 1000 - tp - fn, (0,) * BINS, (0,) * BINS)
    slices = derived_slices(row_of(np.zeros((20, 50), bool), truth=truth))
    assert slices.get("forged_area") == expected
    assert slices["resolution"] == "<0.25MP"


def test_rows_are_paired_and_what_either_build_left_out_is_said() -> None:
    items = [Item(key, Locator(ROOT / key), 0, source="s", slices={"domain": "d"}) for key in "abc"]
    empty, full = np.zeros((2, 4), bool), np.ones((2, 4), bool)
    first = [row_of(empty, "a"), Problem("b", "unreadable"), row_of(empty, "c")]
    second = [row_of(full, "a", predicted=1), row_of(empty, "b"), Problem("c", "not a number")]
    pair, left, other = join_rows("set", "none", items, first, second)
    assert isinstance(pair, PairRow)
    assert (pair.key, pair.label, pair.flipped, pair.area_bias, pair.mask_agreement) == ("a", 0, True, 1.0, 0.0)
    assert pair.slices == {"domain": "d", "resolution": "<0.25MP"}
    assert (str(left), str(other)) == ("b: unreadable", "c: not a number")
    with pytest.raises(ValueError, match="shorter"):
        list(join_rows("set", "none", items, first, second[:2]))
