"""What runs on the other machine, sent there as text: plain Python 3.8, nothing installed.

Standard input carries an archive and then stays open. When it closes, however the connection ended, whatever was
started is ended and everything that was copied is removed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

NEEDED = ("numpy", "PIL", "rich", "typer", "onnxruntime")
PREFIX = "defaker-profile-"
_BEGIN = "begin"


def facts() -> dict[str, Any]:
    """What decides whether a profile can run here."""
    memory = 0
    try:
        with open("/proc/meminfo") as lines:
            memory = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        memory = 0
    return {
        "architecture": platform.machine(),
        "python": list(sys.version_info[:3]),
        "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
        "free_disk_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "free_memory_bytes": memory,
        "jetson": Path("/etc/nv_tegra_release").exists(),
    }


def say(data: dict[str, Any]) -> None:
    """One JSON object a line on standard output."""
    sys.stdout.buffer.write(json.dumps(data).encode() + b"\n")
    sys.stdout.buffer.flush()


def watch(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole group when standard input closes."""
    while sys.stdin.buffer.read(1):
        pass
    end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def work(folder: str) -> None:
    """Unpack, run, and send the report back."""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        archive.extractall(folder)  # noqa: S202 - our own, over a connection that is the user's
    with (Path(folder) / "arguments.json").open() as stream:
        arguments = json.load(stream)
    command = [sys.executable, "-m", "defaker_opt", "profile", *arguments, "--report", "report"]
    environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "code"), "COLUMNS": "150"}
    child = subprocess.Popen(  # noqa: S603 - our own
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    threading.Thread(target=watch, args=(child,), daemon=True).start()
    try:
        code = child.wait()
    finally:
        end(child)
    say({"code": code})
    if code == 0:
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
            archive.add(Path(folder) / "report", "report")
        sys.stdout.buffer.flush()


def main() -> None:
    """Say what this machine is; work once told to begin."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(1))
    say(facts())
    if sys.stdin.buffer.readline().decode().strip() != _BEGIN:
        return
    folder = tempfile.mkdtemp(prefix=PREFIX)
    try:
        work(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
