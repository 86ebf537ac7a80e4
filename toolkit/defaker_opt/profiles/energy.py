"""Joules an image, from whichever meter the machine has; where it has none, that is what is said, never 0."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from defaker_opt.machine import Ask, ask_command
from defaker_opt.profiles.tegrastats import Tegrastats, tells_power

_SAMPLE_SECONDS = 0.1
_POWERCAP = "sys/class/powercap"
_HWMON = "sys/class/hwmon"


@dataclass(frozen=True)
class Energy:
    """meter: what measured, or why nothing could. Joules an image and watts are None where it is not measured.

    idle_watts: before the pictures. temperature: degrees Celsius at the end, where the machine tells.
    """

    meter: str
    measured: bool
    joules_per_image: float | None = None
    watts: float | None = None
    idle_watts: float | None = None
    images: int = 0
    temperature: float | None = None


class Meter(Protocol):
    """Something that says how many joules went by between two calls."""

    name: str

    def start(self) -> None:
        """Begin to count."""
        ...

    def stop(self) -> float:
        """Joules since `start`."""
        ...


class Rapl:
    """Intel's and AMD's own counters of the processor packages, in microjoules, which wrap around."""

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.name = f"RAPL, {len(zones)} package{'s' if len(zones) > 1 else ''}: the processor, without the rest"

    def start(self) -> None:
        """See `Meter`."""
        self.before = [_number(zone / "energy_uj") for zone in self.zones]

    def stop(self) -> float:
        """See `Meter`."""
        total = 0.0
        for zone, before in zip(self.zones, self.before):
            used = _number(zone / "energy_uj") - before
            total += used if used >= 0 else used + _number(zone / "max_energy_range_uj")
        return total / 1e6


class Sampled:
    """A meter that only knows the power of the moment: it is read ten times a second, and added up."""

    def __init__(self, name: str, watts: Callable[[], float], seconds: float = _SAMPLE_SECONDS) -> None:
        self.name, self.watts, self.seconds = name, watts, seconds

    def start(self) -> None:
        """See `Meter`."""
        self.joules, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        last, power = time.perf_counter(), self.watts()
        while not self.done.wait(self.seconds):
            now, next_power = time.perf_counter(), self.watts()
            self.joules += (now - last) * (power + next_power) / 2
            last, power = now, next_power
        self.joules += (time.perf_counter() - last) * power

    def stop(self) -> float:
        """See `Meter`."""
        self.done.set()
        self.thread.join()
        return self.joules


def find_meter(root: Path = Path("/"), ask: Ask = ask_command, path: str | None = None) -> Meter | str:
    """The best meter there is, or why there is none. path: where commands are; the environment's if not given."""
    rails = ina3221_rails(root)
    if rails:
        name, rail = next(
            ((name, rail) for name, rail in rails.items() if name == "VDD_IN"), ("the sum of rails", None)
        )
        chosen = [rail] if rail else list(rails.values())
        return Sampled(f"INA3221, {name}", lambda: sum(map(_rail_watts, chosen)))
    # Where the rails' files may not be read, JetPack's own command may still tell.
    tegrastats = shutil.which("tegrastats", path=path)
    if tegrastats and tells_power(tegrastats):
        return Tegrastats(tegrastats)
    zones = rapl_zones(root)
    if zones:
        return Rapl(zones)
    if nvidia_watts(ask) is not None:
        return Sampled("NVML by nvidia-smi, the GPU alone", lambda: nvidia_watts(ask) or 0.0)
    return (
        "not measured: no readable RAPL (sys/class/powercap), no INA3221 rail, no power from tegrastats, no GPU whose "
        "driver answers"
    )


def rapl_zones(root: Path) -> list[Path]:
    """Packages whose counters may be read; since 2020 Linux lets only root do that."""
    zones = sorted((root / _POWERCAP).glob("intel-rapl:[0-9]")) + sorted(
        (root / _POWERCAP).glob("intel-rapl:[0-9][0-9]")
    )
    return [zone for zone in zones if _readable(zone / "energy_uj") and _readable(zone / "max_energy_range_uj")]


def ina3221_rails(root: Path) -> dict[str, tuple[Path, Path]]:
    """Millivolt and milliampere files of each rail by its label, on Jetsons; VDD_IN is the whole module."""
    rails = {}
    for chip in sorted((root / _HWMON).glob("hwmon*")):
        if not _readable(chip / "name") or (chip / "name").read_text().strip() != "ina3221":
            continue
        for label in sorted(chip.glob("in[0-9]_label")):
            number = re.sub(r"\D", "", label.name)
            volts, amperes = chip / f"in{number}_input", chip / f"curr{number}_input"
            if _readable(volts) and _readable(amperes):
                rails[label.read_text().strip()] = (volts, amperes)
    return rails


def _rail_watts(rail: tuple[Path, Path]) -> float:
    return _number(rail[0]) * _number(rail[1]) / 1e6


def nvidia_watts(ask: Ask) -> float | None:
    """What all GPUs draw now; None where the driver does not say, as on every Jetson."""
    told = ask(("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"))
    values = [line.strip() for line in (told or "").splitlines()]
    numbers = [float(value) for value in values if re.fullmatch(r"\d+(\.\d+)?", value)]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


def read_temperature(root: Path = Path("/")) -> float | None:
    """The hottest thermal zone in degrees Celsius; None where there is none."""
    zones = [zone for zone in (root / "sys/class/thermal").glob("thermal_zone*/temp") if _readable(zone)]
    return max((_number(zone) / 1e3 for zone in zones), default=None)


def wait_for_steady_heat(
    read: Callable[[], float | None], work: Callable[[], object], limit_seconds: float, clock: Callable[[], float]
) -> bool:
    """Keep working until ten seconds changed the temperature by less than a degree; False if the limit came first."""
    begun = mark = clock()
    before = read()
    if before is None:
        return False
    while clock() - begun < limit_seconds:
        work()
        if clock() - mark >= 10:
            now = read()
            if now is not None and abs(now - before) < 1:
                return True
            before, mark = now if now is not None else before, clock()
    return False


def measure_energy(meter: Meter | str, judge: Callable[[], object], seconds: float, idle_seconds: float) -> Energy:
    """Judge pictures for at least `seconds`, after watching the idle machine."""
    if isinstance(meter, str):
        return Energy(meter, measured=False)
    meter.start()
    time.sleep(idle_seconds)
    idle = meter.stop() / idle_seconds
    images, started = 0, time.perf_counter()
    meter.start()
    try:
        while time.perf_counter() - started < seconds:
            judge()
            images += 1
    finally:
        joules, spent = meter.stop(), time.perf_counter() - started
    if joules <= 0:
        return Energy(f"not measured: {meter.name} did not move", measured=False)
    return Energy(meter.name, True, joules / images, joules / spent, idle, images, read_temperature())


def _readable(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return bool(stream.read(1))
    except OSError:
        return False


def _number(path: Path) -> float:
    return float(path.read_text().strip())
