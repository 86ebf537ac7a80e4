"""Perturbations against plain loops; masks follow; the same picture always gives the same result."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from defaker_opt.drift.perturbations import LEVELS, NAMES, NONE, parse_perturbations, perturb
from defaker_opt.errors import SuiteError
from defaker_opt.sample import sample_image

PIXELS = np.asarray(Image.fromarray(sample_image(3)).resize((37, 23)))
IMAGE = Image.fromarray(PIXELS)
MASK = np.zeros((23, 37), bool)
MASK[5:14, 11:30] = True


def result(name: str, key: str = "k", image: Image.Image = IMAGE) -> np.ndarray:
    return np.asarray(perturb(name, image, None, key)[0])


def luma(pixel: np.ndarray) -> float:
    return float(0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])


def clip(value: float) -> int:
    return int(min(255, max(0, round(value))))


def colour_plain(kind: str, factor: float) -> np.ndarray:
    """Brightness, contrast or saturation, pixel by pixel."""
    mean = sum(luma(pixel) for row in PIXELS for pixel in row) / (PIXELS.shape[0] * PIXELS.shape[1])
    out = np.zeros_like(PIXELS)
    for y, row in enumerate(PIXELS):
        for x, pixel in enumerate(row):
            middle = {"brightness": 0.0, "contrast": mean, "saturation": luma(pixel)}[kind]
            out[y, x] = [clip(middle + factor * (float(value) - middle)) for value in pixel]
    return out


def blur_plain(deviation: float) -> np.ndarray:
    """A weighted sum over the square of four deviations around each pixel, borders repeated."""
    reach = int(4 * deviation + 0.5)
    weights = [math.exp(-(step**2) / (2 * deviation**2)) for step in range(-reach, reach + 1)]
    weights = [weight / sum(weights) for weight in weights]
    height, width, _ = PIXELS.shape
    out = np.zeros(PIXELS.shape)
    for y in range(height):
        for x in range(width):
            for i, down in enumerate(weights):
                for j, right in enumerate(weights):
                    row = min(height - 1, max(0, y + i - reach))
                    column = min(width - 1, max(0, x + j - reach))
                    out[y, x] += down * right * PIXELS[row, column]
    return out


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_colours_equal_a_loop_over_pixels(kind: str) -> None:
    for level in LEVELS[kind]:
        difference = result(f"{kind}-{level:g}").astype(int) - colour_plain(kind, level)
        # Halves may be summed in another order, and so be rounded to either side.
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.01
        assert (result(f"{kind}-{level:g}") != PIXELS).any()


@pytest.mark.parametrize("deviation", LEVELS["blur"])
def test_blur_equals_a_sum_over_neighbours(deviation: float) -> None:
    assert np.abs(result(f"blur-{deviation:g}") - blur_plain(deviation)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("deviation", LEVELS["noise"])
def test_noise_has_its_deviation_and_follows_the_key(deviation: float) -> None:
    grey = Image.new("RGB", (200, 150), (128, 128, 128))
    noise = result(f"noise-{deviation:g}", "a", grey).astype(float) - 128
    assert noise.std() == pytest.approx(math.hypot(deviation, 12**-0.5), rel=0.02)
    assert abs(noise.mean()) < 0.1
    np.testing.assert_array_equal(result(f"noise-{deviation:g}", "a", grey), noise + 128)
    assert (result(f"noise-{deviation:g}", "b", grey) != noise + 128).mean() > 0.5


def test_jpeg_takes_more_away_at_lower_quality() -> None:
    errors = [np.abs(result(f"jpeg-{quality:g}").astype(int) - PIXELS).mean() for quality in sorted(LEVELS["jpeg"])]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


@pytest.mark.parametrize("factor", LEVELS["resize"])
def test_the_mask_follows_a_resize_by_nearest_neighbour(factor: float) -> None:
    image, mask = perturb(f"resize-{factor:g}", IMAGE, MASK, "k")
    assert mask is not None
    assert image.size == mask.shape[::-1] == (round(37 * factor), round(23 * factor))
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            from_y, from_x = int((y + 0.5) * 23 / mask.shape[0]), int((x + 0.5) * 37 / mask.shape[1])
            assert mask[y, x] == MASK[from_y, from_x]


def test_a_picture_of_one_pixel_survives_everything() -> None:
    dot = Image.new("RGB", (1, 1), (9, 200, 30))
    for name in NAMES:
        image, mask = perturb(name, dot, np.ones((1, 1), bool), "k")
        assert image.size == (1, 1)
        assert mask is not None
        assert mask.all()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_deterministic_and_leaves_its_input_alone(name: str) -> None:
    before = PIXELS.copy()
    np.testing.assert_array_equal(result(name), result(name))
    np.testing.assert_array_equal(np.asarray(IMAGE), before)


def test_none_changes_nothing() -> None:
    assert perturb(NONE, IMAGE, MASK, "k") == (IMAGE, MASK)


def test_names_are_parsed() -> None:
    assert parse_perturbations([]) == ()
    assert parse_perturbations(["jpeg-70", "resize", "jpeg-95", "jpeg-70"]) == (
        "jpeg-95",
        "jpeg-70",
        "resize-0.75",
        "resize-0.5",
    )
    assert parse_perturbations(["all"]) == NAMES
    assert {"jpeg-95", "jpeg-85", "jpeg-70", "jpeg-50", "resize-0.75", "resize-0.5"} < set(NAMES)
    with pytest.raises(SuiteError, match=r"perturbation 'jpg-70' is not one of .*did you mean 'jpeg-70'"):
        parse_perturbations(["jpeg-50", "jpg-70"])
