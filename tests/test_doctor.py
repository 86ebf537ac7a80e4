"""What doctor finds on this machine, and on machines that are only file trees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from defaker_opt.catalog import yaml_names
from defaker_opt.doctor import diagnose, judge_target
from defaker_opt.machine import Gpu, Machine, read_machine
from defaker_opt.target import load_target
from tests.conftest import defaker_opt
from tests.machines import MEMINFO, OLD_CPUINFO, write_orin, write_tree


def answers(machine: Machine, *missing: str) -> dict[str, str]:
    return {f.name: f.answer for f in diagnose(machine, lambda module: module not in missing).targets}


def orin(folder: Path) -> Machine:
    machine = read_machine(folder, write_orin(folder), lambda command: "NV Power Mode: MAXN_SUPER\n2\n")
    return dataclasses.replace(machine, architecture="aarch64", gpus=())


def test_a_jetson_is_read_from_its_files(tmp_path: Path) -> None:
    machine = orin(tmp_path)
    assert machine.jetson == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert machine.jetpack == "L4T 36.4.3"
    assert machine.power_mode == "MAXN_SUPER"
    assert machine.instructions == ("asimd", "asimdhp", "asimddp")
    assert machine.memory_bytes == 7851544 * 1024
    assert machine.free_memory_bytes == 5 << 30
    assert "MAXN_SUPER" in machine.fingerprint


def test_a_jetson_runs_arm_builds_and_engines(tmp_path: Path) -> None:
    assert answers(orin(tmp_path), "tensorrt", "tensorrt_rtx")["orin-nano-super-8gb"] == "no"
    found = answers(orin(tmp_path))
    assert found["arm-cpu"] == "yes"
    assert found["orin-nano-super-8gb"] == "yes"
    assert found["orin-nx-16gb"] == "no"
    assert found["x86-vnni"] == "no"
    assert found["l4"] == "no"


def test_the_driver_is_asked_for_gpus(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/cpuinfo": OLD_CPUINFO, "proc/meminfo": MEMINFO})
    told = "NVIDIA L4, 23034, 550.54.15, 8.9\nNVIDIA A10, [N/A], 550.54.15, 8.6\nnonsense\n"
    machine = read_machine(tmp_path, root, lambda command: told if command[0] == "nvidia-smi" else None)
    assert machine.gpus == (
        Gpu("NVIDIA L4", 23034 << 20, "550.54.15", "8.9"),
        Gpu("NVIDIA A10", 0, "550.54.15", "8.6"),
    )
    x86 = dataclasses.replace(machine, architecture="x86_64")
    found = answers(x86)
    assert found["l4"] == found["a10"] == "yes"
    assert found["h100"] == "no"


def test_a_processor_without_vnni_is_warned(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/cpuinfo": OLD_CPUINFO, "proc/meminfo": MEMINFO})
    machine = dataclasses.replace(read_machine(tmp_path, root, lambda command: None), architecture="x86_64")
    assert machine.processor == "Old Processor @ 2.50GHz"
    assert answers(machine)["x86-avx2"] == "yes"
    assert answers(machine)["x86-vnni"] == "no"
    finding = judge_target(load_target("cpu"), machine, lambda module: True)
    assert "no VNNI" in finding.reason


def test_what_is_missing_comes_with_its_remedy() -> None:
    found = diagnose(read_machine(), lambda module: module not in ("torch", "onnxruntime"))
    by_name = {finding.name: finding for finding in (*found.verbs, *found.recipes, *found.targets)}
    assert by_name["convert, quantize, plan"].reason == "not installed: torch"
    assert by_name["int8"].answer == "no"
    assert by_name["int8"].remedy == "pip install 'defaker-opt[host]'"
    assert by_name["cpu"].remedy == "pip install 'defaker-opt[cpu]'"


def test_remedies_are_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from defaker_opt.cli.doctor import _print

    _print(diagnose(read_machine(), lambda module: module != "torch"))
    assert "pip install 'defaker-opt[host]'" in " ".join(capsys.readouterr().out.split())


def test_a_machine_without_yaml_still_gets_an_answer() -> None:
    found = diagnose(read_machine(), lambda module: module != "yaml")
    assert found.targets == found.recipes == ()
    assert any("yaml" in finding.reason for finding in found.verbs)


def test_this_machine_is_told_on_one_screen_and_as_json() -> None:
    done = defaker_opt("doctor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") <= 40
    for word in ("instructions", "memory", "commands", "recipes", "int8", "orin-nano-super-8gb"):
        assert word in done.stdout
    data = json.loads(defaker_opt("doctor", "--json").stdout)
    assert {finding["name"] for finding in data["targets"]} == set(yaml_names("profiling/targets"))
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["numpy"]
    assert next(finding for finding in data["targets"] if finding["name"] == "cpu")["answer"] == "yes"
