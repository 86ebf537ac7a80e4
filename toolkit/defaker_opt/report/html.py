"""report.html: one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from defaker_opt.report.gallery import Picture
from defaker_opt.report.markdown import suite_words
from defaker_opt.report.page import table, whole_page
from defaker_opt.report.plots import draw_plots
from defaker_opt.report.svg import Plot
from defaker_opt.report.values import DriftReport, Figure, Slice, SuiteReport
from defaker_opt.report.words import NAMES, count_words, latency_words, limited, needed_words, points

_WIDTHS = {"forest": " wide", "slices": " wide", "robustness": " full"}


def report_as_html(report: DriftReport, pictures: Sequence[Picture]) -> str:
    """The page; the verdict, limits and the worst slice come first."""
    title = f"{report.decision}: {report.build.name} against {report.reference.name}"
    parts = (*_first_screen(report), *_plots(report), *_gallery(pictures), *_details(report), *_ending(report))
    return whole_page(title, parts)


def _first_screen(report: DriftReport) -> Iterator[str]:
    kind = report.decision.lower()
    yield f'<header class="{kind}"><div class="verdict">{report.decision}</div><div><h1>{escape(report.build.name)} '
    yield f"against {escape(report.reference.name)}</h1><p>{escape(report.summary)}</p></div></header><main>"
    for warning in report.warnings:
        yield f'<p class="warning">{escape(warning)}</p>'
    yield '<section class="first"><div class="card"><h2>Limits</h2>'
    yield table(
        ("suite", "metric", "drop [pp]", "95 % interval", "limit", "answer"),
        [_limit_cells(suite, figure) for suite, figure in limited(report.suites)],
    )
    for suite, figure in limited(report.suites):
        if figure.check and figure.check.decision == "UNDECIDED":
            yield f"<p>{escape(suite.name)}, {NAMES[figure.metric]}: {escape(needed_words(figure))}.</p>"
    if report.latency:
        yield f"<p>{escape(latency_words(report.latency))}.</p>"
    yield f'</div><div class="card"><h2>Worst slice</h2>{_worst(report.worst)}'
    yield f"<h2>Flips</h2><p>{_flip_words(report)}</p></div></section>"


def _limit_cells(suite: SuiteReport, figure: Figure) -> tuple[str, ...]:
    check = figure.check
    assert check is not None
    return (
        escape(suite.name),
        f"{NAMES[figure.metric]}<br><small>{figure.reference:.4f} → {figure.build:.4f}, n = {figure.n:,}</small>",
        points(figure.drop),
        f"{points(figure.low)} … {points(figure.high)}",
        f"{points(check.max_drop)}<br><small>at {check.confidence:.0%}</small>",
        f'<span class="tag {check.decision.lower()}">{check.decision}</span>',
    )


def _worst(worst: Slice | None) -> str:
    if worst is None:
        return "<p>No slice has enough images.</p>"
    if not worst.flips and worst.drop == 0:
        return '<p class="big">none</p><p>No slice lost anything.</p>'
    tag = '<span class="tag reject">surely worse</span>' if worst.worse else '<span class="tag quiet">not sure</span>'
    return (
        f'<p class="big">{escape(worst.name)} {tag}</p><p>{NAMES[worst.metric]} {points(worst.reference)} → '
        f"{points(worst.build)} %: drop <b>{points(worst.drop)} pp</b> ({points(worst.low)} … {points(worst.high)}), "
        f"n = {worst.n:,}, {count_words(worst.flips, 'flip')}, p = {worst.p:.2g}</p>"
    )


def _flip_words(report: DriftReport) -> str:
    flips = report.pooled.flips
    words = (
        f"<b>{flips.flips}</b> of {flips.n:,} verdicts ({points(flips.rate)} %, at most {points(flips.upper)} % at "
        f"95 %): {flips.losses} lost, {flips.gains} gained."
    )
    if report.noise:
        noise = report.noise.flips
        words += f" Noise floor: {noise.flips} of {noise.n:,}."
    return words


def _plots(report: DriftReport) -> Iterator[str]:
    yield '<section class="plots">' + "".join(map(_plot, draw_plots(report))) + "</section>"


def _details(report: DriftReport) -> Iterator[str]:
    if report.sequential:
        done = report.sequential
        yield f"<section><h2>Looks</h2><p>{done.judged:,} of {done.planned:,} images were judged; {done.declared} "
        yield "looks were declared for each suite.</p>"
        rows = [(escape(o.suite), f"{o.images:,}", o.decision, escape(o.detail)) for o in done.looks]
        yield table(("suite", "images", "answer", "detail"), rows) + "</section>"
    if report.refit:
        fit = report.refit
        cells = (f"{fit.threshold:.4f}", f"{fit.shipped_threshold:.4f}", points(fit.rate), points(fit.shipped_rate))
        head = ("threshold", "shipped", "FPR [%]", "FPR as shipped [%]", "FPR of the reference [%]", "temperature")
        row = (*cells, points(fit.reference_rate), f"{fit.temperature:.3f}")
        yield f"<section><h2>Re-fit on {fit.images:,} calibration images of {escape(fit.suite)}</h2>"
        yield table(head, [row]) + (f"<p>{escape(fit.temperature_note)}</p>" if fit.temperature_note else "")
        yield "</section>"
    for suite in report.suites if len(report.suites) == 1 else (report.pooled, *report.suites):
        yield f"<section><h2>{escape(suite.name)}</h2><p>{escape(suite_words(suite))}</p>"
        yield _figures(suite.figures)
        yield from (f"<p>No figure for {escape(line)}.</p>" for line in suite.missing)
        yield "</section>"
    yield "<section><h2>Slices</h2>" + _slice_table(report.slices) + "</section>"
    if report.noise:
        one, other = report.noise.threads
        yield f"<section><h2>Noise floor</h2><p>The reference with {one} against {other} threads, "
        yield f"{report.noise.images:,} images.</p>" + _figures(report.noise.figures) + "</section>"


def _plot(plot: Plot) -> str:
    wide = _WIDTHS.get(plot.name, "")
    return f'<figure class="card{wide}">{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>'


def _figures(figures: Sequence[Figure]) -> str:
    head = ("metric", "n", "clusters", "reference", "build", "drop [pp]", "95 % interval [pp]", "method")
    return table(head, [_figure_cells(each) for each in figures])


def _figure_cells(each: Figure) -> tuple[str, ...]:
    arrow = {"higher": "↑", "lower": "↓", "neither": ""}[each.better]
    return (
        f"{NAMES[each.metric]} {arrow}",
        f"{each.n:,}",
        f"{each.clusters:,}",
        f"{each.reference:.4f}",
        f"{each.build:.4f}",
        points(each.drop),
        f"{points(each.low)} … {points(each.high)}",
        f"<small>{escape(each.method)}</small>",
    )


def _slice_table(slices: Sequence[Slice]) -> str:
    head = ("slice", "metric", "n", "flips", "reference", "build", "drop [pp]", "95 % interval [pp]", "p (Holm)")
    rows = [
        (
            escape(each.name),
            NAMES[each.metric],
            f"{each.n:,}",
            f"{each.flips:,}",
            f"{each.reference:.4f}",
            f"{each.build:.4f}",
            points(each.drop),
            f"{points(each.low)} … {points(each.high)}",
            f"<b>{each.p:.2g}</b>" if each.worse else f"{each.p:.2g}",
        )
        for each in slices
    ]
    return table(head, rows)


def _gallery(pictures: Sequence[Picture]) -> Iterator[str]:
    yield "<section><h2>Images that flipped, or whose mask moved most</h2>"
    if not pictures:
        yield "<p>None: every verdict and every mask is the reference's.</p>"
    yield '<div class="gallery">'
    for picture in pictures:
        flip = ' <span class="tag reject">flipped</span>' if picture.flipped else ""
        truth = "forged" if picture.label else "authentic"
        before, after = picture.probabilities
        yield f'<article class="card"><p><b>{escape(picture.name)}</b>{flip}<br><small>{truth}; probability of forged '
        yield f"{before:.3f} → {after:.3f}; masks agree {picture.agreement:.2f}<br>{escape(picture.slices)}</small></p>"
        yield '<div class="four">' + "".join(map(_thumbnail, _TITLES, picture.images)) + "</div></article>"
    yield "</div></section>"


_TITLES = ("image", "ground truth", "reference", "build")


def _thumbnail(title: str, uri: str) -> str:
    image = f'<img src="{uri}" alt="{title}">' if uri else '<div class="unknown">unknown</div>'
    return f"<figure>{image}<figcaption>{title}</figcaption></figure>"


def _ending(report: DriftReport) -> Iterator[str]:
    yield "<section><h2>How it was computed</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in report.methods)
    yield "</ul></section><section><h2>Left out and passed over</h2><ul>"
    yield "".join(f"<li>{escape(line)}</li>" for line in (*report.problems, *report.passed_over) or ("nothing",))
    yield "</ul></section><section><h2>Builds</h2>"
    head = ("", "recipe", "source", "size [MB]", "threshold", "temperature", "digest")
    rows = [
        (
            side,
            escape(facts.name),
            escape(facts.source),
            f"{facts.bytes / 1e6:.1f}",
            f"{facts.threshold:.4f}",
            f"{facts.temperature:.3f}",
            f"<small>{facts.digest}</small>",
        )
        for side, facts in (("reference", report.reference), ("build", report.build))
    ]
    yield table(head, rows) + "</section></main>"
