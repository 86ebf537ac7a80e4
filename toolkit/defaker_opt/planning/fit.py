"""Plan a recipe for a target, and find the nearest one that fits where it does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from defaker_opt.catalog import yaml_names
from defaker_opt.detector import Detector, load_detector, require_prompt
from defaker_opt.device import Device, Fact
from defaker_opt.errors import DefakerError, PassError
from defaker_opt.machine import Machine, read_machine
from defaker_opt.planning.forecast import Forecast, forecast, has_vocabulary
from defaker_opt.recipe import Recipe, load_recipe, pass_name
from defaker_opt.target import Target, load_target

# Cores that the rates of targets for plain CPUs are stated for.
_STATED_CORES = {"x86-vnni": 2, "x86-amx": 2, "x86-avx2": 2, "arm-cpu": 4}


@dataclass(frozen=True)
class Planned:
    """nearest: if the forecast does not fit, the shipped recipe that does and loses least, or ""."""

    source: str
    target: str
    tiles: int
    forecast: Forecast
    nearest: str
    notes: tuple[str, ...]


def plan_recipe(name: str, source: str | None, target: str | None, tiles: int = 0) -> Planned:
    """Forecast one job; nothing is written, and no weight is read. Raises DefakerError as `quantize` would."""
    recipe = load_recipe(name)
    aim = load_target(target or recipe.target)
    detector = load_detector(source or recipe.source)
    require_prompt(detector, source or recipe.source)
    tiling = detector.config.tiling
    most = tiling.max_tiles + (tiling.max_tiles > 1)
    if tiles > most:
        raise DefakerError(f"--tiles {tiles}: this detector cuts at most {most}; give 1 to {most}, or 0 for the most")
    machine = read_machine()
    here = machine_device(machine)
    device = aim.device or here
    try:
        found = forecast(recipe, aim, device, detector, tiles or most, here)
    except PassError as error:
        raise PassError(f"recipe {recipe.name}: {error}") from error
    nearest = "" if found.fits else _nearest(recipe, aim, device, detector, tiles or most, here)
    notes = ["decoding text is not in the forecast of latency"] if has_vocabulary(recipe) else []
    if aim.device is None:
        notes.append(f"target {aim.name} stands for this machine: {machine.fingerprint}")
    if not detector.config.trained:
        notes.append("untrained: the source's weights are drawn at random")
    return Planned(source or recipe.source, aim.name, tiles or most, found, nearest, tuple(notes))


def machine_device(machine: Machine) -> Device:
    """What this machine is as a device: the stated rates of its kind of processor, times its cores; its own memory."""
    kinds = [name for name in _STATED_CORES if _is_such(name, machine)]
    name = kinds[0] if kinds else "x86-avx2"
    device = load_target(name).device
    assert device is not None
    share = machine.cores / _STATED_CORES[name]
    peaks = {
        kind: Fact(fact.value * share, f"{fact.source}; for {machine.cores} cores", "computed")
        for kind, fact in device.peaks.items()
    }
    memory = Fact(machine.memory_bytes / 1e9, "this machine", "measured")
    return dataclasses.replace(device, peaks=peaks, memory=memory)


def _is_such(name: str, machine: Machine) -> bool:
    device = load_target(name).device
    assert device is not None
    return device.architecture == machine.architecture and set(device.instructions) <= set(machine.instructions)


def _nearest(recipe: Recipe, target: Target, device: Device, detector: Detector, tiles: int, here: Device) -> str:
    """Of the shipped recipes that fit, the one whose build is largest: it gives up least."""
    fitting = []
    for name in yaml_names("recipes"):
        other = load_recipe(name)
        if "modelopt" in map(pass_name, other.passes):
            continue  # it wants a whole stage in memory, and a package of its own
        try:
            found = forecast(other, target, device, detector, tiles, here)
        except PassError:
            continue
        if found.fits and other.name != recipe.name:
            fitting.append((found.sizes.total, name))
    return max(fitting)[1] if fitting else ""
