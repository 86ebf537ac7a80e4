"""Builds of a full-size detector with random weights, made and then run in turns on one picture: the table of bars.

    python profiling/full_size.py [--source defakerone-2b:random] [--recipes plain float32 int8] [--quick]
    python profiling/full_size.py --source sa2va-8b:random --recipes int4 --rounds 0

--quick keeps 2 layers a stack, all shapes unchanged. Every build is made in a process of its own, whose peak memory is
taken; then each round runs every build once, also in a process of its own, which judges the picture --judges times; the
last time is counted. Milliseconds are medians over rounds. What is done is kept in --work, and a rerun goes on.
On a busy machine processor seconds are what to compare, with --threads 1, as idle threads of a pool spin. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from defaker_opt.detector import load_detector
from defaker_opt.files import read_json_object, write_json
from defaker_opt.planning.fit import plan_recipe
from defaker_opt.runtime.images import tile_grid

STAGES = ("load", "vision_encoder", "language", "vocabulary_head", "mask_encoder", "mask_decoder", "total")

# Cut into 12 tiles of 448 and a thumbnail.
WIDTH, HEIGHT = 1792, 1344

JUDGE = """
import json, sys, time
import numpy as np
from defaker_opt.runtime import open_build, open_session
from defaker_opt.runtime.images import load_image

build, image, gate = open_build(sys.argv[1]), load_image(sys.argv[2]), float(sys.argv[3])
session = open_session(build, int(sys.argv[6]))
for _ in range(int(sys.argv[4])):
    begun = time.process_time()
    last = session.judge(image, gate=gate)
    used = time.process_time() - begun
np.savez(sys.argv[5], mask=last.mask, logits=last.verdict_logits)
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
row = {"latency_ms": dict(last.latency_ms), "fake_probability": last.fake_probability, "peak_memory_bytes": peak}
row["cpu_seconds"] = used
print(json.dumps({**row, "greedy_answer": last.greedy_answer}))
"""


def picture(path: Path) -> Path:
    """Colour, edges and noise from a seed; every tile differs from the others."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (21, 28, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), np.int64)
    noisy = smooth + generator.integers(-20, 21, smooth.shape)
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)
    return path


def last_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … ended with {done.returncode}; a rerun goes on from here")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def make(recipe: str, source: str, work: Path, *options: str) -> dict[str, Any]:
    """The summary of making a build, from its own receipt if it is there."""
    receipt, build = work / f"{recipe}.made.json", work / recipe
    made = read_json_object(receipt)
    if made is not None and build.is_dir():
        return made
    command = [sys.executable, "-m", "defaker_opt", "quantize", "--recipe", recipe, "--source", source, *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = last_json([*command, "--output", str(build), "--json"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    made["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    made["parameters"] = parameters(source)
    write_json(receipt, made)
    return made


def parameters(source: str) -> int:
    """How many numbers the source has, in all its tensors."""
    shapes = load_detector(source).weights.shapes().values()
    return sum(math.prod(shape) for shape in shapes)


def run(recipe: str, number: int, image: Path, work: Path, judges: int, threads: int) -> dict[str, Any]:
    """One counted run of a build."""
    receipt, outputs = work / f"{recipe}.run{number}.json", work / f"{recipe}.outputs.npz"
    found = read_json_object(receipt)
    if found is not None and outputs.is_file():
        return found
    numbers = (str(judges), str(outputs), str(threads))
    row = last_json([sys.executable, "-c", JUDGE, str(work / recipe), str(image), "0", *numbers])
    write_json(receipt, row)
    return row


def summarize(recipe: str, first: str, made: dict[str, Any], rows: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    making = {
        "bytes": made["bytes"],
        "parameters": made["parameters"],
        "made_seconds": made["seconds"],
        "made_cpu_seconds": made["cpu_seconds"],
        "made_cpu_nanoseconds_per_parameter": 1e9 * made["cpu_seconds"] / made["parameters"],
        "made_peak_memory_bytes": made["peak_memory_bytes"],
        "stages": made["stages"],
    }
    if not rows:
        return making
    outputs, expected = (np.load(work / f"{name}.outputs.npz") for name in (recipe, first))
    return {
        **making,
        "run_cpu_seconds": float(np.median([row["cpu_seconds"] for row in rows])),
        "run_peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "latency_ms": {
            stage: float(np.median([row["latency_ms"].get(stage, 0.0) for row in rows])) for stage in STAGES
        },
        "total_ms_by_round": [row["latency_ms"]["total"] for row in rows],
        "max_logit_difference": float(np.abs(outputs["logits"] - expected["logits"]).max()),
        "mask_pixels_that_differ": int((outputs["mask"] != expected["mask"]).sum()),
        "probability_difference": abs(
            rows[-1]["fake_probability"]
            - (read_json_object(work / f"{first}.run0.json") or rows[-1])["fake_probability"]
        ),
    }


def ratios(results: dict[str, dict[str, Any]], first: str) -> dict[str, dict[str, float]]:
    """What the bars are about, of each build against the first, and of its bytes against `float32`."""
    base, found = results[first], dict[str, dict[str, float]]()
    for name, row in results.items():
        found[name] = {"bytes": row["bytes"] / base["bytes"]}
        if "float32" in results:
            found[name]["bytes_of_float32"] = row["bytes"] / results["float32"]["bytes"]
        if "latency_ms" in row:
            found[name]["times_faster"] = base["latency_ms"]["total"] / row["latency_ms"]["total"]
            found[name]["times_fewer_cpu_seconds"] = base["run_cpu_seconds"] / row["run_cpu_seconds"]
    return found


def foreseen(recipe: str, source: str, row: dict[str, Any]) -> dict[str, float]:
    """What was measured as a share of what `plan` says, for this machine and the picture's tiles."""
    tiling = load_detector(source).config.tiling
    tiles = math.prod(tile_grid(WIDTH, HEIGHT, tiling.tile_size, tiling.min_tiles, tiling.max_tiles))
    planned = plan_recipe(recipe, source, None, tiles + (tiles > 1)).forecast
    here = [step for step in planned.steps if step.where == "this machine"]
    shares = {
        "bytes": row["bytes"] / planned.sizes.total,
        "made_seconds": row["made_seconds"] / sum(step.seconds for step in here),
        "made_peak_memory": row["made_peak_memory_bytes"] / max(step.memory_bytes for step in here),
    }
    if "latency_ms" in row:
        shares["run_peak_memory"] = row["run_peak_memory_bytes"] / planned.run_memory_bytes
        shares["latency_without_load"] = (
            row["latency_ms"]["total"] - row["latency_ms"]["load"]
        ) / planned.latency.total_ms
    return shares


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    columns = ("build", "MB", "made s", "made cpu s", "made peak GB", "run peak GB", *(f"{name} s" for name in STAGES))
    for column in (*columns, "cpu s", "largest Δlogit", "mask pixels off"):
        table.add_column(column.replace("_", " "), justify="left" if column == "build" else "right")
    for name, row in results.items():
        cells = [f"{row['bytes'] / 1e6:.1f}", f"{row['made_seconds']:.0f}", f"{row['made_cpu_seconds']:.0f}"]
        cells.append(f"{row['made_peak_memory_bytes'] / 1e9:.2f}")
        if "latency_ms" in row:
            cells.append(f"{row['run_peak_memory_bytes'] / 1e9:.2f}")
            cells += [f"{row['latency_ms'][stage] / 1e3:.2f}" for stage in STAGES]
            cells += [f"{row['run_cpu_seconds']:.1f}", f"{row['max_logit_difference']:.1e}"]
            cells.append(str(row["mask_pixels_that_differ"]))
        table.add_row(name, *cells)
    Console(width=210, file=sys.stdout).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="defakerone-2b:random")
    parser.add_argument("--recipes", nargs="+", default=["plain", "float32", "int8"], help="the first is the baseline")
    parser.add_argument("--rounds", type=int, default=3, help="0 only makes the builds")
    parser.add_argument("--judges", type=int, default=2, help="times a process judges the picture; the last one counts")
    parser.add_argument("--threads", type=int, default=0, help="of each stage; 0 for one a core")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("exported") / "full-size")
    arguments = parser.parse_args()
    source = arguments.source + (",layers=2" if arguments.quick else "")
    work = arguments.work / source.replace(":", "-").replace(",", "-")
    work.mkdir(parents=True, exist_ok=True)
    image, started = picture(work / "picture.png"), time.time()
    made = {recipe: make(recipe, source, work) for recipe in arguments.recipes}
    rows: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in arguments.recipes}
    for number in range(arguments.rounds):
        for recipe in arguments.recipes:
            rows[recipe].append(run(recipe, number, image, work, arguments.judges, arguments.threads))
    first = arguments.recipes[0]
    results = {recipe: summarize(recipe, first, made[recipe], rows[recipe], work) for recipe in arguments.recipes}
    show(results, f"{source}, 13 tiles, {arguments.rounds} rounds in turns; differences to {first}")
    versions = {name: __import__(name).__version__ for name in ("onnxruntime", "numpy", "torch", "transformers")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts = {
        "source": source,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "machine": machine,
        "versions": versions,
    }
    load = {"load_average_at_end": os.getloadavg()[0], "seconds": round(time.time() - started, 1)}
    compared = ratios(results, first)
    for name, each in compared.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in each.items()))
    planned = {recipe: foreseen(recipe, source, row) for recipe, row in results.items()}
    for name, each in planned.items():
        print(f"{name}, of what was planned: " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in each.items()))
    print(json.dumps({"builds": results, "ratios": compared, "of_planned": planned, **facts, **load}))


if __name__ == "__main__":
    main()
