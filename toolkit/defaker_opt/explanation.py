"""Whether a build can say in words what it saw, which takes two tables over the vocabulary and its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

# Far above any answer that detectors are taught, and a step of a large one takes about a second.
_MOST_WORDS = 4096


@dataclass(frozen=True)
class Explanation:
    """max_tokens: where an answer is cut off that has not ended."""

    max_tokens: int = 64

    CHECKS: ClassVar[Mapping[str, Callable[[int], str | None]]] = {
        "max_tokens": lambda count: None if 1 <= count <= _MOST_WORDS else f"must be 1 to {_MOST_WORDS}, got {count}"
    }
