"""Profile on another machine, over the user's own ssh: one connection, and nothing stays there when it ends."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from defaker_opt.catalog import PACKAGE
from defaker_opt.errors import DefakerError
from defaker_opt.profiles import remote_end
from defaker_opt.runtime import Build

_OLDEST = (3, 10)
# The parts of our code that profiling a build takes; detectors, torch and the reference weights stay here.
_CODE = ("cli", "runtime", "profiles", "report")
_PIP_NAMES = {"PIL": "pillow"}
# ssh's own exit code, when there is no connection.
_NO_CONNECTION = 255


@dataclass(frozen=True)
class Host:
    """destination: as ssh takes it. ssh: the command with its options. python: the interpreter on the other machine."""

    destination: str
    ssh: str = "ssh"
    python: str = "python3"

    def command(self) -> list[str]:
        """ssh with a script that is sent along; it never asks for a password, and notices when the line is dead."""
        script = Path(remote_end.__file__).read_text(encoding="utf-8")
        told = f"{shlex.quote(self.python)} -c {shlex.quote(script)}"
        options = ["-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        return [*shlex.split(self.ssh), *options, "--", self.destination, told]


def profile_remotely(
    host: Host, build: Build, compare: Build | None, images: Sequence[Path], arguments: Sequence[str], report: Path
) -> dict[str, Any]:
    """Run `profile` there; its report's files in `report`, and the result as its JSON. Raises DefakerError.

    Progress and tables of the other machine go to standard error.
    """
    with _connected(host) as process:
        assert process.stdin and process.stdout
        facts = _read_line(process, host)
        check_host(host, facts, _bytes(build) + (_bytes(compare) if compare else 0))
        try:
            process.stdin.write(b"begin\n")
            _send(process.stdin, build, compare, images, arguments)
            process.stdin.flush()
        except OSError as error:
            raise DefakerError(f"--remote {host.destination}: the connection broke while copying ({error})") from error
        code = _read_line(process, host)["code"]
        if code != 0:
            raise DefakerError(f"--remote {host.destination}: profile ended with {code} there; its messages are above")
        return _receive(process.stdout, report)


@contextlib.contextmanager
def _connected(host: Host) -> Iterator[subprocess.Popen[bytes]]:
    """An ssh process; leaving it closes its input, upon which the other end removes everything."""
    try:
        command = host.command()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - the user's
    except OSError as error:
        raise DefakerError(
            f"--ssh {host.ssh!r}: cannot be started ({error.strerror}); install OpenSSH's client"
        ) from error
    try:
        yield process
    finally:
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_host(host: Host, facts: Mapping[str, Any], copied: int) -> None:
    """Raise DefakerError with everything that keeps the other machine from profiling."""
    problems = []
    python = tuple(facts["python"])
    if python < _OLDEST:
        found = ".".join(map(str, python))
        problems.append(
            f"Python {found}, but {_OLDEST[0]}.{_OLDEST[1]} or later is needed; name one with --remote-python"
        )
    if facts["missing"]:
        names = " ".join(_PIP_NAMES.get(name, name) for name in facts["missing"])
        problems.append(f"packages are missing; there: {host.python} -m pip install {names}")
    if facts["free_disk_bytes"] < 1.2 * copied:
        free = facts["free_disk_bytes"] / 1e9
        problems.append(f"{free:.1f} GB of disk free for {copied / 1e9:.1f} GB to copy; free some, or set TMPDIR there")
    if 0 < facts["free_memory_bytes"] < 1.2 * copied:
        free = facts["free_memory_bytes"] / 1e9
        problems.append(f"{free:.1f} GB of memory free for {copied / 1e9:.1f} GB of weights; end other programs")
    if problems:
        raise DefakerError(f"--remote {host.destination}: " + "\n  ".join(problems))


def _read_line(process: subprocess.Popen[bytes], host: Host) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    try:
        data: dict[str, Any] = json.loads(line)
    except ValueError:
        code = process.wait() if not line else 0
        if code == _NO_CONNECTION:
            raise DefakerError(
                f"--remote {host.destination}: no connection; does `{host.ssh} {host.destination}` work without "
                "a password?"
            ) from None
        raise DefakerError(
            f"--remote {host.destination}: {host.python} gave no answer there ({line[:80]!r}, exit code {code}); name "
            "another interpreter with --remote-python, and see the messages above"
        ) from None
    return data


def _bytes(build: Build) -> int:
    return sum(path.stat().st_size for path in build.folder.iterdir())


def _send(
    stream: IO[bytes], build: Build, compare: Build | None, images: Sequence[Path], arguments: Sequence[str]
) -> None:
    """One archive with our code, the builds and the pictures."""
    told = [f"build/{build.folder.resolve().name}", *arguments]
    with tarfile.open(fileobj=stream, mode="w|", dereference=True) as archive:
        for path in sorted(PACKAGE.rglob("*.py")):
            inner = path.relative_to(PACKAGE)
            if len(inner.parts) == 1 or inner.parts[0] in _CODE:
                archive.add(path, f"code/defaker_opt/{inner.as_posix()}")
        archive.add(build.folder, told[0])
        if compare:
            told += ["--compare", f"compare/{compare.folder.resolve().name}"]
            archive.add(compare.folder, told[-1])
        for index, path in enumerate(images):
            archive.add(path, f"images/{index:06d}{path.suffix}")
            told += ["--images", "images"] if index == 0 else []
        text = json.dumps(told).encode()
        entry = tarfile.TarInfo("arguments.json")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))


def _receive(stream: IO[bytes], report: Path) -> dict[str, Any]:
    """Keep the two files of a report, whatever else is sent; nothing is unpacked by its own name."""
    from defaker_opt.profiles.write import write_files

    files = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            name = Path(entry.name).name
            content = (
                archive.extractfile(entry) if entry.isfile() and name in ("profile.json", "profile.html") else None
            )
            if content:
                files[name] = content.read().decode("utf-8")
    if len(files) != 2:
        raise DefakerError("--remote: the connection ended before the whole report was here; try again")
    write_files(report, files)
    data: dict[str, Any] = json.loads(files["profile.json"])
    return data
