"""A process that has never seen the build: what the first picture costs, and the most memory that judging takes.

python -m defaker_opt.profiles.fresh BUILD IMAGE GATE THREADS prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt.errors import BuildError
from defaker_opt.machine import available_memory

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Fresh:
    """Medians over several processes, milliseconds and bytes.

    to_first_verdict_ms: from starting the process to its first verdict, of which import_ms went into loading code,
    open_ms into verifying the build, load_ms into opening stages. peak_memory_bytes: the most the process held;
    base_memory_bytes of it before the build was opened. system_memory_bytes: by how much the memory that is free in the
    whole system fell, which on a Jetson counts what the GPU took; others' needs are in it, so it is only a bound.
    """

    processes: int
    to_first_verdict_ms: float
    import_ms: float
    open_ms: float
    load_ms: float
    first_image_ms: float
    second_image_ms: float
    base_memory_bytes: float
    peak_memory_bytes: float
    system_memory_bytes: float


def measure_fresh(build: Path, image: Path, gate: float, threads: int, processes: int) -> Fresh:
    """Run so many new processes, one after the other. Raises BuildError if one fails."""
    rows = [_run_one(build, image, gate, threads) for _ in range(processes)]
    return Fresh(processes, **{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def _run_one(build: Path, image: Path, gate: float, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, str(build), str(image), str(gate), str(threads)]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError(f"{build}: a new process that judges a picture ended with {done.returncode}: {last[0]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"to_first_verdict_ms": (row.pop("first_verdict_at") - started) * 1e3, **row}


class _SystemMemory:
    """Watches how little memory is free in the system while a process works."""

    def __init__(self) -> None:
        self.before = self.least = available_memory()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(_SAMPLE_SECONDS):
            self.least = min(self.least, available_memory())

    def taken(self) -> int:
        self.done.set()
        self.thread.join()
        return max(0, self.before - self.least)


def _status(name: str) -> int:
    """A size in this process's status, in bytes; 0 where the system has no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def main(build: str, image: str, gate: float, threads: int) -> dict[str, float]:
    """Judge one picture twice, and say what it took."""
    started = time.perf_counter()
    from defaker_opt.runtime import open_build, open_session
    from defaker_opt.runtime.backends import find_backend
    from defaker_opt.runtime.engines import backend_of
    from defaker_opt.runtime.images import load_image

    picture = load_image(image)
    imported = time.perf_counter()
    opened = open_build(build)
    find_backend(backend_of(opened))
    verified = time.perf_counter()
    base, memory = _status("VmRSS"), _SystemMemory()
    session = open_session(opened, threads)
    first = session.judge(picture, gate)
    first_verdict_at = time.time()
    second = session.judge(picture, gate)
    return {
        "first_verdict_at": first_verdict_at,
        "import_ms": (imported - started) * 1e3,
        "open_ms": (verified - imported) * 1e3,
        "load_ms": first.latency_ms.get("load", 0.0),
        "first_image_ms": first.latency_ms["total"],
        "second_image_ms": second.latency_ms["total"],
        "base_memory_bytes": base,
        "peak_memory_bytes": _status("VmHWM"),
        "system_memory_bytes": memory.taken(),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
