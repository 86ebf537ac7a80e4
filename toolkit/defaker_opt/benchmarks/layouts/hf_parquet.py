"""Parquet tables as Hugging Face's datasets library writes them: pictures are encoded bytes in a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from defaker_opt.benchmarks import Locator, MaskRule
from defaker_opt.benchmarks.layouts import LABEL_WORDS, Draft, LabelName, Scan, find_label
from defaker_opt.benchmarks.members import open_parquet
from defaker_opt.benchmarks.patterns import Match, find_lists, wrong_pattern
from defaker_opt.errors import SuiteError, one_of


def _wrong_files(files: tuple[str, ...]) -> str | None:
    return next(filter(None, map(wrong_pattern, files)), None)


@dataclass(frozen=True)
class HfParquet:
    """files: patterns; what they remember becomes slices. label, slices, mask: columns; no mask where it is null."""

    files: tuple[str, ...]
    labels: dict[str, LabelName] = field(default_factory=lambda: dict(LABEL_WORDS))
    image: str = "image"
    label: str = "label"
    mask: str = ""
    source: str = ""
    slices: tuple[str, ...] = ()

    CHECKS: ClassVar[Mapping[str, Callable[[tuple[str, ...]], str | None]]] = {"files": _wrong_files}

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the columns that are no pictures."""
        draft = Draft(root, masks)
        for match in find_lists(root, self.files):
            self._read(draft, match)
        return draft.finish()

    def _read(self, draft: Draft, match: Match) -> None:
        path = draft.root / match.path
        with open_parquet(path) as table:
            names = table.schema_arrow.names
            for column in filter(None, (self.image, self.label, self.mask, self.source, *self.slices)):
                if column not in names:
                    raise SuiteError(f"{path}: column {one_of(column, names)}; say its name in the entry")
            columns = [self.label, *self.slices, *filter(None, (self.source, _light(table, self.mask)))]
            rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                self._add(draft, match, number, row)

    def _add(self, draft: Draft, match: Match, number: int, row: Mapping[str, Any]) -> None:
        path, key = draft.root / match.path, f"{match.path}#{number}"
        masked = self.mask and row[self.mask] is not None
        draft.add(
            key,
            find_label(str(row[self.label]), self.labels, f"{path}: row {number}"),
            Locator(path, f"{number}/{self.mask}") if masked else None,
            Locator(path, f"{number}/{self.image}"),
            str(row[self.source]) if self.source else "",
            {**match.names, **{name: str(row[name]) for name in self.slices if row[name] is not None}},
        )


def _light(table: Any, column: str) -> str:
    """A part of a picture's column that tells whether it is null without its bytes."""
    if not column:
        return ""
    kind = table.schema_arrow.field(column).type
    fields = [kind.field(index).name for index in range(kind.num_fields)]
    return f"{column}.path" if "path" in fields else column


LAYOUT = HfParquet
