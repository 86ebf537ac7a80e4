"""Small JSON files that are there whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defaker_opt.runtime.build import json_text


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json_text(data), encoding="utf-8")
    os.replace(partial, path)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def default_cache_folder() -> Path:
    """Where sets of pictures, rows and builds of references are kept: DEFAKER_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("DEFAKER_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defaker-opt"
