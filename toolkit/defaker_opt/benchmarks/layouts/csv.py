"""A table with a row a picture: its path, its label, perhaps its mask; all other columns become slices."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import LABEL_WORDS, Draft, LabelName, Scan, find_label, need_file, relative_path
from defaker_opt.errors import SuiteError, one_of

# Problems of one table that are told at once.
_SHOWN = 10


@dataclass(frozen=True)
class Csv:
    """image, label, mask, source: the columns; mask and source may be missing. labels: the table's words.

    strip: leading text of its paths.
    """

    file: str
    delimiter: str = ","
    image: str = "image"
    label: str = "label"
    mask: str = "mask"
    source: str = "source"
    labels: dict[str, LabelName] = field(default_factory=lambda: dict(LABEL_WORDS))
    strip: str = ""

    CHECKS: ClassVar[Mapping[str, Callable[[str], str | None]]] = {
        "delimiter": lambda text: None if len(text) == 1 else f"must be one character, got {text!r}"
    }

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the table. Raises SuiteError with the first wrong rows of it."""
        file, draft, wrong = root / self.file, Draft(root, masks), []
        need_file(file)
        for where, row in self._rows(file):
            try:
                self._add(draft, row, where)
            except SuiteError as error:
                wrong.append(str(error).removeprefix(f"{file}: "))
        if wrong:
            more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
            raise SuiteError("\n  ".join([f"{file}:", *wrong[:_SHOWN], *more]))
        return draft.finish()

    def first_image(self, file: Path) -> str:
        """The path in the first row. Raises SuiteError."""
        for where, row in self._rows(file):
            return relative_path(row[self.image], where, self.strip)
        raise SuiteError(f"{file}: has no rows; give one for each picture")

    def _add(self, draft: Draft, row: Mapping[str, str], where: str) -> None:
        label = find_label(row[self.label], self.labels, where)
        key = relative_path(row[self.image], where, self.strip)
        mask_text = row.get(self.mask, "").strip()
        mask = relative_path(mask_text, where, self.strip) if mask_text else None
        used = (self.image, self.label, self.mask, self.source)
        slices = {name: text for name, text in row.items() if name not in used and text}
        draft.add(key, label, mask, source=row.get(self.source, ""), slices=slices)

    def _rows(self, file: Path) -> Iterator[tuple[str, dict[str, str]]]:
        """Each row and where it is."""
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines, delimiter=self.delimiter, strict=True)
                header = list(reader.fieldnames or ())
                _check_header(file, header, (self.image, self.label))
                for row in reader:
                    where = f"{file}: line {reader.line_num}"
                    if None in row or None in row.values():
                        raise SuiteError(f"{where}: must have {len(header)} fields, as the header has")
                    yield where, row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SuiteError(f"{file}: cannot be read as a table ({error}); save it as CSV in UTF-8") from error


def _check_header(file: Path, header: list[str], needed: tuple[str, ...]) -> None:
    for column in needed:
        if column not in header:
            raise SuiteError(f"{file}: column {one_of(column, header)}; the first line must name the columns")
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise SuiteError(f"{file}: column {', '.join(twice)} given twice")


LAYOUT = Csv
