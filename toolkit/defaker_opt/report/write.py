"""The folder of a report: every file whole or not at all, the page last."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from defaker_opt.drift.table import write_rows
from defaker_opt.drift.validate import Comparison
from defaker_opt.errors import write_failure
from defaker_opt.files import write_json
from defaker_opt.report.as_json import report_as_json
from defaker_opt.report.gallery import Picture
from defaker_opt.report.html import report_as_html
from defaker_opt.report.markdown import report_as_markdown
from defaker_opt.report.values import DriftReport

PAGE = "report.html"


def write_report(report: DriftReport, comparison: Comparison, pictures: tuple[Picture, ...], folder: Path) -> Path:
    """Write rows.csv, report.json, report.md and report.html; the page's path. Raises DefakerError."""
    write_rows(comparison.runs, folder / "rows.csv")
    try:
        write_json(folder / "report.json", report_as_json(report))
    except OSError as error:
        raise write_failure(folder / "report.json", error) from error
    _write_text(folder / "report.md", report_as_markdown(report))
    _write_text(folder / PAGE, report_as_html(report, pictures))
    return folder / PAGE


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
