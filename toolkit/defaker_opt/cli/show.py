"""`defaker-opt show`: what is there to choose from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from defaker_opt.errors import DefakerError, one_of

_YAML = {"recipes": "recipes"}
_MODULES = {"methods": "methods", "passes": "passes", "backends": "runtime.backends", "sources": "sources"}
_PRESETS, _TARGETS = "presets", "targets"


def show(
    what: Annotated[
        str, typer.Argument(help="recipes, targets, presets, methods, passes, backends, sources or benchmarks.")
    ] = "recipes",
    data: Annotated[
        Path | None, typer.Option(help="Where benchmarks lie; says of each what is there, which lists its pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List what recipes may name, or the benchmarks to validate on."""
    if data is not None and what != "benchmarks":
        raise DefakerError(f"--data: only benchmarks lie in a folder of yours, not {what}; leave it out")
    if data is not None and not data.is_dir():
        raise DefakerError(f"--data {data}: no such folder; give the one that holds the benchmarks' folders")
    for row in _benchmarks(data) if what == "benchmarks" else _names(what):
        print(json.dumps(row, ensure_ascii=False) if as_json else _line(row))


def _names(what: str) -> Iterator[dict[str, Any]]:
    from defaker_opt import catalog, strict

    if what in _YAML:
        for name, path in catalog.yaml_names(_YAML[what]).items():
            parsed = strict.read_yaml(path)
            assert isinstance(parsed, dict)
            yield {"name": name, "description": parsed["description"]}
    elif what == _TARGETS:
        yield from _targets()
    elif what == _PRESETS:
        from defaker_opt.presets import preset_names

        for name, title in preset_names().items():
            yield {"name": f"{name}:random", "description": title}
    elif what in _MODULES:
        yield from ({"name": name} for name in catalog.module_names(_MODULES[what]))
    else:
        raise DefakerError(f"show {one_of(what, [*_YAML, *_MODULES, _PRESETS, _TARGETS, 'benchmarks'])}")


def _targets() -> Iterator[dict[str, Any]]:
    from defaker_opt import catalog
    from defaker_opt.target import load_target

    for name in catalog.yaml_names("profiling/targets"):
        target = load_target(name)
        unverified = list(target.device.unverified()) if target.device else []
        yield {**dataclasses.asdict(target), "available": target.available, "unverified": unverified}


def _benchmarks(data: Path | None) -> Iterator[dict[str, Any]]:
    from defaker_opt.benchmarks.entries import entry_names, load_entry
    from defaker_opt.benchmarks.load import find_presence

    for name in entry_names():
        entry = load_entry(name)
        presence = {} if data is None else {"presence": dataclasses.asdict(find_presence(entry, data))}
        yield {**dataclasses.asdict(entry), **presence}


def _line(row: dict[str, Any]) -> str:
    if "available" in row:
        return _target_lines(row)
    if "description" in row:
        return f"{row['name']:{32 if row['name'].endswith(':random') else 12}} {row['description']}"
    if "title" not in row:
        return str(row["name"])
    about = f"{row['name']:24} {'/'.join(row['domains']):9} {row['title']}"
    facts = f"{'':24} {', '.join(row['metrics'])}; licence: {row['licence']}"
    return "\n".join([about, facts, *_presence_lines(row.get("presence"))])


def _target_lines(row: dict[str, Any]) -> str:
    lines = [f"{row['name']:22} {row['description']}"]
    device = row["device"]
    if device:
        peaks = ", ".join(f"{name} {fact['value']:g}" for name, fact in device["peaks"].items())
        facts = f"{device['memory']['value']:g} GB, {device['bandwidth']['value']:g} GB/s"
        lines.append(f"{'':22} {facts}, 10¹² operations a second: {peaks}")
    if row["encodings"]:
        reads = f", graphs of opset {row['graph']['opset']}" if row["graph"] else ""
        lines.append(f"{'':22} {row['backend']} runs {', '.join(row['encodings'])}{reads}")
    if not row["available"]:
        lines.append(f"{'':22} backend {row['backend']}, not in this version: for planning only")
    if row["unverified"]:
        lines.append(f"{'':22} unverified: {', '.join(row['unverified'])}")
    return "\n".join(lines)


def _presence_lines(presence: dict[str, Any] | None) -> list[str]:
    if presence is None:
        return []
    status, detail = presence["status"], presence["detail"]
    if status == "not found":
        detail = detail.partition(";")[0]
    if status in ("found", "differs"):
        counts = (
            f"{presence['authentic']:,} authentic, {presence['forged']:,} forged, {presence['left_out']:,} left out"
        )
        status = f"{status}: {counts}"
    return [f"{'':24} {status}{f' ({detail})' if detail else ''}"]
