"""Rows on disk: what is read is what was kept, and what is cut short or damaged is dropped, never read."""

from __future__ import annotations

import hashlib
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defaker_opt.drift.cache import open_cache
from defaker_opt.drift.rows import ImageRow, MaskFacts, count_truth, logit_bins, pack_mask
from defaker_opt.errors import DefakerError

OWNER = {"build": "b", "threads": 1}


def digest_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def row_of(number: int) -> ImageRow:
    rng = np.random.default_rng(number)
    logits = rng.normal(0, 10, (6 + number, 9)).astype(np.float32)
    mask = logits > 0
    truth = count_truth(mask, rng.random(mask.shape) > 0.5, logit_bins(logits)) if number % 3 else None
    facts = MaskFacts(mask.shape[1], mask.shape[0], float(mask.mean()), pack_mask(mask), truth)
    verdict = tuple(rng.normal(0, 3, 8).astype(np.float32).tolist())
    latency = {"language": 1.25, "total": 3.5 + number}
    return ImageRow(f"key {number}", number % 2, rng.random(), 1, verdict, facts, 2**64 - 1 - number, latency)  # type: ignore[arg-type]


def fill(folder: Path, numbers: range) -> Path:
    cache = open_cache(folder, OWNER)
    for number in numbers:
        cache.append_(digest_of(number), row_of(number))
    return cache.path


def readable(folder: Path, count: int) -> list[int]:
    """Which of the first rows are kept; those that are must be what was kept."""
    cache = open_cache(folder, OWNER)
    kept = [number for number in range(count) if digest_of(number) in cache]
    for number in kept:
        row = row_of(number)
        assert cache.read(digest_of(number), row.key, row.label) == row
    return kept


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    fill(tmp_path, range(7))
    cache = open_cache(tmp_path, OWNER)
    for number in reversed(range(7)):
        row = cache.read(digest_of(number), "another key", 0)
        assert row == replace(row_of(number), key="another key", label=0)
        assert row.latency_ms == row_of(number).latency_ms
    assert digest_of(7) not in cache


def test_every_way_of_being_cut_short_loses_the_last_row_alone(tmp_path: Path) -> None:
    path = fill(tmp_path, range(3))
    before = path.stat().st_size
    fill(tmp_path, range(3, 4))
    content = path.read_bytes()
    for size in [*range(before, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:size])
        assert readable(tmp_path, 4) == [0, 1, 2], size
    # What was lost is judged again, and then everything is there, in the bytes of a run that was never cut short.
    path.write_bytes(content[: before + 20])
    fill(tmp_path, range(3, 4))
    assert path.read_bytes() == content
    assert readable(tmp_path, 4) == [0, 1, 2, 3]


def test_a_flipped_bit_is_never_read(tmp_path: Path) -> None:
    path = fill(tmp_path, range(3))
    content = path.read_bytes()
    head = content.index(b"\n") + 1
    for place in range(head, len(content), 11):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        kept = readable(tmp_path, 3)
        assert len(kept) < 3
        assert kept == list(range(len(kept)))


def test_damage_after_opening_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    cache = open_cache(tmp_path, OWNER)
    content = bytearray(cache.path.read_bytes())
    content[-1] ^= 1
    cache.path.write_bytes(content)
    with pytest.raises(DefakerError, match=r"\.rows: changed while it was read; run again"):
        cache.read(digest_of(1), "key", 0)


def test_a_damaged_head_starts_over(tmp_path: Path) -> None:
    path = fill(tmp_path, range(2))
    path.write_bytes(path.read_bytes()[:5])
    assert readable(tmp_path, 2) == []
    fill(tmp_path, range(2))
    assert readable(tmp_path, 2) == [0, 1]


def test_another_owner_has_rows_of_its_own(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    assert digest_of(0) not in open_cache(tmp_path, {**OWNER, "threads": 2})
    assert digest_of(0) in open_cache(tmp_path, dict(reversed(OWNER.items())))


def test_two_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    one, other = open_cache(tmp_path, OWNER), open_cache(tmp_path, OWNER)
    for number in range(6):
        (one if number % 2 else other).append_(digest_of(number), row_of(number))
    assert readable(tmp_path, 6) == list(range(6))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=fill, args=(tmp_path, numbers)) for numbers in (range(6, 40), range(40, 70))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert readable(tmp_path, 70) == list(range(70))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DefakerError, match=r"file/rows.*: cannot be written .*choose another"):
        open_cache(tmp_path / "file", OWNER)
