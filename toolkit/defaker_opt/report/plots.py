"""The plots of a page, as SVG that stands inside it: text stays text, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from defaker_opt.report.svg import STYLE, Plot, as_svg, new_axes
from defaker_opt.report.values import Curves, DriftReport, Figure, Robustness, Slice
from defaker_opt.report.words import NAMES

REFERENCE, BUILD, LIMIT, QUIET = "#475569", "#ea580c", "#b91c1c", "#cbd5e1"
_MOST_SLICES = 14


def draw_plots(report: DriftReport) -> tuple[Plot, ...]:
    """Every plot that the report has points for, the differences first."""
    with mpl.rc_context({**STYLE}):
        plots = [_forest(report)]
        if report.slices:
            plots.append(_slices(report.slices))
        plots.append(_reliability(report.curves))
        if all(report.curves.roc):
            plots.append(_roc(report.curves))
        if report.curves.area_bins:
            plots.append(_area_bins(report.curves))
        if report.robustness:
            plots.append(_robustness(report.robustness))
        return tuple(plots)


def _forest(report: DriftReport) -> Plot:
    """Drops of all metrics of all suites together, their intervals, limits, and the noise floor."""
    figures = [figure for figure in report.pooled.figures if figure.better != "neither"]
    noise = {figure.metric: figure for figure in report.noise.figures} if report.noise else {}
    canvas, axes = new_axes(8.2, 0.9 + 0.31 * len(figures))
    for row, figure in enumerate(figures):
        if figure.metric in noise:
            # Its interval, of far fewer images, would only hide the others.
            axes.plot([100 * noise[figure.metric].drop], [row], "D", color=QUIET, markersize=9)
        _whisker(axes, row, figure, BUILD)
        if figure.check:
            edge = 100 * figure.check.max_drop
            axes.plot([edge, edge], [row - 0.42, row + 0.42], color=LIMIT, linewidth=2.5)
    axes.axvline(0, color="#111827", linewidth=1)
    axes.set_yticks(range(len(figures)), [NAMES[figure.metric] for figure in figures])
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.set_xlabel("drop against the reference [percentage points]; right of 0 is worse")
    axes.set_title("How much worse the build is, by metric")
    _legend(axes, (("build", BUILD), *((("noise floor", QUIET),) if noise else ()), ("limit", LIMIT)))
    where = "all suites together" if len(report.suites) > 1 else report.suites[0].name
    caption = f"Drops on {where}, {report.pooled.images:,} images, with 95 % intervals; red marks are limits."
    if report.noise:
        caption += f" Grey: the reference against itself, {report.noise.images:,} images."
    return Plot("forest", as_svg(canvas, "forest"), caption)


def _whisker(axes: Axes, row: float, figure: Figure | Slice, color: str) -> None:
    axes.plot([100 * figure.low, 100 * figure.high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
    axes.plot([100 * figure.drop], [row], "o", color=color, markersize=5)


def _legend(axes: Axes, entries: Sequence[tuple[str, str]], **options: Any) -> None:
    handles = [mpl.lines.Line2D([], [], color=color, linewidth=3, label=name) for name, color in entries]
    axes.legend(handles=handles, frameon=False, fontsize=9, **options)


def _slices(slices: Sequence[Slice]) -> Plot:
    shown = slices[:_MOST_SLICES]
    canvas, axes = new_axes(8.2, 0.9 + 0.31 * len(shown))
    for row, each in enumerate(shown):
        _whisker(axes, row, each, LIMIT if each.worse else BUILD)
        edge = 100 * each.limit
        axes.plot([edge, edge], [row - 0.3, row + 0.3], color=LIMIT, linewidth=2)
    axes.axvline(0, color="#111827", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{each.name}, {NAMES[each.metric]} ({each.n:,})" for each in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("drop against the reference [percentage points]; right of 0 is worse")
    axes.set_title("Slices, the most surely worse first")
    more = f" of {len(slices)}" if len(slices) > len(shown) else ""
    caption = f"{len(shown)}{more} slices, most surely worse first; images in brackets; red marks are limits."
    return Plot("slices", as_svg(canvas, "slices"), caption)


def _reliability(curves: Curves) -> Plot:
    canvas, axes = new_axes(4.1, 3.6)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1.5)
    for points, color in zip(curves.reliability, (REFERENCE, BUILD)):
        axes.plot([p for p, _, _ in points], [share for _, share, _ in points], "o-", color=color, markersize=4)
    axes.set_xlabel("mean predicted probability of forged")
    axes.set_ylabel("share that is forged")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Reliability")
    _legend(axes, (("reference", REFERENCE), ("build", BUILD)), loc="upper left")
    caption = "Bins of equal numbers of images; on the grey line a probability means what it says."
    return Plot("reliability", as_svg(canvas, "reliability"), caption)


def _roc(curves: Curves) -> Plot:
    canvas, axes = new_axes(4.1, 3.6)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1.5)
    for points, color, width in zip(curves.roc, (REFERENCE, BUILD), (3, 1.5)):
        axes.plot(*np.array(points).T, color=color, linewidth=width)
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    axes.set_title("ROC")
    _legend(axes, (("reference", REFERENCE), ("build", BUILD)), loc="lower right")
    caption = "Rates over all thresholds; the grey line is guessing."
    return Plot("roc", as_svg(canvas, "roc"), caption)


def _area_bins(curves: Curves) -> Plot:
    canvas, axes = new_axes(4.1, 3.6)
    places = np.arange(len(curves.area_bins))
    for side, color in enumerate((REFERENCE, BUILD)):
        heights = [each.mask_iou[side] for each in curves.area_bins]
        halves = [each.half[side] for each in curves.area_bins]
        axes.bar(places + (side - 0.5) * 0.38, heights, 0.36, yerr=halves, color=color, ecolor="#111827", capsize=2)
    axes.set_xticks(places, [f"{each.name}\nn = {each.n:,}" for each in curves.area_bins])
    axes.set_xlabel("forged share of the image")
    axes.set_ylabel("mean IoU")
    axes.set_ylim(0, None)
    axes.set_title("Masks by size of the forgery")
    _legend(axes, (("reference", REFERENCE), ("build", BUILD)), loc="upper left")
    caption = "Mean IoU of mask and ground truth over forged images; whiskers: 95 % interval of each mean."
    return Plot("area", as_svg(canvas, "area"), caption)


def _robustness(rows: Sequence[Robustness]) -> Plot:
    canvas = Canvas(figsize=(13, 1.1 + 0.27 * len(rows)), layout="constrained")
    canvas.suptitle("Robustness: both builds on perturbed images", fontsize=11, fontweight="bold")
    places = np.arange(len(rows))
    for column, (label, name) in enumerate((("accuracy", "accuracy"), ("AUC", "auc"), ("mean mask IoU", "mask_iou"))):
        axes = canvas.add_subplot(1, 3, column + 1)
        values = np.array([getattr(row, name) for row in rows])  # [perturbations, 2]
        axes.hlines(places, values.min(axis=1), values.max(axis=1), color=QUIET, linewidth=3)
        for side, (color, size) in enumerate(((REFERENCE, 7), (BUILD, 5))):
            axes.plot(values[:, side], places, "o", color=color, markersize=size)
        axes.set_yticks(places, [row.perturbation for row in rows] if column == 0 else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"{label} (0…1)")
        if column == 2:
            _legend(axes, (("reference", REFERENCE), ("build", BUILD)), loc="best")
    caption = (
        "Every perturbation alone, on all suites together; none: the images as they are. Levels: JPEG quality, factor "
        "of both sides, blur in px, noise in grey values of 255, factors of brightness, contrast and saturation."
    )
    return Plot("robustness", as_svg(canvas, "robustness"), caption)
