"""report.json: the report's values by name, as any other program would read them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from defaker_opt.report.values import DriftReport

FORMAT = 1


def report_as_json(report: DriftReport) -> dict[str, Any]:
    """Plain lists, mappings, numbers and texts; null where a figure is undefined."""
    return {"format": FORMAT, **_plain(dataclasses.asdict(report))}


def json_line(report: DriftReport) -> str:
    """The whole report in one line."""
    return json.dumps(report_as_json(report), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value
