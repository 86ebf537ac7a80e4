"""Progress bars on standard error, so that standard output stays for results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Told what is being done and how much of everything is behind us, 0…1.
Report = Callable[[str, float], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar with time left; where standard error is no terminal, one line for each new thing that is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def _plain_lines(console: Console) -> Report:
    last = ""

    def report(what: str, fraction: float) -> None:
        nonlocal last
        step = what.split(" ")[0] if what.startswith("quantize ") else what
        if step != last:
            console.print(f"{fraction:4.0%} {step}", highlight=False, soft_wrap=True)
            last = step

    return report
