"""Our INT8 stages beside those of onnxruntime's quantizers, of NNCF with OpenVINO, and of ModelOpt: time, distance from
float, and what making them takes.

    python profiling/peers.py [--source reference] [--stages vision_encoder language mask_encoder] [--quick]
    python profiling/peers.py --source defakerone-2b:random --stages vision_encoder mask_encoder --tiles 1 --pictures 4
    python profiling/peers.py --source defakerone-2b:random,layers=4 --stages language --tokens 1000 --pictures 4
    python profiling/peers.py --forms 'ours, int8' 'NNCF, OpenVINO'

Every form is made from the float graph that we export and the same calibration calls, in a process of its own; `made`
is its seconds without imports, `peak` its largest memory. Runs take turns: each round runs every form of a stage once,
and a share is the median over rounds of its time / float32's in the same round. `error`: largest ‖difference‖ / ‖float‖
of an output on pictures that nobody was calibrated on. Peers have environments of their own in the cache folder. A form
that cannot be made stays in the table with its reason. JSON is the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
import peer_quantizers
from peer_quantizers import MODELOPT_PACKAGE, NNCF_PACKAGES, Tensors, ours, stage_calls
from rich.console import Console
from rich.table import Table

from defaker_opt.cli.progress import progress_bar
from defaker_opt.detector import Detector, load_detector, write_source
from defaker_opt.errors import BuildError
from defaker_opt.files import default_cache_folder
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.runtime.backends import find_backend
from defaker_opt.runtime.backends.onnx_runtime import OPEN_ERRORS
from defaker_opt.runtime.backends.openvino import openvino
from defaker_opt.samples import EMBEDDED, Samples, load_samples
from defaker_opt.target import load_target

# Form → recipe and target of ours, or the peer's quantizer; and what runs what it writes.
OURS = {
    "ours, int8": ("int8", "cpu"),
    "ours, int8, OpenVINO": ("int8", "x86-openvino"),
    "ours, int8-static, OpenVINO": ("int8-static", "x86-openvino"),
}
PEERS = {
    "onnxruntime dynamic": "dynamic",
    "onnxruntime static QDQ": "static",
    "NNCF, OpenVINO": "nncf_openvino",
    "ModelOpt, max": "modelopt_largest",
}
Run = Callable[[int], tuple[Tensors, float]]


def make(name: str, source: str, stage: str, folder: Path) -> dict[str, float]:
    """Make one form, in the process that was begun for it; seconds and peak bytes."""
    calls = [dict(np.load(path)) for path in sorted(folder.glob("calibration-*.npz"))]
    plain, written = folder / "float" / f"{stage}.onnx", folder / name
    written.mkdir()
    if name in OURS:
        write = ours(load_detector(source), stage, *OURS[name])
        started = time.perf_counter()
        write(written, calls)
    else:
        suffix = "xml" if "OpenVINO" in name else "onnx"
        quantizer = getattr(peer_quantizers, PEERS[name])
        started = time.perf_counter()
        quantizer(plain, written / f"{stage}.{suffix}", calls)
    seconds = time.perf_counter() - started
    return {"made_s": seconds, "peak_bytes": peer_quantizers.peak_bytes()}


def made(name: str, source: str, stage: str, folder: Path) -> dict[str, Any]:
    """Have a form made in a process of its own: what `make` found, or why it could not."""
    command = [sys.executable, __file__, "--make", name, "--source", source, "--stages", stage, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - ourselves
    if done.returncode:
        # What is killed, for memory as a rule, leaves no error; its last words would be beside the point.
        why = [line for line in done.stderr.splitlines() if "Error" in line and done.returncode > 0]
        text = ": ".join([f"ended with {done.returncode}", *why[-1:]])
        return {"failed": text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # A peer with an environment of its own speaks for itself.
    own = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("made ")]
    return {"made_s": float(own[-1][0]), "peak_bytes": float(own[-1][1])} if own else found


def opened(name: str, stage: str, folder: Path, tests: list[Tensors], detector: Detector, threads: int) -> Run:
    """A form ready to run its inputs, by OpenVINO as a user of it would if it is NNCF's, else by our backends."""
    files = folder / ("float" if name == "float32" else name)
    if name == "NNCF, OpenVINO":
        return peer_openvino(files / f"{stage}.xml", tests, threads)
    target = load_target(OURS[name][1] if name in OURS else "cpu")
    spec = detector.spec(stage)
    options = {"threads": threads, "compute": target.session.compute}
    stage_run = find_backend(target.backend).open_stage(files / f"{stage}.onnx", spec, options)
    outputs = tuple(tensor.name for tensor in spec.outputs)

    def run(index: int) -> tuple[Tensors, float]:
        started = time.perf_counter()
        result = stage_run(tests[index], outputs)
        return result, (time.perf_counter() - started) * 1e3

    return run


def peer_openvino(path: Path, tests: list[Tensors], threads: int) -> Run:
    settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = openvino.compile_model(openvino.Core().read_model(str(path)), "CPU", settings)
    names = [port.get_any_name() for port in compiled.inputs]

    def run(index: int) -> tuple[Tensors, float]:
        started = time.perf_counter()
        result = compiled([tests[index][name] for name in names])
        return {port.get_any_name(): result[port] for port in compiled.outputs}, (time.perf_counter() - started) * 1e3

    return run


def contest(detector: Detector, stage: str, folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Make, check and time all forms of a stage."""
    (folder / "float").mkdir()
    graph = export_stage(detector, stage)
    fill_weights_(graph, detector, load_target("cpu").encodings)
    write_graph(graph, folder / "float")
    calls, tests = ([fitted(c, given) for c in each] for each in pictured(detector, stage, given.pictures))
    for number, call in enumerate(calls):
        np.savez(folder / f"calibration-{number:04d}.npz", **call)
    rows: dict[str, dict[str, Any]] = {"float32": {}}
    for name in given.forms:
        print(f"{stage}: {name}", file=sys.stderr)
        rows[name] = made(name, given.source, stage, folder)
    runs = {}
    for name in [name for name, row in rows.items() if "failed" not in row]:
        try:
            runs[name] = opened(name, stage, folder, tests, detector, given.threads)
            runs[name](0)
        except (BuildError, *OPEN_ERRORS) as error:
            rows[name] = {"failed": str(error)[:300]}
            runs.pop(name, None)
    measure(runs, rows, len(tests), given.rounds)
    return rows


def pictured(detector: Detector, stage: str, pictures: int) -> tuple[list[Tensors], list[Tensors]]:
    """Calls of calibration pictures, and of others."""
    whole = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    # Neighbours are twins, so both halves have both labels and all domains.
    half = len(whole) // 2
    first, second = (
        list(islice(stage_calls(detector, stage, Samples(whole.name, whole.digest, items)), pictures))
        for items in (whole.items[:half], whole.items[half:])
    )
    return first, second


def fitted(call: Tensors, given: argparse.Namespace) -> Tensors:
    """Its first tiles; its tokens again and again until they are as many as were asked for."""
    if "inputs_embeds" not in call:
        return {n: a[: given.tiles or None] if n == "tiles" else a for n, a in call.items()}
    tokens = given.tokens or call["inputs_embeds"].shape[1]
    again = np.arange(tokens) % call["inputs_embeds"].shape[1]
    return {**call, "inputs_embeds": call["inputs_embeds"][:, again], "position_ids": np.arange(tokens)[None]}


def measure(runs: dict[str, Run], rows: dict[str, dict[str, Any]], tests: int, rounds: int) -> None:
    """Fill in errors and times."""
    exact = [runs["float32"](index)[0] for index in range(tests)]
    for name, run in runs.items():
        rows[name]["error"] = float(np.mean([error(run(index)[0], exact[index]) for index in range(tests)]))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            times[name].append(run(turn % tests)[1])
    for name, taken in times.items():
        rows[name]["latency_ms"] = float(np.median(taken))
        rows[name]["share"] = float(np.median(np.array(taken) / np.array(times["float32"])))


def error(result: Tensors, exact: Tensors) -> float:
    """The largest over outputs that mean something by themselves; keys and values are not among them."""
    named = [name for name in exact if not name.startswith(("present_", "kept_"))]
    return max(float(np.linalg.norm(result[n] - exact[n]) / max(np.linalg.norm(exact[n]), 1e-12)) for n in named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="reference")
    parser.add_argument("--stages", nargs="+", default=("vision_encoder", "language", "mask_encoder"))
    parser.add_argument("--tiles", type=int, default=0, help="so many of a picture's, 0 = all")
    parser.add_argument("--tokens", type=int, default=0, help="so many, repeated if a question has fewer, 0 = all")
    parser.add_argument("--pictures", type=int, default=32, help="calls for calibration, and as many for the error")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=(*OURS, *PEERS), default=(*OURS, *PEERS), help="beside float32")
    parser.add_argument("--quick", action="store_true", help="8 calls and 7 rounds")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given, started = parser.parse_args(), time.time()
    if given.make:
        print(json.dumps(make(given.make, given.source, given.stages[0], given.folder)))
        return
    if given.quick:
        given.pictures, given.rounds = 8, 7
    # Peers are given files too; weights that are drawn anew at each reading would be timed as if they took reading.
    with progress_bar() as report:
        write_source(given.source, lambda done, total: report("draw weights", done / total))
    detector = load_detector(given.source)
    results = {}
    for stage in given.stages:
        with tempfile.TemporaryDirectory() as folder:
            results[stage] = contest(detector, stage, Path(folder), given)
            print(stage, json.dumps(results[stage]), file=sys.stderr)
    print_table(results, given.source)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts: dict[str, Any] = {
        name: getattr(given, name) for name in ("source", "tiles", "tokens", "pictures", "rounds", "threads")
    }
    versions = {
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
        "peers": [*NNCF_PACKAGES, MODELOPT_PACKAGE],
    }
    facts["seconds"] = round(time.time() - started)
    print(json.dumps({"stages": results, **facts, "machine": machine, "versions": versions}))


def print_table(results: dict[str, dict[str, dict[str, Any]]], source: str) -> None:
    table = Table(title=f"INT8 forms of {source}: share of float32's time")
    for column in ("stage", "form", "ms", "share of float32", "error", "made, s", "peak, GB"):
        table.add_column(column, justify="left" if column in ("stage", "form") else "right")
    for stage, rows in results.items():
        for name, row in rows.items():
            if "failed" in row:
                table.add_row(stage, name, row["failed"][:60])
                continue
            cells = [f"{row['latency_ms']:.1f}", f"{row['share']:.3f}", f"{row['error']:.4f}"]
            if name != "float32":
                cells += [f"{row['made_s']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
            table.add_row(stage, name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
