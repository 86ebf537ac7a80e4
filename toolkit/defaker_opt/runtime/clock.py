"""Milliseconds by name, and when each span of them began and ended."""

from __future__ import annotations

import time

# Name, begin and end in milliseconds since the picture's work began.
Span = tuple[str, float, float]


class Clock:
    """Adds up milliseconds by name: `with clock("stage"): …`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.latency_ms: dict[str, float] = {}
        # Name, begin and end by the same counter as `started`.
        self.spans: list[Span] = []

    def __call__(self, name: str) -> _Timer:
        """Time what is done inside the `with`, and add it to what that name has."""
        return _Timer(self, name)

    def add(self, other: Clock) -> None:
        """Add up what another clock measured, which may have run at the same time."""
        for name, value in other.latency_ms.items():
            self.latency_ms[name] = self.latency_ms.get(name, 0.0) + value
        self.spans.extend(other.spans)

    def timeline(self) -> tuple[Span, ...]:
        """Every span in the order of their beginnings, those of other clocks that were added too."""
        begun = sorted(self.spans, key=lambda span: span[1])
        return tuple((name, (begin - self.started) * 1e3, (end - self.started) * 1e3) for name, begin, end in begun)

    def finish(self) -> dict[str, float]:
        """Everything so far, and "total" since the clock was made."""
        total = (time.perf_counter() - self.started) * 1e3
        return {**{name: round(value, 3) for name, value in self.latency_ms.items()}, "total": round(total, 3)}


class _Timer:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        ended = time.perf_counter()
        elapsed = (ended - self.started) * 1e3
        self.clock.latency_ms[self.name] = self.clock.latency_ms.get(self.name, 0.0) + elapsed
        self.clock.spans.append((self.name, self.started, ended))
