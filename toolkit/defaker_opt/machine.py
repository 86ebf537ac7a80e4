"""What the machine at hand is: processor, memory, disk, GPU, and the versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Instructions that decide how fast products of 8-bit or 16-bit numbers are, as Linux names them.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
_PACKAGES = (
    *(
        "numpy",
        "pillow",
        "onnxruntime",
        "onnxruntime-gpu",
        "openvino",
        "tensorrt",
        "torch",
        "transformers",
        "onnx",
        "onnx-ir",
    ),
    *("onnxscript", "safetensors", "pyyaml", "scipy", "ray"),
)
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")

# Runs a command and returns what it prints; None if it is not there or fails.
Ask = Callable[[tuple[str, ...]], "str | None"]


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: 0 where the driver does not say. compute: SM version such as "8.7"."""

    name: str
    memory_bytes: int
    driver: str
    compute: str


@dataclass(frozen=True)
class Machine:
    """cores: that this process may use. instructions: those of interest that the processor has.

    jetson: the board's name, or ""; jetpack: the release of its Linux; power_mode: what nvpmodel says. versions: of the
    packages that are installed. providers: onnxruntime's, in its order.
    """

    system: str
    architecture: str
    processor: str
    cores: int
    instructions: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    gpus: tuple[Gpu, ...]
    jetson: str
    jetpack: str
    power_mode: str
    python: str
    versions: Mapping[str, str]
    providers: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """What two machines must share for their milliseconds to be compared."""
        gpus = " + ".join(gpu.name for gpu in self.gpus)
        return ", ".join(filter(None, (self.jetson or self.processor, f"{self.cores} cores", gpus, self.power_mode)))


def ask_command(command: tuple[str, ...]) -> str | None:
    """Run a tool of the system for at most ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 - fixed
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_machine(folder: Path = Path(), root: Path = Path("/"), ask: Ask = ask_command) -> Machine:
    """Look at this machine; `folder` is where disk space is wanted. `root` holds proc, sys and etc."""
    memory = _memory(root)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=_processor(root),
        cores=available_cores(),
        instructions=_instructions(root),
        memory_bytes=memory.get("MemTotal", 0),
        free_memory_bytes=memory.get("MemAvailable", 0),
        free_disk_bytes=shutil.disk_usage(folder).free,
        gpus=_gpus(ask),
        jetson=_text(root / "proc/device-tree/model") if (root / "etc/nv_tegra_release").exists() else "",
        jetpack=_tegra_release(root),
        power_mode=_power_mode(ask),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        providers=_providers(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _memory(root: Path) -> dict[str, int]:
    rows = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in rows}


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that could be had now; on a Jetson the GPU takes from the same."""
    return _memory(root).get("MemAvailable", 0)


def large_programs(root: Path = Path("/"), share: float = 0.1) -> list[tuple[int, str, int]]:
    """Other processes that hold more than a share of the memory: number, name and bytes, the largest first."""
    limit, found = share * _memory(root).get("MemTotal", 0), []
    for folder in (root / "proc").glob("[0-9]*"):
        status = dict(re.findall(r"^(\w+):\s+(.+)$", _text(folder / "status"), re.MULTILINE))
        size = int(status.get("VmRSS", "0").split()[0]) * 1024
        if size > limit and int(folder.name) != os.getpid():
            found.append((int(folder.name), status.get("Name", "?"), size))
    return sorted(found, key=lambda each: -each[2])


def _processor(root: Path) -> str:
    found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _instructions(root: Path) -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    have = set(found[1].split()) if found else set()
    return tuple(name for name in _INSTRUCTIONS if name in have)


def _gpus(ask: Ask) -> tuple[Gpu, ...]:
    gpus = []
    for line in (ask(_QUERY) or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            gpus.append(Gpu(cells[0], int(cells[1]) << 20 if cells[1].isdigit() else 0, cells[2], cells[3]))
    return tuple(gpus)


def _tegra_release(root: Path) -> str:
    found = re.search(r"R(\d+).*?REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return f"L4T {found[1]}.{found[2]}" if found else ""


def _power_mode(ask: Ask) -> str:
    found = re.search(r"NV Power Mode:\s*(\S+)", ask(("nvpmodel", "-q")) or "")
    return found[1] if found else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> tuple[str, ...]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())
