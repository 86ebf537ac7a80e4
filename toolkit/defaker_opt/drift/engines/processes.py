"""Worker processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

from defaker_opt.drift.engines import Numbered, Outcome, thread_limits
from defaker_opt.drift.judge import judge_task
from defaker_opt.errors import DefakerError
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.session import open_session


def judge_tasks(build: Build, workers: int, threads: int, tasks: Iterator[Numbered]) -> Iterator[Outcome]:
    """See `Engine`. Raises DefakerError if a worker is killed, naming the picture it had."""
    upcoming = next(tasks, None)
    if upcoming is None:
        return
    crew = dict(_start(build, threads) for _ in range(workers))
    idle, busy = list(crew), dict[Connection, str]()
    try:
        while upcoming or busy:
            while upcoming and idle:
                ours = idle.pop()
                busy[ours] = upcoming[1].key
                _send(ours, upcoming, crew[ours])
                upcoming = next(tasks, None)
            for ready in wait(list(busy)):
                ours = cast("Connection", ready)
                outcome = _receive(ours, crew[ours], busy.pop(ours))
                idle.append(ours)
                yield outcome
    finally:
        # A worker leaves nothing behind, so one that is at work need not be waited for.
        for ours, worker in crew.items():
            ours.close()
            worker.terminate()
            worker.join()


def _start(build: Build, threads: int) -> tuple[Connection, SpawnProcess]:
    # A forked child of a process with a backend's threads may hang, so workers start afresh.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, build, threads), daemon=True)
    with _environment(thread_limits(threads)):
        worker.start()
    theirs.close()
    return ours, worker


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(tasks: Connection, build: Build, threads: int) -> None:
    """Judge until there is nobody to judge for: the pipe also ends when the process at its other end is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only the one that leads decides
    session = open_session(build, threads)
    try:
        while True:
            number, task = tasks.recv()
            tasks.send((number, judge_task(session, task)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _send(ours: Connection, numbered: Numbered, worker: SpawnProcess) -> None:
    try:
        ours.send(numbered)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _ended(worker, numbered[1].key) from error


def _receive(ours: Connection, worker: SpawnProcess, key: str) -> Outcome:
    try:
        outcome: Outcome = ours.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _ended(worker, key) from error
    return outcome


def _ended(worker: SpawnProcess, key: str) -> DefakerError:
    worker.join()
    return DefakerError(
        f"{key}: the process that judged it ended with code {worker.exitcode} (-9: killed, often for lack of memory); "
        "run again with fewer --workers, what is judged is kept"
    )
