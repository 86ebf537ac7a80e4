"""Plots as SVG that stands inside a page: text stays text, and nothing is fetched."""

from __future__ import annotations

import io
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

# matplotlib's stubs want each key by name.
STYLE: Any = MappingProxyType(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "axes.axisbelow": True,
        "svg.fonttype": "none",
    }
)


@dataclass(frozen=True)
class Plot:
    """svg: an <svg> element. caption: what is seen, with units."""

    name: str
    svg: str
    caption: str


def new_axes(width: float, height: float) -> tuple[Canvas, Axes]:
    """An empty plot of that size in inches."""
    canvas = Canvas(figsize=(width, height), layout="constrained")
    return canvas, canvas.add_subplot()


def as_svg(canvas: Canvas, name: str) -> str:
    """Only the <svg> element; ids are unlike those of the page's other plots."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": f"defaker-{name}"}):
        canvas.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
