"""Perceptual hashes, and pictures that are in two sets."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defaker_opt.benchmarks import Benchmark, Item, Locator
from defaker_opt.drift.leakage import LEAK_BITS, LEAK_CORRELATION, find_leaks, hash_benchmark, refuse_leaks
from defaker_opt.drift.picture_hash import hash_distances, picture_hash, sketch_correlation
from defaker_opt.drift.rows import ImageRow, MaskFacts, Problem
from defaker_opt.errors import SuiteError
from defaker_opt.sample import sample_image


def hash_plain(image: Image.Image) -> int:
    """Means of cells, then the cosine sums as they are written down."""
    grey = np.asarray(image.convert("L"), float)
    height, width = grey.shape[0] // 32, grey.shape[1] // 32
    cells = [
        [round(grey[y * height : (y + 1) * height, x * width : (x + 1) * width].mean()) for x in range(32)]
        for y in range(32)
    ]
    sums = []
    for v in range(8):
        for u in range(8):
            scale = (math.sqrt(0.5) if v == 0 else 1) * (math.sqrt(0.5) if u == 0 else 1) / 16
            total = sum(
                cells[y][x] * math.cos(math.pi * (2 * y + 1) * v / 64) * math.cos(math.pi * (2 * x + 1) * u / 64)
                for y in range(32)
                for x in range(32)
            )
            sums.append(total * scale)
    middle = sorted(sums)[31:33]
    return int("".join("1" if value > sum(middle) / 2 else "0" for value in sums), 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_hash_is_the_sum_of_cosines(seed: int) -> None:
    image = Image.fromarray(sample_image(seed)).resize((32 * 9, 32 * 5))
    assert (picture_hash(image) ^ hash_plain(image)).bit_count() <= 2  # a cell's mean may be rounded to either side


def test_distances_count_bits() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 50, dtype=np.uint64)
    one = int(hashes[3])
    assert hash_distances(one, hashes).tolist() == [(one ^ int(other)).bit_count() for other in hashes]


def saved_again(image: Image.Image) -> Image.Image:
    """JPEG 70 at 0.75 of the size."""
    file = io.BytesIO()
    smaller = image.resize((round(image.width * 0.75), round(image.height * 0.75)), Image.Resampling.BICUBIC)
    smaller.save(file, "JPEG", quality=70)
    return Image.open(file).convert("RGB")


def test_flat_pictures_are_alike_only_to_each_other() -> None:
    flat, other = Image.new("RGB", (50, 40), (9, 9, 9)), Image.new("RGB", (64, 64), (200, 200, 200))
    assert sketch_correlation(flat, other) == 1.0
    assert sketch_correlation(flat, Image.fromarray(sample_image(0))) == 0.0


def benchmark_of(folder: Path, name: str, images: dict[str, Image.Image]) -> Benchmark:
    items = []
    for key, image in images.items():
        image.save(folder / f"{name}-{key}.png")
        items.append(Item(key, Locator(folder / f"{name}-{key}.png"), 0))
    return Benchmark(name, tuple(items))


def row_of(key: str, image: Image.Image) -> ImageRow:
    facts = MaskFacts(1, 1, 0.0, b"", None)
    return ImageRow(key, 0, 0.5, 0, (0.0,) * 8, facts, picture_hash(image), {})


def test_a_picture_saved_again_is_found_and_others_are_not(tmp_path: Path) -> None:
    taught = {f"c{seed}": Image.fromarray(sample_image(seed)) for seed in range(6)}
    tested = {f"t{seed}": Image.fromarray(sample_image(seed)) for seed in range(20, 30)}
    calibration = benchmark_of(tmp_path, "calibration", taught)
    hashes = hash_benchmark(calibration)
    clean = benchmark_of(tmp_path, "clean", tested)
    rows = [row_of(key, image) for key, image in tested.items()]
    assert find_leaks(calibration, hashes, zip(clean.items, rows)) == []
    refuse_leaks(calibration, clean, [])
    leaky = {**tested, "copy": saved_again(taught["c4"]), "bad": tested["t20"]}
    suite = benchmark_of(tmp_path, "leaky", leaky)
    leaky_rows = [*rows, row_of("copy", leaky["copy"]), Problem("bad", "unreadable")]
    [leak] = find_leaks(calibration, hashes, zip(suite.items, leaky_rows))
    assert (leak.calibration, leak.tested) == ("c4", "copy")
    assert leak.bits <= LEAK_BITS
    assert leak.correlation >= LEAK_CORRELATION
    with pytest.raises(SuiteError, match=r"1 pictures of the calibration set calibration .* leaky too.*c4 is copy"):
        refuse_leaks(calibration, suite, [leak])
    with pytest.raises(SuiteError, match=r"7 pictures.*and 2 more"):
        refuse_leaks(calibration, suite, [leak] * 7)


def test_near_hashes_of_different_pictures_are_looked_at_again(tmp_path: Path) -> None:
    """A hash alone would accuse pages that have the same layout."""
    one, other = Image.fromarray(sample_image(1)), Image.fromarray(sample_image(2))
    calibration, suite = benchmark_of(tmp_path, "a", {"one": one}), benchmark_of(tmp_path, "b", {"other": other})
    assert find_leaks(calibration, hash_benchmark(calibration), zip(suite.items, [row_of("other", one)])) == []


def test_the_shipped_sets_share_no_picture(tmp_path: Path) -> None:
    from defaker_opt.drift.suites import load_suite

    def quiet(what: str, fraction: float) -> None:
        pass

    calibration = load_suite("calibration", None, tmp_path, quiet)
    quick = load_suite("quick", None, tmp_path, quiet)
    hashes = hash_benchmark(calibration)
    assert find_leaks(calibration, hashes, hashed(quick)) == []
    # Each is found in itself, so the line above could have failed.
    found = {leak.tested for leak in find_leaks(calibration, hashes, hashed(calibration)) if leak.bits == 0}
    assert found == {item.key for item in calibration.items}


def hashed(benchmark: Benchmark) -> list[tuple[Item, ImageRow]]:
    """Items with a row each, which holds the hash and nothing else of interest."""
    facts = MaskFacts(1, 1, 0.0, b"", None)
    return [
        (item, ImageRow(item.key, item.label, 0.5, 0, (0.0,) * 8, facts, known, {}))
        for item, known in zip(benchmark.items, hash_benchmark(benchmark), strict=True)
    ]
