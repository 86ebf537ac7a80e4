"""A profile on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from defaker_opt.profiles.compare import Change, Diff
from defaker_opt.profiles.profile import Profile
from defaker_opt.profiles.ratios import Ratio

_MOST_OPERATORS = 12


def profile_tables(profile: Profile) -> Iterator[Table | str]:
    """Everything for people, the milliseconds first."""
    yield f"{profile.measured.build.name} on {profile.machine.fingerprint}"
    yield _stages(profile)
    yield from fact_lines(profile)
    if profile.comparison:
        yield _comparison(profile)
        blamed = profile.comparison.attributed
        yield f"changed most: {blamed}" if blamed else "no stage surely changed"
    if profile.operators:
        yield _operators(profile)
    yield from (f"missing: {line}" for line in profile.missing)


def _stages(profile: Profile) -> Table:
    measured = profile.measured
    title = f"{measured.total.n} samples, {profile.settings.images} pictures, gate {profile.settings.gate:g}"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "median ms", "p90", "p99", "share", "MB", "GFLOP", "floor ms", "of the limit", "bound by"):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    if profile.target:
        table.add_column(f"floor on {profile.target}", justify="right")
    rooflines = {row.stage: row for row in profile.roofline}
    for name, found in measured.stages.items():
        cells = [name, f"{found.median:.2f}", f"{found.p90:.2f}", f"{found.p99:.2f}"]
        cells.append(f"{found.median / measured.total.median:.1%}")
        size = measured.build.stage_bytes.get(name)
        cells.append(f"{size / 1e6:.1f}" if size else "")
        row = rooflines.get(name)
        if row and row.floor:
            cells += [f"{row.work.total / 1e9:.2f}", f"{row.floor.ms:.2f}", f"{row.achieved or 0:.0%}", row.bound]
        else:
            cells += [""] * 4
        if profile.target:
            cells.append(f"{row.target.ms:.3f} ms" if row and row.target else "")
        table.add_row(*cells)
    total = measured.total
    table.add_row(
        "total", f"{total.median:.2f}", f"{total.p90:.2f}", f"{total.p99:.2f}", f"{measured.covered:.1%} in stages"
    )
    return table


def fact_lines(profile: Profile) -> Iterator[str]:
    """Start, memory, throughput, energy and the machine's rates, a sentence each."""
    fresh = profile.fresh
    yield (
        f"new process: {fresh.to_first_verdict_ms:.0f} ms to the first verdict (code {fresh.import_ms:.0f}, verifying "
        f"{fresh.open_ms:.0f}, opening stages {fresh.load_ms:.0f}); first image {fresh.first_image_ms:.0f}, second "
        f"{fresh.second_image_ms:.0f}, later {profile.measured.total.median:.0f} ms"
    )
    yield (
        f"memory: {fresh.peak_memory_bytes / 1e6:.0f} MB at most, {fresh.base_memory_bytes / 1e6:.0f} of it before the "
        f"build; on disk {profile.measured.build.bytes / 1e6:.1f} MB"
    )
    for each in profile.throughput:
        yield (
            f"throughput, {each.concurrency} at once on {each.threads} threads each: "
            f"{each.images_per_second:.2f} images/s"
        )
    energy = profile.energy
    if energy.measured:
        yield (
            f"energy: {energy.joules_per_image:.2f} J an image at {energy.watts:.1f} W "
            f"(idle {energy.idle_watts:.1f}); {energy.meter}"
        )
    else:
        yield f"energy: {energy.meter}"
    if profile.peaks:
        rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in profile.peaks.rates.items())
        yield f"this machine now: {rates} GFLOP/s, copying {profile.peaks.bandwidth / 1e9:.1f} GB/s"


def ratio_words(ratio: Ratio) -> str:
    """Value and interval."""
    if not math.isfinite(ratio.high):
        return f"{ratio.value:.3f} (too few samples)"
    return f"{ratio.value:.3f} ({ratio.low:.3f} … {ratio.high:.3f})"


def difference_words(change: Change) -> str:
    """Milliseconds and their interval."""
    if not math.isfinite(change.high_ms):
        return f"{change.difference_ms:+.2f} (too few samples)"
    return f"{change.difference_ms:+.2f} ({change.low_ms:+.2f} … {change.high_ms:+.2f})"


def _comparison(profile: Profile) -> Table:
    assert profile.comparison and profile.other
    table = Table(
        title=f"{profile.other.build.name} against {profile.measured.build.name}, in turns", title_justify="left"
    )
    for column in ("stage", "ms", "other ms", "ratio (95 %)", "difference ms", "sure"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for each in (profile.comparison.total, *profile.comparison.stages):
        cells = (f"{each.first_ms:.2f}", f"{each.second_ms:.2f}", ratio_words(each.ratio), difference_words(each))
        table.add_row(each.stage, *cells, "yes" if each.sure else "")
    return table


def _operators(profile: Profile) -> Table:
    table = Table(title="costliest operators, milliseconds an image", title_justify="left")
    for column in ("module", "operator", "for", "calls", "ms"):
        table.add_column(column, justify="right" if column in ("calls", "ms") else "left")
    rows = [row for stage in profile.operators for row in stage.operators]
    for row in sorted(rows, key=lambda row: -row.milliseconds)[:_MOST_OPERATORS]:
        table.add_row(row.module, row.kind, row.category, str(row.calls), f"{row.milliseconds:.2f}")
    table.add_section()
    for stage in profile.operators:
        shares = {**stage.categories, "between operators": stage.between_ms}
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(shares.items(), key=lambda each: -each[1]))
        table.add_row(stage.stage, "", parts, "", f"{stage.stage_ms:.2f}")
    return table


def diff_table(diff: Diff) -> Table:
    """Two kept results side by side."""
    table = Table(title="second against first", title_justify="left")
    for column in ("stage", "first ms", "second ms", "ratio (95 %)", ""):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in diff.rows:
        words = "slower" if row.regressed else ""
        table.add_row(row.stage, f"{row.first_ms:.2f}", f"{row.second_ms:.2f}", ratio_words(row.ratio), words)
    return table
