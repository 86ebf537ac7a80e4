"""Lists of paths with labels: JSON `[{"path": …, "label": 0}]`, or text with a label and a path on each line.

A path may be a video's; its frames are then looked for as pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import LABEL_WORDS, Draft, LabelName, Scan, find_label, need_file, relative_path
from defaker_opt.benchmarks.patterns import find_files, names_in, wrong_pattern
from defaker_opt.errors import SuiteError

_KNOWN = frozenset(("folder", "stem"))


def _wrong_frames(pattern: str) -> str | None:
    if not pattern or wrong_pattern(pattern):
        return wrong_pattern(pattern) if pattern else None
    return None if names_in(pattern) <= _KNOWN else f"may use {{folder}} and {{stem}}, got {pattern!r}"


@dataclass(frozen=True)
class PathLabel:
    """files: lists, one after the other. labels: the list's words → real or fake. strip: leading text of its paths.

    frames: where the frames of video {folder}/{stem}.mp4 lie; its path is then their source.
    """

    files: tuple[str, ...]
    path: str = "path"
    label: str = "label"
    labels: dict[str, LabelName] = field(default_factory=lambda: dict(LABEL_WORDS))
    strip: str = ""
    frames: str = ""

    CHECKS: ClassVar[Mapping[str, Callable[[str], str | None]]] = {"frames": _wrong_frames}

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the lists."""
        draft = Draft(root, masks)
        for name in self.files:
            for where, path_text, label_text in self._rows(root / name):
                label = find_label(label_text, self.labels, where)
                path = relative_path(path_text, where, self.strip)
                if self.frames:
                    self._add_frames(draft, path, label)
                else:
                    draft.add(path, label, slices={"list": Path(name).stem} if len(self.files) > 1 else {})
        return draft.finish()

    def _rows(self, file: Path) -> Iterator[tuple[str, str, str]]:
        """Where, path and label of each row."""
        need_file(file)
        try:
            text = file.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if file.suffix == ".json" else text.splitlines()
        except (OSError, ValueError, RecursionError) as error:
            raise SuiteError(f"{file}: cannot be read ({error}); check the list") from error
        if not isinstance(rows, list):
            raise SuiteError(f"{file}: must be a JSON list of paths and labels")
        for number, row in enumerate(rows, 1):
            where = f"{file}: line {number}" if isinstance(row, str) else f"{file}: entry {number}"
            if isinstance(row, dict) and self.path in row and self.label in row:
                yield where, str(row[self.path]), str(row[self.label])
            elif isinstance(row, str) and len(row.split(maxsplit=1)) == 2:
                label, path = row.split(maxsplit=1)
                yield where, path, label
            elif row != "":
                raise SuiteError(f"{where}: must have {self.path!r} and {self.label!r}, got {str(row)[:60]!r}")

    def _add_frames(self, draft: Draft, video: str, label: LabelName) -> None:
        known = {"folder": str(Path(video).parent), "stem": Path(video).stem}
        frames = find_files(draft.root, self.frames, known)
        if not frames:
            draft.leave_out(video, f"no frames, looked for {self.frames}")
        for frame in frames:
            draft.add(frame.path, label, source=video)


LAYOUT = PathLabel
