"""The folder of a report: every file whole or not at all, the page last."""

from __future__ import annotations

from pathlib import Path

from defaker_opt.drift.table import write_rows
from defaker_opt.drift.validate import Comparison
from defaker_opt.files import whole_file
from defaker_opt.report.as_json import report_as_json
from defaker_opt.report.gallery import Picture
from defaker_opt.report.html import report_as_html
from defaker_opt.report.markdown import report_as_markdown
from defaker_opt.report.values import DriftReport
from defaker_opt.runtime.build import json_text

PAGE = "report.html"


def write_report(report: DriftReport, comparison: Comparison, pictures: tuple[Picture, ...], folder: Path) -> Path:
    """Write rows.csv, report.json, report.md and report.html; the page's path. Raises DefakerError."""
    write_rows(comparison.runs, folder / "rows.csv")
    texts = {
        "report.json": json_text(report_as_json(report)),
        "report.md": report_as_markdown(report),
        PAGE: report_as_html(report, pictures),
    }
    for name, text in texts.items():
        with whole_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / PAGE
