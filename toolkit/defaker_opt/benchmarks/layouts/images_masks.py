"""Folders `images` and `masks`, one mask a picture; ForensicHub's form of document sets.

Unlike its loader, which pairs the sorted folders, masks are found by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from defaker_opt.benchmarks import Locator, MaskRule
from defaker_opt.benchmarks.layouts import Draft, Scan
from defaker_opt.benchmarks.patterns import find_files
from defaker_opt.benchmarks.read import decode_mask
from defaker_opt.errors import SuiteError


@dataclass(frozen=True)
class ImagesMasks:
    """label "from-mask": a picture with an empty mask is authentic, so that every mask is decoded to list the set."""

    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    label: Literal["from-mask", "fake"] = "from-mask"

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """Walk the folders."""
        draft = Draft(root, masks)
        index: dict[str, list[str]] = {}
        for mask in find_files(root, f"{self.masks}/**/*"):
            index.setdefault(_stem(mask.path, self.masks), []).append(mask.path)
        for match in find_files(root, f"{self.images}/**/*"):
            stem = _stem(match.path, self.images) + self.mask_suffix
            found = index.pop(stem, [])
            if len(found) != 1:
                draft.leave_out(match.path, f"{len(found)} masks {self.masks}/{stem}.*, must be one")
                continue
            try:
                forged = self.label == "fake" or decode_mask(Locator(root / found[0]), masks).any()
            except SuiteError as error:
                draft.leave_out(match.path, str(error))
                continue
            draft.add(match.path, "fake" if forged else "real", found[0])
        for path in (path for paths in index.values() for path in paths):
            draft.leave_out(path, "a mask without a picture")
        return draft.finish()


def _stem(path: str, folder: str) -> str:
    return PurePosixPath(path).relative_to(folder).with_suffix("").as_posix()


LAYOUT = ImagesMasks
