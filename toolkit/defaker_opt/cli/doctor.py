"""`defaker-opt doctor`: what this machine has and can do."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from defaker_opt.doctor import Diagnosis, Finding
    from defaker_opt.machine import Machine

_MARKS = {"yes": "[green]✓[/]", "no": "[dim]✗[/]", "planned": "[yellow]~[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what this machine has, which targets and recipes can run here, and what to install for the rest."""
    from defaker_opt.doctor import diagnose
    from defaker_opt.machine import read_machine

    found = diagnose(read_machine())
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    _print(found)


def _print(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(found.machine):
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(f"[bold]defaker-opt {found.version}[/] on Python {found.machine.python}", highlight=False)
    console.print(facts, highlight=False)
    for title, findings in (
        ("commands", found.verbs),
        ("recipes made here", found.recipes),
        ("targets whose builds run here", found.targets),
    ):
        console.print(_table(title, findings), highlight=False)


def _facts(machine: Machine) -> list[tuple[str, str]]:
    gpus = [
        f"{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}, SM {gpu.compute}" for gpu in machine.gpus
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    rows = [
        ("machine", f"{machine.jetson or machine.processor}, {machine.cores} cores, {machine.architecture}"),
        ("instructions", ", ".join(machine.instructions) or "none of those that matter"),
        ("memory", f"{machine.memory_bytes / 1e9:.1f} GB, {machine.free_memory_bytes / 1e9:.1f} free"),
        ("disk here", f"{machine.free_disk_bytes / 1e9:.1f} GB free"),
        ("GPU", "; ".join(gpus) or "none whose driver answers"),
        ("TensorRT", machine.versions.get("tensorrt", "not installed")),
        ("onnxruntime", ", ".join(machine.providers) or "not installed"),
        ("packages", versions),
    ]
    if machine.jetpack or machine.power_mode:
        rows.insert(1, ("Jetson", f"{machine.jetpack or 'unknown release'}, mode {machine.power_mode or 'unknown'}"))
    return rows


def _table(title: str, findings: tuple[Finding, ...]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1, 0, 0))
    alike: dict[tuple[str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: list(_MARKS).index(finding.answer)):
        about = "; ".join(filter(None, (finding.reason, finding.remedy)))
        alike.setdefault((finding.answer, about), []).append(finding.name)
    for (answer, about), names in alike.items():
        table.add_row(_MARKS[answer], "; ".join(names), f"[dim]{escape(about)}[/]")
    if not findings:
        table.add_row("", "[dim]unknown: reading them needs PyYAML; pip install pyyaml[/]")
    return table
