"""IMDL-BenCo's two forms: a JSON of `[picture, mask | "Negative"]`, or folders Tp, Gt and perhaps Au.

Unlike its loader, which pairs the sorted folders, masks are found by name: one missing file shifts nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import Draft, Scan, need_file, relative_path
from defaker_opt.benchmarks.patterns import find_files
from defaker_opt.errors import SuiteError


@dataclass(frozen=True)
class Imdl:
    """file: the JSON list, if there is one; strip: leading text of its paths. mask_suffix: what Gt adds to Tp's."""

    file: str = ""
    strip: str = ""
    mask_suffix: str = ""

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the list or walk the folders."""
        draft = Draft(root, masks)
        if self.file:
            self._read_list(draft, root / self.file)
        else:
            self._walk(draft)
        return draft.finish()

    def _read_list(self, draft: Draft, file: Path) -> None:
        need_file(file)
        try:
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise SuiteError(f"{file}: cannot be read ({error}); check the list") from error
        if not isinstance(rows, list):
            raise SuiteError(f'{file}: must be a JSON list of [picture, mask or "Negative"]')
        for number, row in enumerate(rows, 1):
            where = f"{file}: entry {number}"
            if not (isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)):
                raise SuiteError(f'{where}: must be [picture, mask or "Negative"], got {str(row)[:60]}')
            path = relative_path(row[0], where, self.strip)
            if row[1] == "Negative":
                draft.add(path, "real")
            else:
                draft.add(path, "fake", relative_path(row[1], where, self.strip))

    def _walk(self, draft: Draft) -> None:
        forged = find_files(draft.root, "Tp/**/*")
        if not forged:
            raise SuiteError(f"{draft.root}: no pictures in Tp; check the folder, or name the JSON list in the entry")
        index: dict[str, list[str]] = {}
        for mask in find_files(draft.root, "Gt/**/*"):
            stem = PurePosixPath(mask.path).relative_to("Gt").with_suffix("").as_posix()
            index.setdefault(stem, []).append(mask.path)
        for match in find_files(draft.root, "Au/**/*"):
            draft.add(match.path, "real")
        for match in forged:
            stem = PurePosixPath(match.path).relative_to("Tp").with_suffix("").as_posix() + self.mask_suffix
            found = index.get(stem, [])
            if len(found) == 1:
                draft.add(match.path, "fake", found[0])
            else:
                draft.leave_out(match.path, f"{len(found)} masks Gt/{stem}.*, must be one")


LAYOUT = Imdl
