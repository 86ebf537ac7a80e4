"""Plots as SVG elements, drawn by hand: devices that are profiled have no plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from defaker_opt.profiles.operators import StageOperators
from defaker_opt.profiles.peaks import Peaks
from defaker_opt.profiles.roofline import StageRoofline

COLORS = {
    "preprocess": "#94a3b8",
    "load": "#cbd5e1",
    "vision_encoder": "#2563eb",
    "language": "#7c3aed",
    "vocabulary_head": "#a855f7",
    "mask_encoder": "#ea580c",
    "mask_decoder": "#f59e0b",
    "mask_resize": "#64748b",
}
CATEGORIES = {
    "products": "#2563eb",
    "quantize and dequantize": "#ea580c",
    "memory movement": "#f59e0b",
    "other": "#94a3b8",
}
_TEXT, _GRID = "#111827", "#e5e7eb"
_WIDTH = 620


def _svg(name: str, height: float, parts: Iterator[str]) -> str:
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {_WIDTH} {height:g}" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", color: str = _TEXT, size: float = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}" font-size="{size:g}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, color: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{color}">{inner}</rect>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1, dash: str = "") -> str:
    style = f' stroke-dasharray="{dash}"' if dash else ""
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{color}" stroke-width="{width:g}"{style}/>'


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to `largest`, four to eight of them."""
    step = 10 ** math.floor(math.log10(largest))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if largest / (step * part) <= 8)
    return [step * index for index in range(int(largest / step) + 1)]


def _axis(left: float, right: float, bottom: float, top: float, largest: float, unit: str) -> Iterator[str]:
    for tick in _ticks(largest):
        x = left + (right - left) * tick / largest
        yield _line(x, top, x, bottom, _GRID)
        yield _text(x, bottom + 15, f"{tick:g}", "middle", "#475569", 11)
    yield _text(right, bottom + 30, unit, "end", "#475569", 11)


def waterfall(timeline: Sequence[tuple[str, float, float]], stages: Sequence[str]) -> str:
    """Which stage ran when within one image; a row a stage, with those that were skipped."""
    rows = [name for name in dict.fromkeys([*(name for name, _, _ in timeline), *stages]) if name != "load"]
    end = max(stop for _, _, stop in timeline)
    left, right, step = 130.0, _WIDTH - 60.0, 26.0
    bottom = 6 + step * len(rows)

    def draw() -> Iterator[str]:
        yield from _axis(left, right, bottom, 4, end, "milliseconds since the image came in")
        for index, name in enumerate(rows):
            y = 6 + step * index
            spans = [(start, stop) for stage, start, stop in timeline if stage == name]
            yield _text(left - 8, y + 15, name, "end")
            for start, stop in spans:
                x = left + (right - left) * start / end
                title = f"{name}: {start:.2f} to {stop:.2f} ms"
                yield _box(x, y + 2, (right - left) * (stop - start) / end, step - 8, _color(name), title)
            total = sum(stop - start for start, stop in spans)
            words = f"{total:.1f}" if spans else "skipped"
            x = left + (right - left) * (max(stop for _, stop in spans) / end if spans else 0)
            yield _text(x + 5, y + 15, words, color="#475569", size=11)

    return _svg("waterfall", bottom + 36, draw())


def _color(name: str) -> str:
    return COLORS.get(name, "#0f766e")


def samples_plot(series: Mapping[str, Sequence[float]]) -> str:
    """Every sample in the order it was taken, one colour a build."""
    largest = max(max(values) for values in series.values()) * 1.05
    left, right, top, bottom = 52.0, _WIDTH - 12.0, 18.0, 190.0
    colors = ("#2563eb", "#ea580c")

    def draw() -> Iterator[str]:
        for tick in _ticks(largest):
            y = bottom - (bottom - top) * tick / largest
            yield _line(left, y, right, y, _GRID)
            yield _text(left - 6, y + 4, f"{tick:g}", "end", "#475569", 11)
        for index, (name, values) in enumerate(series.items()):
            for place, value in enumerate(values):
                x = left + (right - left) * (place + 0.5) / len(values)
                y = bottom - (bottom - top) * value / largest
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colors[index]}" fill-opacity="0.7"/>'
            middle = bottom - (bottom - top) * sorted(values)[len(values) // 2] / largest
            yield _line(left, middle, right, middle, colors[index], 1.4, "5 4")
            yield _text(left + 4 + 220 * index, 12, f"● {name}", color=colors[index])
        yield _text(
            right, bottom + 16, "samples in the order they were taken; dashed: median [ms]", "end", "#475569", 11
        )

    return _svg("samples", bottom + 24, draw())


def categories_plot(stages: Sequence[StageOperators]) -> str:
    """What each stage's operators are for, as parts of its time."""
    left, right, step = 130.0, _WIDTH - 70.0, 28.0
    largest = max(sum(stage.categories.values()) for stage in stages)
    bottom = 26 + step * len(stages)

    def draw() -> Iterator[str]:
        x = left
        for name, color in CATEGORIES.items():
            yield _box(x, 4, 10, 10, color)
            yield _text(x + 14, 13, name, size=11)
            x += 34 + 6.2 * len(name)
        yield from _axis(left, right, bottom, 22, largest, "milliseconds an image inside operators")
        for index, stage in enumerate(stages):
            y, x = 24 + step * index, left
            yield _text(left - 8, y + 17, stage.stage, "end")
            for name, color in CATEGORIES.items():
                width = (right - left) * stage.categories.get(name, 0.0) / largest
                if width:
                    yield _box(x, y + 3, width, step - 8, color, f"{name}: {stage.categories[name]:.2f} ms")
                x += width
            yield _text(x + 5, y + 17, f"{sum(stage.categories.values()):.1f}", color="#475569", size=11)

    return _svg("categories", bottom + 36, draw())


def roofline_plot(rows: Sequence[StageRoofline], peaks: Peaks) -> str:
    """Operations a second over operations a byte, with the roofs that were measured; both axes are logarithmic."""
    points = [
        (row.stage, row.work.total / row.work.least_bytes, row.work.total / row.measured_ms * 1e3)
        for row in rows
        if row.work.total and row.measured_ms
    ]
    xs = [x for _, x, _ in points] + [rate / peaks.bandwidth for rate in peaks.rates.values()]
    ys = [y for _, _, y in points] + list(peaks.rates.values())
    low_x, high_x = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, right, top, bottom = 56.0, _WIDTH - 20.0, 10.0, 230.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return left + (right - left) * across, bottom - (bottom - top) * up

    def draw() -> Iterator[str]:
        for power in range(low_x, high_x + 1):
            x, _ = place(10.0**power, 10.0**low_y)
            yield _line(x, top, x, bottom, _GRID)
            yield _text(x, bottom + 15, f"{10.0**power:g}", "middle", "#475569", 11)
        for power in range(low_y, high_y + 1):
            _, y = place(10.0**low_x, 10.0**power)
            yield _line(left, y, right, y, _GRID)
            yield _text(left - 6, y + 4, f"{10.0 ** (power - 9):g}", "end", "#475569", 11)
        for kind, rate in peaks.rates.items():
            knee = max(rate / peaks.bandwidth, 10.0**low_x)
            yield _line(*place(knee, rate), *place(10.0**high_x, rate), "#111827", 1.4)
            yield _text(right, place(knee, rate)[1] - 4, f"{kind} {rate / 1e9:.0f} GFLOP/s", "end", size=11)
            foot = max(10.0**low_x, 10.0**low_y / peaks.bandwidth)
            yield _line(*place(foot, foot * peaks.bandwidth), *place(knee, knee * peaks.bandwidth), "#111827", 1.4)
        for index, (name, x, y) in enumerate(points):
            cx, cy = place(x, y)
            yield f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{_color(name)}"/>'
            yield _text(cx - 8, cy + (13 if index % 2 else -5), name, "end", _color(name))
        yield _text(right, bottom + 30, "operations a byte that must move; upward: GFLOP/s", "end", "#475569", 11)

    return _svg("roofline", bottom + 36, draw())
