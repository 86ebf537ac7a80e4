"""Pixels in and masks out, against slow twins and torch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from defaker_opt.runtime import images
from defaker_opt.runtime.images import full_size_mask, image_tiles, mask_image, resized_rows, tile_grid
from defaker_opt.sample import sample_image
from tests.reference.images import normalize_plain, tiles_plain

SIZES = [(640, 480), (480, 640), (1, 1), (1, 300), (300, 1), (448, 448), (2000, 350), (897, 895), (33, 57)]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(sample_image(3)).resize((width, height))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("tile_size", "max_tiles"), [(224, 4), (112, 12)])
def test_tiles_equal_the_original_codes(size: tuple[int, int], tile_size: int, max_tiles: int) -> None:
    image = picture(*size)
    expected = [normalize_plain(tile) for tile in tiles_plain(image, tile_size, 1, max_tiles)]
    np.testing.assert_array_equal(image_tiles(image, tile_size, 1, max_tiles), np.stack(expected))


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_tiles=st.integers(1, 12))
def test_the_grid_equals_the_plain_search(width: int, height: int, max_tiles: int) -> None:
    tiny = Image.new("RGB", (width, height))
    columns, rows = tile_grid(width, height, 8, 1, max_tiles)
    expected = len(tiles_plain(tiny, 8, 1, max_tiles))
    assert (columns * rows if columns * rows == 1 else columns * rows + 1) == expected


def test_tile_counts_are_those_the_detector_knows() -> None:
    counts = {i * j + (i * j > 1) for w in range(1, 60) for h in range(1, 60) for i, j in [tile_grid(w, h, 8, 1, 12)]}
    assert counts <= {1, *range(3, 14)}


def test_the_mask_image_is_the_whole_picture_squeezed() -> None:
    image = picture(640, 400)
    expected = normalize_plain(image.resize((256, 256)))
    np.testing.assert_array_equal(mask_image(image, 256)[0], expected)


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (37, 901), (2000, 1200), (256, 256)], ids=str)
@pytest.mark.parametrize("mask_size", [96, 256])
def test_masks_are_resized_as_torch_resizes_them(size: tuple[int, int], mask_size: int) -> None:
    width, height = size
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((mask_size, mask_size)).astype(np.float32) * 8
    big = functional.interpolate(torch.from_numpy(logits)[None, None], size=(4 * mask_size,) * 2, mode="bilinear")
    expected = functional.interpolate(big, size=(height, width), mode="bilinear")[0, 0].numpy()
    resized = np.concatenate(list(resized_rows(logits, 4 * mask_size, width, height, band=100)))
    np.testing.assert_allclose(resized, expected, rtol=0, atol=2e-5)
    mask = full_size_mask(logits, 4 * mask_size, width, height)
    assert mask.shape == (height, width)
    decided = np.abs(expected) > 1e-4
    np.testing.assert_array_equal(mask[decided], (expected > 0)[decided])


def test_warnings_stay_off_while_any_thread_decodes_and_come_back_after() -> None:
    """Filters are the process's, so the first who leaves must not restore them for the others."""
    before = list(warnings.filters)
    with images._QUIET:
        with images._QUIET:
            pass
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
        assert not seen
    assert warnings.filters == before
