"""Find things by their file name: the file name is the registration."""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from defaker_opt.errors import DefakerError, one_of

PACKAGE = Path(__file__).parent


@functools.cache
def code_digest() -> str:
    """SHA-256 over our own code: what was made with other code is not taken for what this would make."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))).hexdigest()


def data_folder(name: str) -> Path:
    """The folder of shipped data: inside an installed wheel, or at the top of a source tree."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent.parent / name


def yaml_names(folder: str) -> dict[str, Path]:
    """Every shipped YAML of a data folder, by the name users give."""
    return {path.stem: path for path in sorted(data_folder(folder).rglob("*.yaml"))}


def find_yaml(folder: str, name: str, noun: str) -> Path:
    """A user's YAML: a path to a file, or the name of a shipped one. Raises DefakerError with the nearest name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise DefakerError(f"{noun} {name}: no such file; shipped ones are {', '.join(yaml_names(folder))}")
    known = yaml_names(folder)
    if name not in known:
        raise DefakerError(f"{noun} {one_of(name, known)}; or give the path of a YAML file")
    return known[name]


def module_names(package: str) -> list[str]:
    """The modules of one of our folders, by file name."""
    folder = PACKAGE / package.replace(".", "/")
    return sorted(found.name for found in pkgutil.iter_modules([str(folder)]) if not found.name.startswith("_"))


def find_module(package: str, name: str) -> ModuleType:
    """Import one of our modules by name; the caller has checked the name against `module_names`."""
    return importlib.import_module(f"defaker_opt.{package}.{name}")
