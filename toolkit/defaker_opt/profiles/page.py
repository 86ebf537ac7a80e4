"""profile.html: one page that needs nothing but itself, in the manner of the drift report."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from defaker_opt.profiles.profile import Profile
from defaker_opt.profiles.svg import categories_plot, roofline_plot, samples_plot, waterfall
from defaker_opt.profiles.table import difference_words, fact_lines, ratio_words
from defaker_opt.report.page import table, whole_page
from defaker_opt.runtime.spec import STAGES

_MORE_STYLE = "header.profile{background:#1e3a8a}.plots .half{grid-column:span 3}td.right{text-align:right}"
_MOST_OPERATORS = 40


def profile_as_html(profile: Profile) -> str:
    """The page; the milliseconds and the waterfall come first."""
    title = f"{profile.measured.build.name} on {profile.machine.fingerprint}"
    parts = (*_first(profile), *_plots(profile), *_comparison(profile), *_roofline(profile), *_operators(profile))
    return whole_page(title, (*parts, *_ending(profile)), _MORE_STYLE)


def _first(profile: Profile) -> Iterator[str]:
    measured, build = profile.measured, profile.measured.build
    yield f'<header class="profile"><div class="verdict">{measured.total.median:.0f} ms</div><div>'
    yield f"<h1>{escape(build.name)}</h1><p>an image on {escape(profile.machine.fingerprint)}: median of "
    yield f"{measured.total.n} samples, 90 % below {measured.total.p90:.0f} ms, 99 % below {measured.total.p99:.0f}. "
    yield f"{escape(build.source)}, recipe {escape(build.recipe)}, {build.bytes / 1e6:.1f} MB.</p></div></header><main>"
    if not build.trained:
        yield '<p class="warning">The weights are drawn at random: times are right, verdicts mean nothing.</p>'
    yield '<section class="first"><div class="card"><h2>One image: which stage when</h2>'
    yield waterfall(measured.timeline, [stage for stage in STAGES if stage in build.stage_bytes])
    yield f"<p>The image with the median latency. {measured.covered:.1%} of an image's time is inside some stage.</p>"
    yield '</div><div class="card"><h2>Stages</h2>'
    head = ("stage", "median ms", "p90", "p99", "share")
    rows = [
        (name, f"{q.median:.2f}", f"{q.p90:.2f}", f"{q.p99:.2f}", f"{q.median / measured.total.median:.0%}")
        for name, q in measured.stages.items()
    ]
    yield table(head, rows) + "</div></section><section><div class='card'><h2>Cost</h2><ul>"
    yield "".join(f"<li>{escape(line)}</li>" for line in fact_lines(profile)) + "</ul></div></section>"


def _plots(profile: Profile) -> Iterator[str]:
    yield '<section class="plots">'
    series = {profile.measured.build.name: [s.latency_ms["total"] for s in profile.measured.samples]}
    if profile.other:
        name = profile.other.build.name
        name = f"{name} (compared)" if name in series else name
        series[name] = [s.latency_ms["total"] for s in profile.other.samples]
    yield _figure(samples_plot(series), "Milliseconds of every image that was judged; nothing is left out.")
    if profile.peaks and profile.roofline:
        words = "Stages under the roofs measured in this run: products in each format, and copying memory."
        yield _figure(roofline_plot(profile.roofline, profile.peaks), words)
    if profile.operators:
        words = "What operators are for. Quantizing and moving memory do no arithmetic that the model asks for."
        yield _figure(categories_plot(profile.operators), words)
    yield "</section>"


def _figure(svg: str, caption: str) -> str:
    return f'<figure class="card half">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _comparison(profile: Profile) -> Iterator[str]:
    if not profile.comparison or not profile.other:
        return
    found = profile.comparison
    yield f"<section><h2>{escape(profile.other.build.name)} against {escape(profile.measured.build.name)}</h2>"
    words = f"It is {found.attributed} that surely changed most." if found.attributed else "No stage surely changed."
    yield f"<p>Both builds judged the same images in turns. {escape(words)}</p>"
    head = ("stage", "ms", "compared ms", "ratio, 95 % interval", "difference [ms], interval", "")
    rows = [
        (
            each.stage,
            f"{each.first_ms:.2f}",
            f"{each.second_ms:.2f}",
            ratio_words(each.ratio),
            difference_words(each),
            '<span class="tag undecided">changed</span>' if each.sure else "",
        )
        for each in (found.total, *found.stages)
    ]
    yield table(head, rows) + "</section>"


def _roofline(profile: Profile) -> Iterator[str]:
    if not profile.roofline:
        return
    yield "<section><h2>Distance to the limit</h2>"
    on = [f"floor on {profile.target} [ms]"] if profile.target else []
    head = (
        "stage",
        "GFLOP",
        "of it attention",
        "weights [MB]",
        "measured [ms]",
        "floor here [ms]",
        "achieved",
        "bound by",
        *on,
    )
    rows = []
    for row in profile.roofline:
        floor = f"{row.floor.ms:.2f}" if row.floor else "unknown"
        achieved = f"{row.achieved:.0%}" if row.achieved is not None else "unknown"
        weights = sum(row.work.weight_bytes.values()) / 1e6
        cells = (row.stage, f"{row.work.total / 1e9:.2f}", f"{row.work.attention / 1e9:.2f}", f"{weights:.1f}")
        target = [f"{row.target.ms:.3f}"] if row.target else []
        rows.append((*cells, f"{row.measured_ms:.2f}", floor, achieved, row.bound, *target))
    yield table(head, rows)
    yield "<p><small>Operations and bytes are counted from the graphs with the sizes of the first picture; a floor is "
    yield "max(operations / rate, bytes / bandwidth) with the rates of this machine in this run.</small></p></section>"


def _operators(profile: Profile) -> Iterator[str]:
    if not profile.operators:
        return
    yield "<section><h2>Costliest operators</h2>"
    rows = sorted((row for stage in profile.operators for row in stage.operators), key=lambda row: -row.milliseconds)
    cells = [
        (escape(row.module), row.kind, row.category, str(row.calls), f"{row.milliseconds:.3f}")
        for row in rows[:_MOST_OPERATORS]
    ]
    yield table(("module of the source", "operator", "for", "calls", "ms an image"), cells)
    between = ", ".join(
        f"{stage.stage} {stage.between_ms:.2f} of {stage.stage_ms:.2f} ms, less {1e3 * stage.tracing_ms:.1f} µs a call"
        for stage in profile.operators
    )
    yield f"<p><small>In no operator, and what was taken off for the tracing: {escape(between)}.</small></p></section>"


def _ending(profile: Profile) -> Iterator[str]:
    machine = profile.machine
    yield "<section><h2>Machine</h2><ul>"
    lines = [
        f"{machine.processor}, {machine.cores} cores, {machine.architecture}, {', '.join(machine.instructions)}",
        f"{machine.memory_bytes / 1e9:.1f} GB of memory, {machine.free_memory_bytes / 1e9:.1f} free at the start",
        f"{machine.system}, Python {machine.python}",
        ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        f"measured at {profile.measured_at} with defaker-opt {profile.version}; build {profile.measured.build.digest}",
        *(f"missing: {line}" for line in profile.missing),
    ]
    yield "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul></section></main>"
