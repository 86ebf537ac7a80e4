"""One call of the vision encoder for the tiles of several pictures that are judged at once.

The first picture that comes leads: it waits for others, makes one call for all, and each takes its own rows. Whatever
goes wrong with a joint call, every picture of it is tried alone, so only the one that cannot be judged fails.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.runtime.backends import OpenStage, Tensors
from defaker_opt.runtime.session import Session

# The one stage whose graph takes any number of tiles; the others have a batch of one.
JOINED = "vision_encoder"

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Company:
    """wait_ms: the longest that a picture waits for others. pictures: how many can come, so that nobody waits when all
    are there. tiles: the most that one call takes; a picture with as many or more goes alone, and at once.
    """

    wait_ms: float
    pictures: int
    tiles: int


@dataclass
class _Batch:
    """Calls that are made as one. results: for each call, once that has gone well; none after a failure."""

    calls: list[tuple[Tensors, tuple[str, ...]]] = field(default_factory=list)
    results: list[Outputs] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def rows(self) -> int:
        return sum(_rows(tensors) for tensors, _ in self.calls)


class Meeting:
    """Where calls of one stage, by several threads, meet. Inputs and outputs have a row a tile as their first axis."""

    def __init__(self, company: Company, changed: threading.Condition | None = None) -> None:
        self._company = company
        self._changed = changed or threading.Condition()
        # Takes more calls; None if the next one begins another.
        self._gathering: _Batch | None = None

    def call(self, opened: OpenStage, tensors: Tensors, outputs: tuple[str, ...]) -> Outputs:
        """See `OpenStage`: as `opened` would answer, but maybe together with others. Any thread may call."""
        batch, place = self._join(tensors, outputs)
        if place:
            batch.done.wait()
        else:
            self._lead(batch, opened)
        return batch.results[place] if batch.results else opened(tensors, outputs)

    def _join(self, tensors: Tensors, outputs: tuple[str, ...]) -> tuple[_Batch, int]:
        """The batch that a call belongs to, and its place there; the first one leads."""
        with self._changed:
            batch = self._gathering
            if batch is None or batch.rows() + _rows(tensors) > self._company.tiles:
                batch = _Batch()
            batch.calls.append((tensors, outputs))
            full = len(batch.calls) == self._company.pictures or batch.rows() >= self._company.tiles
            if not full:
                self._gathering = batch  # and one that had no room for this call goes
            elif self._gathering is batch:
                self._gathering = None
            self._changed.notify_all()
            return batch, len(batch.calls) - 1

    def _lead(self, batch: _Batch, opened: OpenStage) -> None:
        """Wait for others, and run the batch if somebody came. However this ends, nobody waits for it any more."""
        try:
            self._wait(batch)
            if len(batch.calls) > 1:
                # Nothing is lost: each is then tried alone, and raises what concerns it.
                with contextlib.suppress(Exception):
                    batch.results = _run_as_one(opened, batch.calls)
        finally:
            batch.done.set()

    def _wait(self, batch: _Batch) -> None:
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._gathering is not batch, self._company.wait_ms / 1e3)
            finally:
                if self._gathering is batch:
                    self._gathering = None


def _rows(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _run_as_one(opened: OpenStage, calls: Sequence[tuple[Tensors, tuple[str, ...]]]) -> list[Outputs]:
    """The results of each call, which are rows of one call's."""
    joint = {name: np.concatenate([tensors[name] for tensors, _ in calls]) for name in calls[0][0]}
    whole = opened(joint, tuple(dict.fromkeys(name for _, outputs in calls for name in outputs)))
    ends = list(itertools.accumulate(_rows(tensors) for tensors, _ in calls))
    return [
        {name: whole[name][start:end] for name in outputs} for (_, outputs), start, end in zip(calls, [0, *ends], ends)
    ]


@dataclass
class BatchingSession(Session):
    """A session whose pictures, judged by several threads, share calls of the vision encoder."""

    meeting: Meeting = field(kw_only=True)

    def open_stage(self, stage: str) -> OpenStage:
        """See `Session`."""
        opened = super().open_stage(stage)
        return functools.partial(self.meeting.call, opened) if stage == JOINED else opened
