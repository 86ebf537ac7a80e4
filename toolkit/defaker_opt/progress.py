"""How work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Told what is being done and how much of it is behind us, 0…1.
Progress = Callable[[str, float], None]


def part_of(progress: Progress, start: float, size: float) -> Progress:
    """For work that is a part of other work: from `start` on, `size` of the whole."""
    return lambda what, fraction: progress(what, start + size * fraction)


def part_named(progress: Progress, what: str, start: float, size: float) -> Progress:
    """For work whose own steps say nothing to a user: the same part under one name."""
    return lambda _, fraction: progress(what, start + size * fraction)
