"""Pictures whose masks lie elsewhere under a name that follows from theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import Draft, Scan
from defaker_opt.benchmarks.patterns import Match, fill, find_files, names_in, wrong_pattern
from defaker_opt.errors import AbsentError, SuiteError
from defaker_opt.strict import Invalid


@dataclass(frozen=True)
class Rule:
    """What the files of a pattern are. mask, source, slices may use its names.

    A mask with names of its own, or *, is looked up among the files that fit it; exactly one must.
    """

    files: str
    label: Literal["real", "fake", "ignore"]
    mask: str = ""
    source: str = ""
    slices: dict[str, str] = field(default_factory=dict)

    CHECKS: ClassVar[Mapping[str, Callable[[str], str | None]]] = {
        "files": wrong_pattern,
        "mask": lambda mask: wrong_pattern(mask) if mask else None,
    }

    def __post_init__(self) -> None:
        for what, template in (("source", self.source), *self.slices.items()):
            unknown = names_in(template) - names_in(self.files)
            if unknown:
                raise Invalid(f"{what}: {self.files!r} does not remember {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class RuleBased:
    """For each file the first rule that fits decides."""

    rules: tuple[Rule, ...]

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Walk the folders."""
        draft = Draft(root, masks)
        taken: set[str] = set()
        for rule in self.rules:
            matches = find_files(root, rule.files)
            if not matches and rule.label != "ignore":
                error = SuiteError if taken else AbsentError
                raise error(f"{root}: no {rule.label} pictures, looked for {rule.files}; check the folder")
            if rule.label != "ignore":
                _add(draft, rule, [match for match in matches if match.path not in taken])
            taken.update(match.path for match in matches)
        return draft.finish()


def _add(draft: Draft, rule: Rule, matches: list[Match]) -> None:
    assert rule.label != "ignore"
    find_masks = _mask_finder(draft.root, rule)
    for match in matches:
        slices = {name: fill(template, match.names) for name, template in rule.slices.items()}
        source = fill(rule.source, match.names)
        found = find_masks(match)
        if len(found) == 1:
            draft.add(match.path, rule.label, found[0] or None, source=source, slices=slices)
        else:
            draft.leave_out(match.path, f"{len(found)} masks fit {_fill_known(rule.mask, match)}, must be one")


def _mask_finder(root: Path, rule: Rule) -> Callable[[Match], list[str]]:
    """How to find the masks of a picture; [""] where the rule names none."""
    shared = sorted(names_in(rule.mask) & names_in(rule.files))
    if "*" not in rule.mask and len(shared) == len(names_in(rule.mask)):
        return lambda match: [fill(rule.mask, match.names)]
    index: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for mask in find_files(root, rule.mask):
        index[tuple(mask.names[name] for name in shared)].append(mask.path)
    return lambda match: index[tuple(match.names[name] for name in shared)]


def _fill_known(template: str, match: Match) -> str:
    """A mask pattern with what is known put in, for messages."""
    return fill(template, {name: match.names.get(name, f"{{{name}}}") for name in names_in(template)})


LAYOUT = RuleBased
