"""Ray: a cluster of its own on this machine, or the one that RAY_ADDRESS names.

Pictures travel with their tasks; the build's folder must be at the same place on every machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from defaker_opt.drift.engines import Numbered, Outcome, thread_limits
from defaker_opt.drift.judge import judge_task
from defaker_opt.errors import BuildError, DefakerError
from defaker_opt.runtime.build import Build, open_build
from defaker_opt.runtime.session import open_session


class Worker:
    """Lives on the cluster with a build that it opened and verified itself."""

    def __init__(self, build: Build, threads: int) -> None:
        found = open_build(build.folder)
        if found.digest != build.digest:
            raise BuildError(f"{build.folder}: another build on this machine of the cluster; copy the build there")
        self.session = open_session(found, threads)

    def judge(self, numbered: Numbered) -> Outcome:
        """One task."""
        number, task = numbered
        return number, judge_task(self.session, task)


def judge_tasks(build: Build, workers: int, threads: int, tasks: Iterator[Numbered]) -> Iterator[Outcome]:
    """See `Engine`. Raises DefakerError if ray is not installed, or a worker cannot start or dies."""
    upcoming = next(tasks, None)
    if upcoming is None:
        return
    with _cluster(workers * threads) as ray:
        remote = ray.remote(Worker).options(num_cpus=threads, runtime_env={"env_vars": dict(thread_limits(threads))})
        idle = [remote.remote(build, threads) for _ in range(workers)]
        busy: dict[Any, Any] = {}
        while upcoming or busy:
            while upcoming and idle:
                worker = idle.pop()
                busy[worker.judge.remote(upcoming)] = worker
                upcoming = next(tasks, None)
            [done], _ = ray.wait(list(busy), num_returns=1)
            idle.append(busy.pop(done))
            try:
                outcome: Outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                raise DefakerError(
                    f"ray: a worker failed ({_last_line(error)}); run again, what is judged is kept"
                ) from error
            yield outcome


@contextlib.contextmanager
def _cluster(cpus: int) -> Iterator[Any]:
    # Set before the import: ray reports usage unless this says no.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise DefakerError("--engine ray needs ray; install it with: pip install 'defaker-opt[ray]'") from error
    address = os.environ.get("RAY_ADDRESS", "")
    own: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
    try:
        yield ray
    finally:
        ray.shutdown()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
