"""Where files lie and what their names say, as in `Tp/{operation}/{stem}_{number:digits}.jpg`.

*                any text within one name, in any case; hidden files are never meant
**               any number of folders
{name}           like *, not empty, and remembered; the same name again must be the same text. As short as may be, but
                 before a dot up to the last one: {name}.* is a file's stem
{name:digits}    digits only
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defaker_opt.errors import AbsentError, SuiteError

_TOKEN = re.compile(r"\{([a-z_]+)(:digits)?\}|\*")


@dataclass(frozen=True)
class Match:
    """A file: its path below the folder that was searched, with slashes, and what the pattern remembered."""

    path: str
    names: Mapping[str, str]


def wrong_pattern(pattern: str) -> str | None:
    """What is wrong with a pattern, or None."""
    rest = _TOKEN.sub("", pattern)
    if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        return f"must be a path below the benchmark's folder, got {pattern!r}"
    if "{" in rest or "}" in rest:
        return f"placeholders are {{name}} or {{name:digits}} in small letters, got {pattern!r}"
    return None


def names_in(pattern: str) -> frozenset[str]:
    """The names a pattern remembers."""
    return frozenset(token[1] for token in _TOKEN.finditer(pattern) if token[1])


def fill(template: str, names: Mapping[str, str]) -> str:
    """Put remembered texts in their places; the names have been checked."""
    return _TOKEN.sub(lambda token: names[token[1]] if token[1] else token[0], template)


def natural_order(path: str) -> tuple[tuple[str | int, ...], str]:
    """A sort key that puts 2 before 10, the same on every machine."""
    pieces = re.split(r"([0-9]+)", path)
    return tuple(int(piece) if index % 2 else piece for index, piece in enumerate(pieces)), path


def find_files(root: Path, pattern: str, known: Mapping[str, str] | None = None) -> list[Match]:
    """Every file below `root` that a pattern describes, in natural order; known: names that are already texts.

    Raises SuiteError if a folder cannot be listed.
    """
    try:
        found = list(_expand(root, "", pattern.split("/"), dict(known or {})))
    except OSError as error:
        raise SuiteError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions") from error
    return sorted(found, key=lambda match: natural_order(match.path))


def find_lists(root: Path, patterns: Sequence[str]) -> list[Match]:
    """The files of all patterns. Raises AbsentError if one of them has none, SuiteError as `find_files`."""
    found = []
    for pattern in patterns:
        matches = find_files(root, pattern)
        if not matches:
            raise AbsentError(f"{root / pattern}: no such file; check the folder, or its name in the entry")
        found += matches
    return found


def _expand(folder: Path, prefix: str, segments: list[str], names: dict[str, str]) -> Iterator[Match]:
    head, rest = segments[0], segments[1:]
    if head == "**":
        yield from _expand(folder, prefix, rest, names)
        for child in _folders(folder):
            yield from _expand(child, f"{prefix}{child.name}/", segments, names)
        return
    for child, found in _matching(folder, head, names):
        if rest and child.is_dir():
            yield from _expand(child, f"{prefix}{child.name}/", rest, found)
        elif not rest and child.is_file():
            yield Match(prefix + child.name, found)


def _matching(folder: Path, segment: str, names: dict[str, str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """The entries of a folder that one segment describes. Only segments with something open list the folder."""
    if not (_TOKEN.search(segment) and ("*" in segment or names_in(segment) - set(names))):
        yield folder / fill(segment, names), names
        return
    expression = _segment_expression(segment, names)
    for child in _children(folder):
        match = expression.fullmatch(child.name)
        if match:
            yield Path(child.path), {**names, **match.groupdict()}


def _segment_expression(segment: str, names: Mapping[str, str]) -> re.Pattern[str]:
    parts, position, seen = [], 0, set()
    for token in _TOKEN.finditer(segment):
        parts.append(re.escape(segment[position : token.start()]))
        position = token.end()
        name = token[1]
        if name is None:
            parts.append(".*")
        elif name in names:
            parts.append(re.escape(names[name]))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            text = "[0-9]+" if token[2] else ".+" if segment[position : position + 1] == "." else ".+?"
            parts.append(f"(?P<{name}>{text})")
            seen.add(name)
    return re.compile("".join(parts) + re.escape(segment[position:]), re.IGNORECASE | re.DOTALL)


def _folders(folder: Path) -> Iterator[Path]:
    for child in _children(folder):
        # A link to a folder above would be walked for ever.
        loops = child.is_symlink() and folder.resolve().is_relative_to(Path(child.path).resolve())
        if child.is_dir() and not loops:
            yield Path(child.path)


def _children(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, but for hidden files; nothing if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
