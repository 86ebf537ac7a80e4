"""The folder of a profile: every file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from defaker_opt.errors import write_failure


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write each text under a temporary name, then rename. Raises DefakerError."""
    for name, text in files.items():
        partial = folder / f".{name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)
        except OSError as error:
            raise write_failure(folder / name, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
