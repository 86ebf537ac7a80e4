"""How benchmarks lie on disk, one layout a file. The file's name is the key in an entry, LAYOUT the value.

Lists keep their order; folders are walked in natural order. A key is the picture's path below the benchmark's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Protocol

from defaker_opt.benchmarks import Item, Locator, MaskRule
from defaker_opt.errors import AbsentError, SuiteError, one_of

LabelName = Literal["real", "fake"]
Label = Literal[0, 1]

# Spellings of labels that need no explanation.
LABEL_WORDS: Mapping[str, LabelName] = {
    "0": "real",
    "real": "real",
    "authentic": "real",
    "1": "fake",
    "fake": "fake",
    "forged": "fake",
}

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".avif")
)

# More than this share of unusable pictures is not bad luck but a wrong layout or folder.
MOST_LEFT_OUT = 0.5


@dataclass(frozen=True)
class Scan:
    """What a layout found. problems: one line for each picture that was left out."""

    items: tuple[Item, ...]
    problems: tuple[str, ...]


class Layout(Protocol):
    """A frozen value with its settings."""

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """List the pictures below `root`. Raises SuiteError where the layout does not fit what lies there."""
        ...


@dataclass
class Draft:
    """The pictures of one benchmark while they are being listed.

    harmless: how many of the problems are no sign of a wrong layout.
    """

    root: Path
    masks: MaskRule
    items: dict[str, Item] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    harmless: int = 0

    def add(
        self,
        key: str,
        label: LabelName,
        mask: str | Locator | None = None,
        image: Locator | None = None,
        source: str = "",
        slices: Mapping[str, str] | None = None,
    ) -> None:
        """Take a picture; one that is listed twice or lacks a file is left out, with a line in `problems`.

        key, mask: paths below the root, unless `image` and `mask` say where they lie. Raises SuiteError if a picture is
        listed again with another label or mask.
        """
        at = Locator(self.root / mask) if isinstance(mask, str) else mask
        item = Item(
            key, image or Locator(self.root / key), label_number(label), at, self.masks, source, dict(slices or {})
        )
        earlier = self.items.get(key)
        if earlier is not None:
            if (earlier.label, earlier.mask) != (item.label, item.mask):
                raise SuiteError(f"{self.root}: {key} is listed twice, with different labels or masks; remove one")
            self.leave_out(key, "listed twice")
            self.harmless += 1
        elif not item.image.path.exists():
            self.leave_out(key, f"no such file: {item.image.path}")
        elif at is not None and not at.path.exists():
            self.leave_out(key, f"its mask is missing: {at.path}")
        elif not item.image.member and Path(key).suffix.lower() not in IMAGE_SUFFIXES:
            self.leave_out(key, "not a picture by its name")
        else:
            self.items[key] = item

    def leave_out(self, key: str, why: str) -> None:
        """Note a picture that cannot be used."""
        self.problems.append(f"{key}: {why}")

    def finish(self) -> Scan:
        """All that can be used. Raises SuiteError if that is nothing, or less than what cannot be used."""
        if not self.items:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise SuiteError(f"{self.root}: no pictures found in the layout of this benchmark{first}; check the folder")
        unusable = len(self.problems) - self.harmless
        total = len(self.items) + unusable
        if unusable > MOST_LEFT_OUT * total:
            raise SuiteError(
                f"{self.root}: {unusable} of {total} pictures cannot be used, so the layout is probably another one; "
                f"the first: {self.problems[0]}"
            )
        return Scan(tuple(self.items.values()), tuple(self.problems))


def need_file(file: Path) -> None:
    """Raises AbsentError if a list of pictures is not there."""
    if not file.is_file():
        raise AbsentError(f"{file}: no such file; check the folder, or the file's name in the entry")


def label_number(name: LabelName) -> Label:
    """1 for fake, 0 for real."""
    return 1 if name == "fake" else 0


def find_label(text: str, labels: Mapping[str, LabelName], where: str) -> LabelName:
    """The label that a benchmark's own word stands for; labels: patterns with *, the first that fits, in any case.

    Raises SuiteError naming `where`.
    """
    word = text.strip().lower()
    for pattern, label in labels.items():
        if fnmatchcase(word, pattern.lower()):
            return label
    raise SuiteError(f"{where}: label {one_of(text, labels)}; say what it means under `labels` of the entry")


def relative_path(text: str, where: str, strip: str = "") -> str:
    """A path from a list as a key: slashes, without `strip` at its beginning. Raises SuiteError naming `where`."""
    path = text.strip().replace("\\", "/").removeprefix(strip)
    if not path or "\0" in path:
        raise SuiteError(f"{where}: path {text!r} is empty or no path")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise SuiteError(
            f"{where}: {text!r} is an absolute path; make it relative, or say under `strip` of the entry what to remove"
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise SuiteError(f"{where}: {text!r} leads out of the benchmark's folder; put the file inside")
    return "/".join(parts)
