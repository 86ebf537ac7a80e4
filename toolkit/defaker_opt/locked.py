"""A job that must be the one an earlier build was made by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from defaker_opt.errors import BuildError
from defaker_opt.pipeline import Job
from defaker_opt.runtime.build import open_build

_PARTS = ("recipe", "target", "source", "calibration", "tools")


def check_locked(job: Job, folder: Path) -> None:
    """Raise BuildError, with every difference, unless the job is the one that the build at `folder` was made by.

    Recipe, target, the hashes of source and calibration pictures, and the versions of all tools must be equal: then the
    codes are, on one machine and with as many threads.
    """
    then = open_build(folder).manifest.data
    now = json.loads(json.dumps(job.plan))
    differing = [
        f"{name}: {_shown(before)} there, {_shown(after)} now"
        for part in _PARTS
        for name, before, after in _differences(part, then.get(part), now.get(part))
    ]
    if differing:
        raise BuildError(
            f"--locked {folder}: this would not be the same build; restore what differs, or leave --locked out:\n  "
            + "\n  ".join(differing)
        )


def _differences(name: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of what is not equal, down to the innermost mapping."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(f"{name}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield name, before, after


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
