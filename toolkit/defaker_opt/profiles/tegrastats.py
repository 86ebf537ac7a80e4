"""Power as JetPack's tegrastats tells it, line by line."""

from __future__ import annotations

import re
import subprocess
import threading
import time

_INTERVAL_MS = 100
_FIRST_LINE_SECONDS = 3.0


class Tegrastats:
    """A meter: the command runs beside the pictures; from line to line the mean of both powers counts.

    A command that ends too early has measured nothing.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.name = "tegrastats, VDD_IN or the sum of rails"

    def start(self) -> None:
        """See `Meter`."""
        self.joules, self.watts, self.last = 0.0, 0.0, time.perf_counter()
        self.process = _run(self.command)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._count(tegrastats_watts(line))

    def _count(self, watts: float | None) -> None:
        if watts is not None:
            now = time.perf_counter()
            # The first line stands for the time before it too.
            self.joules += (now - self.last) * (watts + (self.watts or watts)) / 2
            self.watts, self.last = watts, now

    def stop(self) -> float:
        """See `Meter`."""
        ended_early = self.process.poll() is not None
        self.process.terminate()
        self.thread.join()
        _end(self.process)
        self._count(self.watts or None)
        return 0.0 if ended_early else self.joules


def tells_power(command: str) -> bool:
    """Whether its lines name a rail; some modules have none, and then it prints memory and clocks only."""
    try:
        process = _run(command)
    except OSError:
        return False
    killer = threading.Timer(_FIRST_LINE_SECONDS, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        return tegrastats_watts(process.stdout.readline()) is not None
    finally:
        killer.cancel()
        process.kill()
        _end(process)


def tegrastats_watts(line: str) -> float | None:
    """The power of the moment in a line: VDD_IN, else the sum of all rails; None if it names none."""
    rails = {name: float(value) / 1e3 for name, value in re.findall(r"\b(V\w+) (\d+)mW(?:/\d+mW)?", line)}
    return rails.get("VDD_IN", sum(rails.values())) if rails else None


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def _run(command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - found where commands are
        [command, "--interval", str(_INTERVAL_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
