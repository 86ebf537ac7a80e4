"""`profile --remote` against a real sshd on this machine: it works, refuses, and leaves nothing behind."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from defaker_opt.errors import DefakerError
from defaker_opt.profiles.remote import Host, check_host
from defaker_opt.profiles.remote_end import PREFIX
from tests.conftest import COMMAND, defaker_opt

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh") and shutil.which("ssh-keygen")), reason="no sshd on this machine"
)
GOOD = {"python": [3, 10, 4], "missing": [], "free_disk_bytes": 10**10, "free_memory_bytes": 10**10}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The ssh command that reaches a server of our own, which knows one key."""
    assert SSHD
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    lines = [
        *(
            f"Port {port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {folder}/host",
            f"AuthorizedKeysFile {folder}/authorized",
        ),
        *("StrictModes no", "UsePAM no", "PasswordAuthentication no", f"PidFile {folder}/pid", "PermitRootLogin yes"),
    ]
    (folder / "config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    yield f"ssh -p {port} -i {folder}/user -F none -o IdentitiesOnly=yes {known}"
    server.terminate()
    server.wait()


def left() -> set[str]:
    """Folders that profiles on this machine have not removed."""
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")}


def arguments(ssh: str, build: Path, report: Path, python: str = sys.executable) -> list[object]:
    where = ("--remote", f"{getpass.getuser()}@127.0.0.1", "--ssh", ssh, "--remote-python", python)
    return ["profile", build, "--repeat", "1", *where, "--report", report]


@needs_sshd
def test_a_report_comes_back_and_nothing_stays(ssh: str, int8_build: Path, tmp_path: Path) -> None:
    before = left()
    done = defaker_opt(*arguments(ssh, int8_build, tmp_path / "report"), "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert len(data["samples"]) == 1
    assert data["measured"]["build"]["digest"]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"profile.html", "profile.json"}
    assert left() == before


@needs_sshd
def test_a_connection_that_is_cut_leaves_nothing_running(ssh: str, int8_build: Path, tmp_path: Path) -> None:
    before = left()
    command = [*COMMAND, *map(str, arguments(ssh, int8_build, tmp_path / "report")), "--repeat", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (new := left() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert new, "it never began"
    (folder,) = new
    while not running(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (left() - before or running(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == before
    assert not running(folder)
    assert not (tmp_path / "report").exists()


def running(folder: str) -> list[int]:
    """Processes whose working folder is the one that was copied."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if folder in str((entry / "cwd").readlink()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@needs_sshd
def test_an_interpreter_that_is_not_there_is_named(ssh: str, int8_build: Path, tmp_path: Path) -> None:
    done = defaker_opt(*arguments(ssh, int8_build, tmp_path / "report", python="python9"))
    assert done.returncode == 2
    assert "python9 gave no answer there" in done.stderr
    assert not (tmp_path / "report").exists()


@needs_sshd
def test_no_connection_is_said(int8_build: Path, tmp_path: Path) -> None:
    ssh = f"ssh -p {free_port()} -F none"
    done = defaker_opt(*arguments(ssh, int8_build, tmp_path / "report"))
    assert done.returncode == 2
    assert "no connection; does `ssh -p" in done.stderr


def test_everything_that_a_host_lacks_is_told_at_once() -> None:
    check_host(Host("me@there"), GOOD, 10**9)
    facts = {"python": [3, 8, 1], "missing": ["PIL", "rich"], "free_disk_bytes": 10**8, "free_memory_bytes": 10**8}
    with pytest.raises(DefakerError) as caught:
        check_host(Host("me@there"), facts, 10**9)
    for words in ("Python 3.8.1", "python3 -m pip install pillow rich", "0.1 GB of disk free", "0.1 GB of memory free"):
        assert words in str(caught.value)


def test_a_client_that_is_not_there_is_named(int8_build: Path, tmp_path: Path) -> None:
    done = defaker_opt(*arguments("no-such-ssh", int8_build, tmp_path / "report"))
    assert done.returncode == 2
    assert "--ssh 'no-such-ssh': cannot be started" in done.stderr
