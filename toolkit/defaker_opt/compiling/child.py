"""Start the process that builds an engine, and hear how far it is."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from defaker_opt.compiling import Built, EngineJob
from defaker_opt.errors import BuildError
from defaker_opt.progress import Progress

_LAST_LINES = 5


def build_engine(job: EngineJob, progress: Progress) -> Built:
    """Carry out a job in a process of its own. Raises BuildError if that dies, as it does when memory runs out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job.as_json()), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+", encoding="utf-8") as said:
            command = [sys.executable, "-m", "defaker_opt.compiling.builder", str(path)]
            with subprocess.Popen(  # noqa: S603 - our own
                command, stdout=subprocess.PIPE, stderr=said, text=True
            ) as process:
                last = _listen(process, progress)
            # What ends badly after its answer, in TensorRT's own farewell, has given it.
            if "refused" not in last:
                said.seek(0)
                raise BuildError(_death(job, process.returncode, said.read()))
    return Built(last["bytes"], last["seconds"], last["tensorrt"], tuple(last["refused"]))


def _listen(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """The last object that it prints; told of the others as they come. An interrupt ends it too."""
    last: dict[str, Any] = {}
    heard = False
    assert process.stdout is not None
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # TensorRT may print, too
                last = json.loads(line) if line.startswith("{") else last
            if "share" in last:
                progress(str(last["step"]), min(1.0, float(last["share"])))
        heard = True
    finally:
        if not heard:
            process.kill()
    return last


def _death(job: EngineJob, code: int, said: str) -> str:
    killed = code == -signal.SIGKILL
    words = "\n  ".join(said.strip().splitlines()[-_LAST_LINES:])
    advice = (
        "it was killed, as happens when memory runs out: close other programs, or give a smaller --workspace-mb"
        if killed
        else f"the builder ended with code {code}:\n  {words}"
    )
    return f"{job.graph}: no engine was built; {advice}"
