"""VLMEvalKit's table of questions: tab-separated, pictures in base64, the right answer as the letter of an option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from defaker_opt.benchmarks import Locator, MaskRule
from defaker_opt.benchmarks.layouts import Draft, LabelName, Scan, find_label, need_file
from defaker_opt.benchmarks.members import read_records, split_record
from defaker_opt.errors import SuiteError, one_of

# A picture's column may hold the index of another row instead, whose picture is meant.
_LONGEST_INDEX = 20


@dataclass(frozen=True)
class VlmEvalTsv:
    """labels: the right option's text (patterns with *) → real or fake; questions with other answers are left out."""

    file: str
    labels: dict[str, LabelName]
    image: str = "image"
    answer: str = "answer"
    slices: tuple[str, ...] = ()

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the table; its pictures stay where they are."""
        path = root / self.file
        need_file(path)
        draft = Draft(root, masks)
        places: dict[str, Locator] = {}
        header: list[str] = []
        try:
            for start, record in read_records(path):
                fields = split_record(record)
                if not header:
                    header = self._check_header(path, fields)
                elif len(fields) != len(header):
                    raise SuiteError(f"{path}: byte {start}: {len(fields)} fields, the header has {len(header)}")
                else:
                    place = Locator(path, f"{start}+{len(record)}/{header.index(self.image)}")
                    self._add(draft, dict(zip(header, fields)), place, places)
        except (OSError, UnicodeDecodeError) as error:
            raise SuiteError(f"{path}: cannot be read ({error}); check the table") from error
        return draft.finish()

    def _check_header(self, path: Path, header: list[str]) -> list[str]:
        for column in ("index", self.image, self.answer, *self.slices):
            if column not in header:
                raise SuiteError(f"{path}: column {one_of(column, header)}; say its name in the entry")
        return header

    def _add(self, draft: Draft, row: Mapping[str, str], place: Locator, places: dict[str, Locator]) -> None:
        index, image = row["index"], row[self.image].strip()
        if len(image) <= _LONGEST_INDEX and image.isdigit():
            if image not in places:
                draft.leave_out(f"row {index}", f"its picture is that of row {image}, which does not come before it")
                return
            place = places[image]
        places[index] = place
        answer = row[self.answer].strip()
        try:
            label = find_label(row.get(answer, answer), self.labels, f"row {index}")
        except SuiteError as error:
            draft.leave_out(f"row {index}", str(error).removeprefix(f"row {index}: "))
            draft.harmless += 1
            return
        slices = {name: row[name] for name in self.slices if row[name]}
        draft.add(f"{self.file}#{index}", label, image=place, slices=slices)


LAYOUT = VlmEvalTsv
