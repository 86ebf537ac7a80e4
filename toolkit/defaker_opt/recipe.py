"""What to make of a detector: a recipe is a frozen value, read from YAML and complete from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from defaker_opt import strict
from defaker_opt.catalog import find_module, find_yaml, module_names
from defaker_opt.errors import ConfigError, DefakerError, one_of
from defaker_opt.limits import Limit, limits_as_json, unknown_metrics
from defaker_opt.savings import EVERY_SAVING, Savings


@dataclass(frozen=True)
class Recipe:
    """passes: frozen values with an `apply`, in the order they run. savings: leave out work, never results.

    accept: by metric, what `validate` judges by. calibration: the pictures that methods look at, see `load_samples`.
    """

    name: str
    description: str
    source: str
    target: str
    passes: tuple[Any, ...]
    savings: Savings = EVERY_SAVING
    accept: Mapping[str, Limit] = field(default_factory=dict)
    calibration: str | None = None
    reverted: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The form the manifest keeps: the recipe as it was read, defaults filled in."""
        return {
            "name": self.name,
            "description": self.description,
            "source": self.source,
            "target": self.target,
            **({"calibration": self.calibration} if self.calibration else {}),
            "savings": dataclasses.asdict(self.savings),
            "passes": [{pass_name(each): dataclasses.asdict(each)} for each in self.passes],
            "accept": limits_as_json(self.accept),
            **({"reverted": dict(self.reverted)} if self.reverted else {}),
        }


@dataclass(frozen=True)
class _RecipeFile:
    description: str
    source: str
    target: str
    passes: tuple[dict[str, Any], ...] = ()
    savings: Savings = EVERY_SAVING
    accept: dict[str, Limit] = field(default_factory=dict)
    calibration: str | None = None

    CHECKS: ClassVar[Mapping[str, Callable[[dict[str, Limit]], str | None]]] = {"accept": unknown_metrics}


def load_recipe(name: str) -> Recipe:
    """Read a shipped recipe by name, or any by path. Raises ConfigError with every problem of the file."""
    path = find_yaml("recipes", name, "recipe")
    return parse_recipe(path.stem, strict.read_yaml(path), path)


def parse_recipe(name: str, data: object, file: Path | str) -> Recipe:
    """Check parsed YAML. Raises ConfigError with every problem."""
    problems: list[str] = []

    def report(where: str, what: str) -> None:
        problems.append(f"{where}: {what}" if where else what)

    parsed = strict.parse(_RecipeFile, data, "", report)
    passes: list[object] = []
    entries = data.get("passes") if isinstance(data, Mapping) else None
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, Mapping):
            passes.append(_parse_pass(entry, f"passes[{index}]", report))
    names = [
        name for entry in (entries if isinstance(entries, list) else []) if isinstance(entry, Mapping) for name in entry
    ]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        report("passes", f"{name} given twice; put its rules into one")
    target = data.get("target") if isinstance(data, Mapping) else None
    if isinstance(target, str):
        try:
            find_yaml("profiling/targets", target, "target")
        except DefakerError as error:
            report("target", str(error))
    if problems:
        raise ConfigError(file, problems)
    assert isinstance(parsed, _RecipeFile)
    return Recipe(
        name,
        parsed.description,
        parsed.source,
        parsed.target,
        tuple(passes),
        parsed.savings,
        parsed.accept,
        parsed.calibration,
    )


def _parse_pass(entry: Mapping[str, Any], where: str, report: strict.Report) -> object:
    if len(entry) != 1:
        report(where, f"must be one pass with its settings, got the keys {', '.join(map(str, entry)) or 'none'}")
        return None
    ((name, settings),) = entry.items()
    known = module_names("passes")
    if name not in known:
        report(where, f"unknown pass, {one_of(name, known)}")
        return None
    return strict.parse(find_module("passes", name).PASS, settings or {}, f"{where}.{name}", report)


def pass_name(each: object) -> str:
    """The name a recipe gives a pass: that of its file."""
    return type(each).__module__.rpartition(".")[2]
