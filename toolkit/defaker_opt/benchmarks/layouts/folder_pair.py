"""Folders of authentic and of forged pictures: `0_real` and `1_fake`, `nature` and `ai`, with or without classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import Draft, LabelName, Scan
from defaker_opt.benchmarks.patterns import fill, find_files, names_in, wrong_pattern
from defaker_opt.errors import AbsentError, SuiteError
from defaker_opt.strict import Invalid


def _wrong_patterns(patterns: tuple[str, ...]) -> str | None:
    return next(filter(None, map(wrong_pattern, patterns)), None)


@dataclass(frozen=True)
class FolderPair:
    """Patterns of paths (see `patterns`). What fits `real` too is not forged. source: may use the patterns' names.

    All remembered names but those of `source` become slices.
    """

    real: tuple[str, ...]
    fake: tuple[str, ...]
    source: str = ""

    CHECKS: ClassVar[Mapping[str, Callable[[tuple[str, ...]], str | None]]] = {
        "real": _wrong_patterns,
        "fake": _wrong_patterns,
    }

    def __post_init__(self) -> None:
        for pattern in (*self.real, *self.fake):
            unknown = names_in(self.source) - names_in(pattern)
            if unknown:
                raise Invalid(f"source: {pattern!r} does not remember {', '.join(sorted(unknown))}")

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Walk the folders."""
        draft = Draft(root, masks)
        taken: set[str] = set()
        labelled: tuple[tuple[LabelName, tuple[str, ...]], ...] = (("real", self.real), ("fake", self.fake))
        for label, patterns in labelled:
            found = {match.path: match for pattern in patterns for match in find_files(root, pattern)}
            new = [path for path in found if path not in taken]
            if patterns and not new:
                error = SuiteError if taken else AbsentError
                raise error(f"{root}: no {label} pictures, looked for {', '.join(patterns)}; check the folder")
            for path in new:
                names = found[path].names
                slices = {name: text for name, text in names.items() if name not in names_in(self.source)}
                draft.add(path, label, source=fill(self.source, names), slices=slices)
            taken.update(found)
        return draft.finish()


LAYOUT = FolderPair
