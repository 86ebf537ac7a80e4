"""search.html: what sizes cost in harm, what was tried, and what each layer became."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes

from defaker_opt.report.page import table, whole_page
from defaker_opt.report.svg import STYLE as PLOT_STYLE
from defaker_opt.report.svg import Plot, as_svg, new_axes
from defaker_opt.runtime.spec import STAGES
from defaker_opt.search import OFFERED, Formats, Ledger, Search, Trial

_MORE_STYLE = ".plots .half{grid-column:span 3}pre{overflow-x:auto;font-size:13px;margin:0}td.right{text-align:right}"
_COLORS = {"ACCEPT": "#15803d", "REJECT": "#b91c1c", "UNDECIDED": "#b45309"}
_LINE, _QUIET = "#2563eb", "#64748b"

# What a plot with a logarithm shows for no harm at all.
_LEAST_HARM = 1e-6


def search_as_html(found: Search, name: str, recipe: str) -> str:
    """The page of a search of that name; recipe: the text of its YAML file."""
    parts = (*_first(found, name), *_plots(found), *_layers(found), *_ending(recipe))
    return whole_page(name, parts, _MORE_STYLE)


def _first(found: Search, name: str) -> Iterator[str]:
    last = found.trials[-1]
    size_mb, latency_ms = last.measured
    yield f'<header class="{last.decision.lower()}"><div class="verdict">{last.decision}</div><div>'
    yield f"<h1>{escape(name)}: {size_mb:.2f} MB, {latency_ms:.1f} ms an image here</h1>"
    yield f"<p>{escape(last.summary)}</p></div></header><main>"
    if not found.within_budget:
        yield f'<p class="warning">Asked for was {escape(str(found.budget))}. What keeps that lost too much.</p>'
    yield "<section><h2>What was tried</h2>"
    head = ("trial", "decision", "harm", "MB predicted", "MB", "ms predicted", "ms", "")
    yield table(head, [_trial_row(index, trial) for index, trial in enumerate(found.trials, 1)]) + "</section>"


def _trial_row(index: int, trial: Trial) -> tuple[str, ...]:
    tag = f'<span class="tag {trial.decision.lower()}">{trial.decision}</span>'
    predicted, measured = trial.predicted, trial.measured
    figures = (f"{predicted[0]:.2f}", f"{measured[0]:.2f}", f"{predicted[1]:.1f}", f"{measured[1]:.1f}")
    return (str(index), tag, f"{trial.harm:.2g}", *figures, f"<small>{escape(trial.summary)}</small>")


def _plots(found: Search) -> Iterator[str]:
    with mpl.rc_context({**PLOT_STYLE}):
        plots = (_harm_plot(found), _latency_plot(found))
    yield '<section class="plots">'
    for plot in plots:
        yield f'<figure class="half card">{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>'
    yield "</section>"


def _harm_plot(found: Search) -> Plot:
    canvas, axes = new_axes(6.2, 3.9)
    _draw(axes, found, [max(found.ledger.harm(choice), _LEAST_HARM) for choice in found.front])
    for index, (scheme, choice) in enumerate(found.ledger.uniform().items()):
        place = (found.ledger.size_mb(choice), max(found.ledger.harm(choice), _LEAST_HARM))
        axes.plot(*([value] for value in place), "x", color=_QUIET)
        # Formats of equal size lie nearly on each other, so words stand above and below in turn.
        offset = (5, 6 if index % 2 else -11)
        axes.annotate(scheme, place, offset, textcoords="offset points", fontsize=8, color=_QUIET)
    for trial in found.trials:
        axes.plot([trial.predicted[0]], [max(trial.harm, _LEAST_HARM)], "o", color=_COLORS[trial.decision])
    axes.set_yscale("log")
    axes.set_ylabel("harm, predicted (1 = the worst build)")
    axes.set_title("What a size costs")
    caption = "Line: the least harm at each size. Dots: built, green if accepted. Crosses: one format for all layers."
    return Plot("harm", as_svg(canvas, "harm"), caption)


def _latency_plot(found: Search) -> Plot:
    canvas, axes = new_axes(6.2, 3.9)
    _draw(axes, found, [found.ledger.latency_ms(choice) for choice in found.front])
    for trial in found.trials:
        axes.plot([trial.measured[0]], [trial.measured[1]], "o", color=_COLORS[trial.decision])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("milliseconds an image")
    axes.set_title("What it takes here")
    caption = "Line: predicted from products that were timed one by one. Dots: what was built, measured, mask included."
    return Plot("latency", as_svg(canvas, "latency"), caption)


def _draw(axes: Axes, found: Search, values: Sequence[float]) -> None:
    axes.plot([found.ledger.size_mb(choice) for choice in found.front], values, ".-", color=_LINE, linewidth=1.2)
    axes.set_xlabel("megabytes")


def _layers(found: Search) -> Iterator[str]:
    choice = found.trials[-1].choice
    schemes = [scheme for scheme in OFFERED if scheme in choice.values()]
    rows = []
    for stage in STAGES:
        own: Formats = {name: scheme for name, scheme in choice.items() if name.partition(".")[0] == stage}
        counts = Counter(own.values())
        rows.append((stage, *(str(counts[scheme] or "") for scheme in schemes), f"{_megabytes(found.ledger, own):.2f}"))
    yield "<section><h2>Linear layers of each stage, by format</h2>"
    yield table(("stage", *schemes, "MB"), rows) + "</section>"


def _megabytes(ledger: Ledger, choice: Formats) -> float:
    return sum(ledger.offers[name][scheme].bytes for name, scheme in choice.items()) / 1e6


def _ending(recipe: str) -> Iterator[str]:
    yield f"<section><h2>The recipe</h2><div class='card'><pre>{escape(recipe)}</pre></div></section></main>"
