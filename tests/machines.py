"""Fabricated file trees of machines that are not at hand."""

from __future__ import annotations

from pathlib import Path

ORIN_CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp\n"
)
OLD_CPUINFO = "model name\t: Old Processor @ 2.50GHz\nflags\t\t: fpu sse2 avx avx2 fma f16c\n"
MEMINFO = "MemTotal:        7851544 kB\nMemFree:          512000 kB\nMemAvailable:    5242880 kB\n"
TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def write_orin(root: Path) -> Path:
    return write_tree(
        root,
        {
            "proc/cpuinfo": ORIN_CPUINFO,
            "proc/meminfo": MEMINFO,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "etc/nv_tegra_release": TEGRA,
        },
    )
