"""Packed codes: equal to a twin that goes bit by bit, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defaker_opt.packing import BITS, fills_words, pack, unpack
from tests.reference.packing import pack_plain


@pytest.mark.parametrize("bits", BITS)
@given(periods=st.integers(1, 3), columns=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_codes_come_back_and_lie_where_the_twin_puts_them(bits: int, periods: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (32 * periods, columns)).astype(np.uint8)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, pack_plain(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_a_code_of_three_bits_may_lie_in_two_words() -> None:
    codes = np.zeros((32, 1), np.uint8)
    codes[10] = 0b101  # bits 30, 31 and 32
    np.testing.assert_array_equal(pack(codes, 3)[:, 0].view(np.uint32), [1 << 30, 1, 0])


@pytest.mark.parametrize(("count", "bits", "whole"), [(8, 4, True), (12, 4, False), (32, 3, True), (16, 3, False)])
def test_only_whole_words_are_packed(count: int, bits: int, whole: bool) -> None:
    assert fills_words(count, bits) is whole
    if not whole:
        with pytest.raises(AssertionError, match="within a word"):
            pack(np.zeros((count, 1), np.uint8), bits)
