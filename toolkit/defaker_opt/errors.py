"""What can go wrong because of the user's input, and the exit code each ends with.

    DefakerError            exit 2; the message is shown alone, without a traceback
    ├── ConfigError         a YAML or JSON file: every problem of that file at once
    ├── SourceError         a checkpoint or detector folder
    ├── PassError           a pass that cannot do what the recipe asks
    ├── BuildError          a build folder: missing, damaged, or not finished
    ├── ImageError          one picture
    └── SuiteError          a benchmark: its list of pictures, one of them, its masks
        └── AbsentError     nothing of it is there

A message names the place, the value, the allowed values and the next step. Our own mistakes are assertions.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from pathlib import Path

EXIT_OK = 0
EXIT_LIMIT_BROKEN = 1
EXIT_USER_ERROR = 2
EXIT_UNDECIDED = 3
EXIT_INTERRUPTED = 130


class DefakerError(Exception):
    """A mistake in the user's input; the message says where and what to do next."""


class ConfigError(DefakerError):
    """All problems of one file. `problems` holds one line each, without the file name."""

    def __init__(self, file: Path | str, problems: Sequence[str]) -> None:
        self.file = file
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{file}:", *self.problems]))


class SourceError(DefakerError):
    """A checkpoint or detector folder that cannot be used."""


class PassError(DefakerError):
    """A pass that cannot do what the recipe asks of it."""


class BuildError(DefakerError):
    """A build folder that is missing, damaged, unfinished, or in the way."""


class ImageError(DefakerError):
    """A picture that cannot be judged."""


class SuiteError(DefakerError):
    """A benchmark that cannot be used, or one picture or mask of it."""


class AbsentError(SuiteError):
    """A benchmark of which nothing is there."""


def one_of(value: object, allowed: Iterable[str]) -> str:
    """Say that `value` is none of `allowed`, with the nearest spelling where there is one."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{value!r} is not one of {', '.join(names) or 'nothing'}{hint}"


def write_failure(path: Path, error: OSError) -> DefakerError:
    """Turn a failed write into a message that says what to do about it."""
    # numpy reports a short write without an error number.
    short = error.errno is None and "written" in str(error)
    if short or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DefakerError(f"{path}: no space left to write it; free some or choose another output folder")
    return DefakerError(f"{path}: cannot be written ({error.strerror or error}); choose another output folder")
