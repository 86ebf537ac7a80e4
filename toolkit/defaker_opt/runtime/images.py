"""Pixels exactly as the training pipeline saw them, and masks back at the picture's own size.

Decoding follows the original code, `Image.open(path).convert("RGB")`: the orientation tag is not applied, an alpha
channel is dropped, of an animation the first frame counts. What that conversion would silently destroy is refused.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from defaker_opt.errors import ImageError

Array = NDArray[np.float32]

# A picture above this is refused before it is decoded: 100 million pixels already need 300 MB as RGB.
MAX_PIXELS = 100_000_000

# Modes that convert("RGB") clips at 255, which turns nearly every 16-bit picture white.
CLIPPED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class _Quiet:
    """Without warnings of Pillow's while any thread decodes: they are kept for the whole process, so the first thread
    that comes turns them off, and the last that leaves restores what there was.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                warnings.simplefilter("ignore", UserWarning)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.__exit__(None, None, None)


_QUIET = _Quiet()


def load_image(path: Path | str) -> Image.Image:
    """Decode a picture to RGB. Raises ImageError if it is missing, empty, truncated, too large or not a picture."""
    return decode_image(path, path)


def decode_image(source: Path | str | BinaryIO, path: Path | str) -> Image.Image:
    """`load_image` for a picture that may lie within another file; path: what messages call it."""
    try:
        with _QUIET, Image.open(source) as image:
            _refuse_unsafe(path, image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too many pixels; at most {MAX_PIXELS:,} are read, scale it down first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture of a known format, or empty; JPEG, PNG, WebP, TIFF … are") from error
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file; check the name") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a folder; give the pictures in it, for example {path}/*.jpg") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{path}: cannot be decoded ({reason}); is the file complete?") from error


def _refuse_unsafe(path: Path | str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{path}: {width}x{height} is {width * height:,} pixels; at most {MAX_PIXELS:,} are read, "
            "scale it down first"
        )
    if image.mode in CLIPPED_MODES:
        raise ImageError(
            f"{path}: more than 8 bits a grey value (mode {image.mode}), which the detector would see as white; "
            "convert it to 8 bits first"
        )


def tile_grid(width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of tiles for a picture: InternVL2's dynamic tiling (`dynamic_preprocess`).

    The grid of the nearest aspect ratio wins; of equally near ones the later (larger) grid, if the picture has more
    than half as many pixels as that grid.
    """
    # A set filled in the original code's order: among grids of one area its order is what breaks a tie there.
    grids = {
        (i, j)
        for longest in range(min_tiles, max_tiles + 1)
        for i in range(1, longest + 1)
        for j in range(1, longest + 1)
        if min_tiles <= i * j <= max_tiles
    }
    ratio, best, best_difference = width / height, (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(ratio - i / j)
        if difference < best_difference:
            best, best_difference = (i, j), difference
        elif difference == best_difference and width * height > 0.5 * tile_size * tile_size * i * j:
            best = (i, j)
    return best


def cut_tiles(image: Image.Image, tile_size: int, min_tiles: int, max_tiles: int) -> list[Image.Image]:
    """Cut a picture into tiles, row by row, the thumbnail last if there is more than one."""
    columns, rows = tile_grid(*image.size, tile_size, min_tiles, max_tiles)
    resized = image.resize((tile_size * columns, tile_size * rows))
    tiles = [
        resized.crop((column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size))
        for row in range(rows)
        for column in range(columns)
    ]
    return [*tiles, image.resize((tile_size, tile_size))] if len(tiles) > 1 else tiles


def image_tiles(image: Image.Image, tile_size: int, min_tiles: int, max_tiles: int) -> Array:
    """The tiles of an RGB picture, normalized; [tiles, 3, tile, tile] float32."""
    return np.stack([normalize(tile) for tile in cut_tiles(image, tile_size, min_tiles, max_tiles)])


def distinct_tiles(tiles: Array) -> tuple[list[int], list[int]]:
    """Index of the first of each set of tiles whose bytes are equal, and for every tile the place of its set."""
    places: dict[bytes, int] = {}
    place = [places.setdefault(tile.tobytes(), len(places)) for tile in tiles]
    return [place.index(each) for each in range(len(places))], place


def mask_image(image: Image.Image, size: int) -> Array:
    """The whole picture as the segmenter sees it, aspect ratio not kept; [1, 3, size, size] float32."""
    return normalize(image.resize((size, size)))[None]


def normalize(image: Image.Image) -> Array:
    """8-bit RGB → ImageNet-normalized float32 [3, height, width]."""
    # In place and colour by colour, so that no step needs a new array; the numbers are the same.
    colours = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    colours /= np.float32(255)
    colours -= IMAGENET_MEAN[:, None, None]
    colours /= IMAGENET_STD[:, None, None]
    return colours


def resize_rows(array: Array, size_out: int, rows: range | None = None) -> Array:
    """Bilinear resizing of the first axis to `size_out`, or only some rows of the result.

    Half-pixel centres, clamped at the border, no antialias.
    """
    size_in = array.shape[0]
    # Rounded where torch rounds: the scale to float32, then the centre after one fused multiply-add. Exact arithmetic
    # would move logits by up to 1e-3 where neighbours differ much.
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    index = np.arange(size_out) if rows is None else np.arange(rows.start, rows.stop)
    centre = ((index + 0.5) * scale - 0.5).astype(np.float32)
    centre = np.clip(centre, np.float32(0), np.float32(size_in - 1))
    low = np.floor(centre).astype(np.int64)
    high = np.minimum(low + 1, size_in - 1)
    share = (centre - low).astype(np.float32)[:, None]
    resized: Array = array[low] * (1 - share) + array[high] * share
    return resized


def resized_rows(logits: Array, mask_image_size: int, width: int, height: int, band: int = 256) -> Iterator[Array]:
    """Mask logits [h, w] at the picture's size, in bands of rows; by way of the mask image's size, as in the original.

    Both steps are bilinear and separable, so each number is a sum of a few, and there is never a large picture in
    between.
    """
    to_between = resize_rows(np.eye(logits.shape[1], dtype=np.float32), mask_image_size)
    columns = np.ascontiguousarray(_sums_of_rows(resize_rows(to_between, width), logits.T).T)  # [h, width]
    down = resize_rows(np.eye(logits.shape[0], dtype=np.float32), mask_image_size)
    for start in range(0, height, band):
        yield _sums_of_rows(resize_rows(down, height, range(start, min(start + band, height))), columns)


def _sums_of_rows(shares: Array, array: Array) -> Array:
    """`shares` @ `array` where each row of `shares` [out, in] has a few neighbouring numbers, and else zeros.

    Not as a product of matrices: BLAS would do it in threads, which go on spinning for milliseconds and take the cores
    from the next stage.
    """
    used = shares != 0
    first = used.argmax(1)
    most = int((used.shape[1] - used[:, ::-1].argmax(1) - first).max())
    first = np.minimum(first, used.shape[1] - most)
    rows = np.arange(len(shares))
    total: Array = array[first] * shares[rows, first, None]
    for step in range(1, most):
        total += array[first + step] * shares[rows, first + step, None]
    return total


def full_size_mask(
    logits: Array, mask_image_size: int, width: int, height: int, threshold: float = 0.0
) -> NDArray[np.bool_]:
    """Where the resized logits exceed the threshold; bool [height, width]."""
    if width > height:  # bands along the longer side, so that what is held at once stays small
        return full_size_mask(logits.T, mask_image_size, height, width, threshold).T
    bands = resized_rows(logits, mask_image_size, width, height)
    return np.concatenate([band > threshold for band in bands])
