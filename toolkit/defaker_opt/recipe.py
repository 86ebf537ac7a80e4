"""What to make of a detector: a recipe is a frozen value, read from YAML and complete from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defaker_opt import strict
from defaker_opt.catalog import find_module, find_yaml, module_names
from defaker_opt.errors import DefakerError
from defaker_opt.explanation import Explanation
from defaker_opt.limits import Accept, limits_as_json, parse_limits
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.savings import EVERY_SAVING, Savings


@dataclass(frozen=True)
class Recipe:
    """passes: frozen values with an `apply`, in the order they run. savings: leave out work, never results.

    explain: the build can also answer in words. accept: by metric, what `validate` judges by. calibration: the pictures
    that methods look at, see `load_samples`.
    """

    name: str
    description: str
    source: str
    target: str
    passes: tuple[Any, ...]
    savings: Savings = EVERY_SAVING
    accept: Accept = field(default_factory=dict)
    calibration: str | None = None
    reverted: Mapping[str, str] = field(default_factory=dict)
    explain: Explanation | None = None

    def stages(self) -> tuple[str, ...]:
        """The stages of its builds, in the order they are made."""
        stages = self.savings.stages()
        return stages if not self.explain or VOCABULARY_HEAD in stages else (*stages, VOCABULARY_HEAD)

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
            "explain": self.explain and dataclasses.asdict(self.explain),
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
    accept: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    explain: Explanation | None = None


def load_recipe(name: str) -> Recipe:
    """Read a shipped recipe by name, or any by path. Raises ConfigError with every problem of the file."""
    path = find_yaml("recipes", name, "recipe")
    return parse_recipe(path.stem, strict.read_yaml(path), path)


def parse_recipe(name: str, data: object, file: Path | str) -> Recipe:
    """Check parsed YAML. Raises ConfigError with every problem."""
    passes: list[object] = []
    accept: dict[str, Any] = {}

    def check(report: strict.Report) -> None:
        if isinstance(data, Mapping):
            passes.extend(_parse_passes(data.get("passes"), report))
            _check_target(data.get("target"), report)
            limits = data.get("accept")
            accept.update(parse_limits(limits if isinstance(limits, Mapping) else {}, "accept", report))

    parsed = strict.read_value(_RecipeFile, data, file, check)
    keys = ("description", "source", "target", "savings", "calibration", "explain")
    return Recipe(name=name, passes=tuple(passes), accept=accept, **{key: getattr(parsed, key) for key in keys})


def _parse_passes(entries: object, report: strict.Report) -> Iterator[object]:
    """Those that are mappings; what else is wrong with the list was said already."""
    choice = strict.Choice("pass", module_names("passes"), lambda name: find_module("passes", name).PASS)
    listed = entries if isinstance(entries, list) else []
    for index, entry in enumerate(listed):
        if isinstance(entry, Mapping):
            yield strict.parse_choice(choice, entry, f"passes[{index}]", report)
    names = [name for entry in listed if isinstance(entry, Mapping) for name in entry]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        report("passes", f"{name} given twice; put its rules into one")


def _check_target(target: object, report: strict.Report) -> None:
    if not isinstance(target, str):
        return
    try:
        find_yaml("profiling/targets", target, "target")
    except DefakerError as error:
        report("target", str(error))


def pass_name(each: object) -> str:
    """The name a recipe gives a pass: that of its file."""
    return type(each).__module__.rpartition(".")[2]
