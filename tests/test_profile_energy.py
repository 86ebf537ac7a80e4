"""Meters of machines that are only file trees, and what is said where there is none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from defaker_opt.profiles.energy import (
    Rapl,
    Sampled,
    find_meter,
    ina3221_rails,
    measure_energy,
    nvidia_watts,
    rapl_zones,
    read_temperature,
    wait_for_steady_heat,
)
from defaker_opt.profiles.tegrastats import Tegrastats, tegrastats_watts, tells_power
from tests.machines import write_tree

NO_COMMANDS = "/nonexistent"
NOTHING = lambda command: None  # noqa: E731
LINE = (
    "11-21-2026 14:00:01 RAM 3021/7620MB (lfb 4x4MB) CPU [12%@1510,8%@1510] GR3D_FREQ 61% tj@52.5C "
    "VDD_IN 7542mW/6120mW VDD_CPU_GPU_CV 2871mW/1800mW VDD_SOC 1420mW/1401mW"
)


def write_rapl(root: Path, package: int, counter: int, largest: int = 262143328850) -> Path:
    files = {"energy_uj": f"{counter}\n", "max_energy_range_uj": f"{largest}\n", "name": f"package-{package}\n"}
    write_tree(root, {f"sys/class/powercap/intel-rapl:{package}/{name}": text for name, text in files.items()})
    return root


def write_ina(root: Path) -> Path:
    rails = {1: ("VDD_IN", 5000, 1500), 2: ("VDD_CPU_GPU_CV", 5000, 600), 3: ("VDD_SOC", 5000, 300)}
    files = {"name": "ina3221\n"}
    for number, (label, millivolts, milliamperes) in rails.items():
        files |= {f"in{number}_label": f"{label}\n", f"in{number}_input": f"{millivolts}\n"}
        files[f"curr{number}_input"] = f"{milliamperes}\n"
    write_tree(root, {f"sys/class/hwmon/hwmon1/{name}": text for name, text in files.items()})
    return write_tree(root, {"sys/class/hwmon/hwmon0/name": "cpu_thermal\n"})


def test_rapl_adds_up_packages(tmp_path: Path) -> None:
    write_rapl(write_rapl(tmp_path, 0, 1_000_000), 1, 5_000_000)
    meter = find_meter(tmp_path, NOTHING, NO_COMMANDS)
    assert isinstance(meter, Rapl)
    assert "2 packages" in meter.name
    meter.start()
    write_rapl(write_rapl(tmp_path, 0, 3_500_000), 1, 5_500_000)
    assert meter.stop() == pytest.approx(3.0)


def test_a_counter_that_wrapped_around_goes_on(tmp_path: Path) -> None:
    write_rapl(tmp_path, 0, 9_000_000, largest=10_000_000)
    meter = Rapl(rapl_zones(tmp_path))
    meter.start()
    write_rapl(tmp_path, 0, 500_000, largest=10_000_000)
    assert meter.stop() == pytest.approx(1.5)


def test_parts_of_a_package_are_not_counted_again(tmp_path: Path) -> None:
    write_rapl(tmp_path, 0, 1)
    write_tree(tmp_path, {"sys/class/powercap/intel-rapl:0:0/energy_uj": "1\n"})
    assert len(rapl_zones(tmp_path)) == 1


def test_a_counter_without_its_range_is_no_meter(tmp_path: Path) -> None:
    write_tree(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "1\n"})
    assert rapl_zones(tmp_path) == []


def test_a_jetson_tells_its_rails(tmp_path: Path) -> None:
    rails = ina3221_rails(write_ina(tmp_path))
    assert list(rails) == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    meter = find_meter(tmp_path, NOTHING, NO_COMMANDS)
    assert isinstance(meter, Sampled)
    assert meter.name == "INA3221, VDD_IN"
    assert meter.watts() == pytest.approx(7.5)


def write_tegrastats(folder: Path, line: str) -> str:
    """A command of that name that prints a line every 20 ms, and one that ends at once if there is none."""
    command = folder / "tegrastats"
    command.write_text(f"#!/bin/sh\nwhile [ -n '{line}' ]; do echo '{line}'; sleep 0.02; done\n")
    command.chmod(0o755)
    return str(folder)


def test_tegrastats_counts_where_rails_cannot_be_read(tmp_path: Path) -> None:
    meter = find_meter(tmp_path, NOTHING, write_tegrastats(tmp_path, LINE))
    assert isinstance(meter, Tegrastats)
    meter.start()
    while meter.watts == 0:
        time.sleep(0.01)
    assert meter.stop() > 0
    assert meter.process.poll() is not None


def test_a_tegrastats_that_ends_early_has_measured_nothing(tmp_path: Path) -> None:
    command = tmp_path / "tegrastats"
    command.write_text(f"#!/bin/sh\necho '{LINE}'\n")
    command.chmod(0o755)
    meter = Tegrastats(str(command))
    meter.start()
    meter.process.wait()
    assert meter.stop() == 0
    assert not tells_power(str(tmp_path / "missing"))


def test_joules_of_lines_are_their_mean_power_times_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("defaker_opt.profiles.tegrastats.time.perf_counter", lambda: next(now))
    meter = Tegrastats("unused")
    meter.joules, meter.watts, meter.last = 0.0, 0.0, next(now)
    for watts in (5.0, 9.0):
        meter._count(watts)
    assert meter.joules == 2 * 5.0 + 1 * 7.0


@pytest.mark.parametrize("line", ["RAM 3021/7620MB", ""])
def test_a_tegrastats_without_power_is_no_meter(line: str, tmp_path: Path) -> None:
    assert isinstance(find_meter(tmp_path, NOTHING, write_tegrastats(tmp_path, line)), str)


def test_lines_of_tegrastats() -> None:
    assert tegrastats_watts(LINE) == pytest.approx(7.542)
    assert tegrastats_watts("VDD_GPU 1000mW/900mW VDDRQ 500mW/400mW") == pytest.approx(1.5)
    assert tegrastats_watts("RAM 3021/7620MB") is None


@pytest.mark.parametrize(
    ("told", "watts"),
    [("71.25\n", 71.25), ("70.0\n30.5\n", 100.5), ("[N/A]\n", None), ("70.0\n[N/A]\n", None), ("", None), (None, None)],
)
def test_what_the_driver_says(told: str | None, watts: float | None) -> None:
    assert nvidia_watts(lambda command: told) == watts


def test_no_meter_is_never_zero(tmp_path: Path) -> None:
    meter = find_meter(tmp_path, NOTHING, NO_COMMANDS)
    assert isinstance(meter, str)
    energy = measure_energy(meter, lambda: None, 0.01, 0.01)
    assert not energy.measured
    assert energy.joules_per_image is None
    assert energy.watts is None
    assert energy.meter.startswith("not measured")


def test_a_meter_that_stands_still_is_no_meter(tmp_path: Path) -> None:
    meter = find_meter(write_rapl(tmp_path, 0, 7), NOTHING)
    energy = measure_energy(meter, lambda: None, 0.01, 0.01)
    assert not energy.measured
    assert "did not move" in energy.meter


def test_joules_are_shared_among_images() -> None:
    class Fixed:
        name = "fixed"

        def start(self) -> None: ...

        def stop(self) -> float:
            return 10.0

    energy = measure_energy(Fixed(), lambda: None, 0.001, 0.001)
    assert energy.measured
    assert energy.joules_per_image == pytest.approx(10.0 / energy.images)


def test_a_sampled_meter_adds_up_power() -> None:
    import time

    meter = Sampled("constant", lambda: 100.0, seconds=0.005)
    started = time.perf_counter()
    meter.start()
    time.sleep(0.05)
    joules = meter.stop()
    assert 0 < joules <= 100 * (time.perf_counter() - started)
    assert joules >= 100 * 0.04


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    assert read_temperature(tmp_path) is None
    zones = {f"sys/class/thermal/thermal_zone{n}/temp": f"{t}\n" for n, t in enumerate((41500, 52000, 38000))}
    assert read_temperature(write_tree(tmp_path, zones)) == 52.0


def test_work_goes_on_until_the_heat_is_steady() -> None:
    heat, now, worked = iter([40.0, 48.0, 52.0, 52.5, 52.6]), [0.0], []

    def work() -> None:
        now[0] += 5
        worked.append(now[0])

    assert wait_for_steady_heat(lambda: next(heat), work, 600, lambda: now[0])
    assert now[0] == 30
    assert not wait_for_steady_heat(lambda: None, work, 600, lambda: now[0])
    rising = iter(range(0, 1000, 5))
    assert not wait_for_steady_heat(lambda: float(next(rising)), work, 100, lambda: now[0])
