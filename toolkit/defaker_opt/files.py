"""Files that are whole or not there, folders that one process fills, and where to keep what can be made again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from defaker_opt.errors import DefakerError, write_failure
from defaker_opt.runtime.build import json_text

_DIGEST_BYTES = hashlib.sha256().digest_size


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file; it gets its name when that went well. Raises DefakerError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def keep_digested(path: Path, content: bytes, most_bytes: int) -> None:
    """Write a file of a cache, its SHA-256 first. Where there is no room for it, it is done without.

    most_bytes: beyond it the folder's files of this kind (ending) that were not used for longest go.
    """
    with contextlib.suppress(DefakerError), whole_file(path) as partial:
        partial.write_bytes(hashlib.sha256(content).digest() + content)
    with contextlib.suppress(OSError):
        _empty(path.parent, path.suffix, most_bytes)


def read_digested(path: Path) -> bytes | None:
    """What `keep_digested` wrote; None if it is not there, or not every bit is what was written."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, content = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return content


def _empty(folder: Path, suffix: str, most_bytes: int) -> None:
    """Remove what was not used for longest, until the rest is small enough. Others may do so at the same time."""
    files = sorted(((path.stat(), path) for path in folder.glob(f"*{suffix}")), key=lambda each: -each[0].st_mtime)
    total = 0
    for facts, path in files:
        total += facts.st_size
        if total > most_bytes:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(work: Path, busy: DefakerError) -> Iterator[None]:
    """Hold the folder for unfinished work. Raises `busy` if another process does."""
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    with contextlib.ExitStack() as stack:
        while True:
            stream = stack.enter_context(lock.open("w"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise busy from error
            if _is_at(lock, stream):
                break  # otherwise its last holder took it away after it was opened, and another may lock a new one
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_at(path: Path, stream: IO[str]) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def move_folder(new: Path, place: Path) -> None:
    """Give a finished folder its name; what has that name is moved aside first, and removed last."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json_text(data), encoding="utf-8")
    os.replace(partial, path)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def default_cache_folder() -> Path:
    """Where sets of pictures, rows, references, graphs, statistics and sensitivities are kept: DEFAKER_CACHE_DIR, or
    the user's cache folder. Only old statistics and graphs are ever removed. Raises DefakerError if there is neither.
    """
    chosen = os.environ.get("DEFAKER_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defaker-opt"
    except RuntimeError as error:
        raise DefakerError(
            f"no cache folder: {error}; set DEFAKER_CACHE_DIR to a folder that can be written"
        ) from error
