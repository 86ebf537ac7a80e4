"""What can be done on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from defaker_opt import __version__
from defaker_opt.catalog import yaml_names
from defaker_opt.device import Device
from defaker_opt.errors import DefakerError
from defaker_opt.machine import Machine
from defaker_opt.recipe import load_recipe
from defaker_opt.target import Target, load_target

Answer = Literal["yes", "no", "planned"]
IsInstalled = Callable[[str], bool]

# What an extra brings, by the names they are imported by.
EXTRAS = {
    "cpu": ("onnxruntime",),
    "host": ("torch", "transformers", "onnx_ir", "onnxscript", "safetensors", "tokenizers", "sentencepiece", "yaml"),
    "validate": ("scipy", "matplotlib", "skimage", "lmdb", "pyarrow"),
    "ray": ("ray",),
}
_VERBS = {
    "cpu": "run, profile",
    "host": "convert, quantize, plan",
    "validate": "validate",
    "ray": "validate --engine ray",
}


@dataclass(frozen=True)
class Finding:
    """Whether something can be done here. reason: why not, or what to mind. remedy: what to do about it, or ""."""

    name: str
    answer: Answer
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """verbs: of the command line. targets: whose builds run here. recipes: whose builds can be made here."""

    version: str
    machine: Machine
    verbs: tuple[Finding, ...]
    targets: tuple[Finding, ...]
    recipes: tuple[Finding, ...]


def is_installed(module: str) -> bool:
    """Whether a module could be imported; nothing is imported."""
    return importlib.util.find_spec(module) is not None


# By backend: what it runs with, any of them, and where the first comes from.
_PACKAGES = {
    "onnx_runtime": (("onnxruntime",), "pip install 'defaker-opt[cpu]'"),
    "openvino": (("openvino",), "pip install 'defaker-opt[openvino]'"),
    "tensor_rt": (
        ("tensorrt", "tensorrt_rtx"),
        "JetPack has it, elsewhere: pip install tensorrt; then defaker-opt compile BUILD",
    ),
    "torch_cuda": (("triton",), "pip install 'defaker-opt[cuda]'"),
}


def diagnose(machine: Machine, installed: IsInstalled = is_installed) -> Diagnosis:
    """Judge every shipped target and recipe. Where YAML cannot be read they are left out, and `verbs` says why."""
    verbs = tuple(_verbs(installed))
    if not installed("yaml"):
        return Diagnosis(__version__, machine, verbs, (), ())
    targets = tuple(judge_target(load_target(name), machine, installed) for name in yaml_names("profiling/targets"))
    by_name = {finding.name: finding for finding in targets}
    recipes = tuple(_judge_recipe(name, by_name, verbs) for name in yaml_names("recipes"))
    return Diagnosis(__version__, machine, verbs, targets, recipes)


def _verbs(installed: IsInstalled) -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if not installed(name)]
        reason = f"not installed: {', '.join(missing)}" if missing else ""
        remedy = f"pip install 'defaker-opt[{extra}]'" if missing else ""
        yield Finding(_VERBS[extra], "no" if missing else "yes", reason, remedy)


def judge_target(target: Target, machine: Machine, installed: IsInstalled) -> Finding:
    """Whether builds for the target run on this machine."""
    where = _elsewhere(target.device, machine) if target.device else ""
    if where:
        return Finding(target.name, "no", where, "" if target.available else f"and backend {target.backend} is planned")
    if not target.available:
        reason = f"this version has no backend {target.backend}"
        return Finding(target.name, "planned", reason, f"defaker-opt plan --target {target.name}")
    packages, remedy = _PACKAGES[target.backend]
    if not any(map(installed, packages)):
        return Finding(target.name, "no", f"not installed: {packages[0]}", remedy)
    return Finding(target.name, "yes", _slow(machine))


def _elsewhere(device: Device, machine: Machine) -> str:
    """Why this machine is not such a device, or ""."""
    if device.kind == "browser":
        return "runs in a browser, not here"
    if device.architecture != machine.architecture:
        return f"needs {device.architecture}, and this is {machine.architecture}"
    if device.kind == "jetson" and not machine.jetson:
        return "this is no Jetson"
    if device.kind == "gpu" and not machine.gpus:
        return "no GPU whose driver answers"
    missing = [name for name in device.instructions if name not in machine.instructions]
    if missing:
        return f"the processor lacks {', '.join(missing)}"
    sm = device.versions.get("sm", "")
    if device.kind == "gpu" and all(gpu.compute.replace(".", "") != sm for gpu in machine.gpus):
        return f"needs a GPU of SM {sm}, and this has {', '.join(gpu.name for gpu in machine.gpus)}"
    if (
        device.memory.evidence == "published"
        and machine.memory_bytes < 0.8e9 * device.memory.value
        and device.shared_memory
    ):
        return f"has {device.memory.value:g} GB, and this has {machine.memory_bytes / 1e9:.0f}"
    return ""


def _slow(machine: Machine) -> str:
    if machine.architecture == "x86_64" and not {"avx512_vnni", "avx_vnni"} & set(machine.instructions):
        return "no VNNI: INT8 products saturate; check builds with run --self-test"
    return ""


def _judge_recipe(name: str, targets: dict[str, Finding], verbs: tuple[Finding, ...]) -> Finding:
    try:
        recipe = load_recipe(name)
    except DefakerError as error:
        return Finding(name, "no", str(error).replace("\n", " "))
    host = next(finding for finding in verbs if finding.name == _VERBS["host"])
    if host.answer != "yes":
        return Finding(name, "no", host.reason, host.remedy)
    target = targets.get(recipe.target)
    if target is None or target.answer != "yes":
        return Finding(name, "no", f"its target {recipe.target} does not run here")
    return Finding(name, "yes")
