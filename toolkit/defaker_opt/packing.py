"""Codes of 2, 3, 4 or 8 bits in words of 32, end to end and the lowest bits first, as GPTQ checkpoints hold them.

One of 3 bits may begin in one word and end in the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BITS = (2, 3, 4, 8)
_WORD = 32


def fills_words(count: int, bits: int) -> bool:
    """Whether so many codes end where a word does."""
    return count * bits % _WORD == 0


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Words [n * bits / 32, columns] of codes [n, columns] between 0 and 2^bits - 1; each column has its own words."""
    count, columns = codes.shape
    assert fills_words(count, bits), f"{count} codes of {bits} bits end within a word"
    period, words = _period(bits)
    grouped = codes.reshape(-1, period, columns)
    packed = np.zeros((len(grouped), words, columns), np.uint32)
    for code, word, shift in _places(bits):
        value = grouped[:, code].astype(np.uint32)
        packed[:, word] |= value << np.uint32(shift)
        if shift + bits > _WORD:
            packed[:, word + 1] |= value >> np.uint32(_WORD - shift)
    return packed.reshape(-1, columns).view(np.int32)


def unpack(packed: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Codes [n, columns] of words [n * bits / 32, columns]."""
    period, words = _period(bits)
    columns = packed.shape[1]
    grouped = np.ascontiguousarray(packed).view(np.uint32).reshape(-1, words, columns)
    codes = np.empty((len(grouped), period, columns), np.uint8)
    for code, word, shift in _places(bits):
        value = grouped[:, word] >> np.uint32(shift)
        if shift + bits > _WORD:
            value |= grouped[:, word + 1] << np.uint32(_WORD - shift)
        codes[:, code] = value & np.uint32(2**bits - 1)
    return codes.reshape(-1, columns)


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and how many words, a code begins a word again."""
    common = math.gcd(_WORD, bits)
    return _WORD // common, bits // common


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Each code of a period, the word it begins in, and at which bit."""
    for code in range(_period(bits)[0]):
        yield code, *divmod(code * bits, _WORD)
