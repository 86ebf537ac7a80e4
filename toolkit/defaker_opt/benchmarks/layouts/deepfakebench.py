"""DeepfakeBench's JSON, which ForensicHub reads too: dataset → label → split → [compression →] video → frames."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt.benchmarks import MaskRule
from defaker_opt.benchmarks.layouts import Draft, LabelName, Scan, find_label, relative_path
from defaker_opt.benchmarks.patterns import find_lists
from defaker_opt.errors import SuiteError, one_of


@dataclass(frozen=True)
class DeepfakeBench:
    """files: JSON files, or patterns of them. labels: the file's labels (patterns with *) → real or fake.

    compression: c23 or c40 where the file has that level. A frame's source is its label and video: two classes may
    use one name for different videos.
    """

    files: tuple[str, ...]
    labels: dict[str, LabelName]
    split: str = "test"
    compression: str = ""
    strip: str = ""

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Read the lists of frames."""
        draft = Draft(root, masks)
        for match in find_lists(root, self.files):
            self._read(draft, root / match.path)
        return draft.finish()

    def _read(self, draft: Draft, file: Path) -> None:
        try:
            data = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise SuiteError(f"{file}: cannot be read ({error}); check the list") from error
        count = 0
        for _, labels in _levels(data, str(file)):
            for name, splits in _levels(labels, str(file)):
                label = find_label(name, self.labels, str(file))
                where = f"{file}: {name}, {self.split}"
                for video, facts in _levels(self._videos(_level(splits, where), where), where):
                    count += 1
                    self._add_video(draft, label, name, video, _level(facts, f"{where}, {video}"), where)
        if not count:
            raise SuiteError(f"{file}: no videos in split {self.split!r}; check `split` of the entry")

    def _videos(self, splits: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        videos = _level(splits.get(self.split, {}), where)
        levels = {"raw", "c23", "c40"} & set(videos)
        if levels and self.compression not in levels:
            raise SuiteError(f"{where}: compression {one_of(self.compression, levels)}; set it in the entry")
        return _level(videos[self.compression], where) if levels else videos

    def _add_video(
        self, draft: Draft, label: LabelName, name: str, video: str, facts: Mapping[str, Any], where: str
    ) -> None:
        frames = facts.get("frames")
        if not isinstance(frames, list):
            raise SuiteError(f"{where}, {video}: frames must be a list of paths")
        if not frames:
            draft.leave_out(f"{name}/{video}", "no frames")
        slices = {} if label == "real" else {"generator": name}
        for frame in frames:
            key = relative_path(str(frame), f"{where}, {video}", self.strip)
            draft.add(key, label, source=f"{name}/{video}", slices=slices)


def _level(data: object, where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise SuiteError(f"{where}: must be an object of JSON, got {str(data)[:60]}; is this DeepfakeBench's list?")
    return data


def _levels(data: object, where: str) -> Iterator[tuple[str, Any]]:
    yield from _level(data, where).items()


LAYOUT = DeepfakeBench
