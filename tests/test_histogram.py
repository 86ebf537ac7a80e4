"""Ranges of activations: what is counted, and which clip each rule chooses, against slow twins on the numbers."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defaker_opt.errors import PassError
from defaker_opt.histogram import CENTRES, EDGES, Clip, input_scale
from defaker_opt.observe import Collector, Sums
from tests.reference.clipping import entropy_clip_plain, squared_error_plain

CLIPS = get_args(Clip)


def counted(x: np.ndarray, parts: int = 1) -> np.ndarray:
    sums = Sums(("histogram",))
    for part in np.array_split(x, parts):
        sums.add_(torch.from_numpy(part.astype(np.float32)).reshape(-1, 1), None, None)
    histogram = sums.statistics().histogram
    assert histogram is not None
    return histogram


def activation(seed: int = 0, outliers: int = 8) -> np.ndarray:
    """Mostly of size 1, a few 60 times larger, some exactly 0, as after an activation function."""
    random = np.random.default_rng(seed)
    x = random.laplace(0, 1, 20_000)
    x[:outliers] *= 60 / np.abs(x[:outliers])
    x[-1000:] = 0
    return x


def test_every_number_is_counted_once_however_it_comes() -> None:
    x = np.concatenate([activation(), [1e-20, -1e30]])
    counts = counted(x)
    inside = np.clip(np.abs(x.astype(np.float32)).astype(np.float64), CENTRES[0], CENTRES[-1])
    np.testing.assert_array_equal(counts, np.histogram(inside, EDGES)[0])
    np.testing.assert_array_equal(counts, counted(x, parts=7))
    assert counts.sum() == len(x)


def least_squares_plain(counts: np.ndarray) -> float:
    """The clip with the least error, each tried on every bin."""
    last = int(np.flatnonzero(counts)[-1]) + 1
    clips = EDGES[max(1, last - 512) : last + 1, None]
    step = clips / 127
    rounded = np.where(step / 2 > CENTRES, CENTRES**2, step**2 / 12)
    error = np.where(clips < CENTRES, (CENTRES - clips) ** 2, rounded) @ counts
    return float(clips[int(np.argmin(error)), 0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outliers", [0, 1, 8, 3000])
def test_running_sums_find_the_clip_that_trying_all_finds(seed: int, outliers: int) -> None:
    x = activation(seed, outliers) * 10.0 ** (seed - 3)
    counts = np.concatenate([[0.0], counted(x)[1:]])
    assert 127 * input_scale(counted(x), "mse") == pytest.approx(least_squares_plain(counts), rel=1e-12)
    alone = np.zeros_like(counts)
    alone[1500 + 37 * seed] = 5
    assert 127 * input_scale(alone, "mse") == pytest.approx(least_squares_plain(alone), rel=1e-12)


def test_the_largest_is_reached_and_hardly_passed() -> None:
    x = activation()
    assert 1 <= 127 * input_scale(counted(x), "largest") / np.abs(x).max() < 1.016


def test_one_number_in_ten_thousand_is_beyond_the_percentile() -> None:
    x = np.random.default_rng(1).exponential(1, 200_000)
    beyond = (x > 127 * input_scale(counted(x), "percentile")).mean()
    assert 0.6e-4 < beyond <= 1e-4


@pytest.mark.parametrize("x", [activation(), activation(1, 200), np.random.default_rng(2).uniform(-3, 3, 20_000)])
def test_the_squared_error_is_nearly_the_least_there_is(x: np.ndarray) -> None:
    steps = np.abs(x).max() / 127 * np.linspace(0.02, 1.1, 300)
    best = min(squared_error_plain(x, step) for step in steps)
    assert squared_error_plain(x, input_scale(counted(x), "mse")) <= 1.05 * best


@pytest.mark.parametrize("x", [activation(), activation(1, 200)])
def test_the_divergence_is_the_least_there_is(x: np.ndarray) -> None:
    counts = counted(x)
    assert 127 * input_scale(counts, "entropy") == pytest.approx(entropy_clip_plain(counts, EDGES))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("zeros", [0.5, 0.99995])
def test_zeros_do_not_hide_the_rest(clip: str, zeros: float) -> None:
    x = np.abs(np.random.default_rng(3).normal(0, 1, 40_000))
    counts, nothing = counted(x), counted(np.zeros(9))
    alone = input_scale(counts, clip)  # type: ignore[arg-type]
    assert nothing[0] == 9 and nothing.sum() == 9
    # As many zeros as an array of gigabytes would hold.
    counts[0] += round(len(x) * zeros / (1 - zeros))
    assert input_scale(counts, clip) == alone  # type: ignore[arg-type]
    assert input_scale(nothing, clip) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_layer(wrong: float) -> None:
    collector = Collector({"language.a.weight": ("histogram",)})
    with pytest.raises(PassError, match=r"language\.a\.weight: it is given numbers that are not finite on a calib"):
        collector.add_({"language.a.weight": [torch.tensor([[1.0, wrong]])]}, {}, None)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_constant_is_reached(clip: str) -> None:
    assert 127 * input_scale(counted(np.full(50, -4.0)), clip) >= 4.0  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(-10, 10), st.sampled_from(CLIPS))
def test_a_scale_grows_with_what_it_is_of(octaves: int, clip: str) -> None:
    x = activation()
    once, scaled = (input_scale(counted(each), clip) for each in (x, 2.0**octaves * x))  # type: ignore[arg-type]
    assert scaled == pytest.approx(2.0**octaves * once, rel=1e-9)
