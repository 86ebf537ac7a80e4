"""Environments of peers that do not go with our own packages: made in the cache folder on first use."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

from defaker_opt.files import default_cache_folder


def python_of(name: str, *steps: tuple[str, ...]) -> Path:
    """The interpreter of an environment; each step is what pip is given, such as ("install", "nncf")."""
    folder = default_cache_folder().absolute() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        for step in steps:
            subprocess.run([str(python), "-m", "pip", "--quiet", *step], check=True)  # noqa: S603 - our own
        (folder / "ready").touch()
    return python
