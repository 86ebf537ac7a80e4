"""One process fills a folder at a time, also where the lock's file goes away between opening and locking it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from defaker_opt import files
from defaker_opt.errors import DefakerError
from defaker_opt.files import held

BUSY = DefakerError("another process is at work here")


def _before_the_first_lock(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """What another process does after this one opened the file."""
    flock, calls = fcntl.flock, []

    def locked(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            happens()
        flock(*given)

    monkeypatch.setattr(files.fcntl, "flock", locked)


def test_a_folder_is_held_once_and_left_without_a_trace(tmp_path: Path) -> None:
    work = tmp_path / "new" / "work"
    with held(work, BUSY), pytest.raises(DefakerError, match="another process"), held(work, BUSY):
        pass
    with held(work, BUSY):
        pass
    assert not list(work.parent.iterdir())


def test_a_lock_that_went_away_while_it_was_opened_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    _before_the_first_lock(monkeypatch, (tmp_path / "work.lock").unlink)
    with held(work, BUSY), pytest.raises(DefakerError, match="another process"), held(work, BUSY):
        pass


def test_whoever_locked_the_new_file_first_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, lock = tmp_path / "work", tmp_path / "work.lock"
    rivals = []

    def overtaken() -> None:
        lock.unlink()
        rivals.append(lock.open("w"))
        fcntl.flock(rivals[0], fcntl.LOCK_EX)

    _before_the_first_lock(monkeypatch, overtaken)
    with pytest.raises(DefakerError, match="another process"), held(work, BUSY):
        pass
    assert lock.exists()
    rivals[0].close()
