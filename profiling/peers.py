"""Our INT8 stages beside those of onnxruntime's quantizers and of NNCF with OpenVINO: time, and distance from float.

    python profiling/peers.py [--source reference] [--stages vision_encoder language mask_encoder] [--quick]

Every peer is given the float32 graph that we export, and the same calibration pictures. Runs take turns: each round
runs every form of a stage once, and a share is the median over rounds of its time / float32's in the same round.
`error`: largest ‖difference‖ / ‖float‖ of an output on pictures that nobody was calibrated on. `made`: seconds of
quantizing. NNCF and OpenVINO get an environment of their own in the cache folder; --without-openvino leaves them out.
A full-size detector: --source defakerone-2b:random,layers=2. JSON is the last line.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
from environments import python_of
from onnxruntime import quantization
from onnxruntime.capi import onnxruntime_pybind11_state as native
from rich.console import Console
from rich.table import Table

from defaker_opt.detector import Detector, load_detector
from defaker_opt.files import default_cache_folder
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.observe.inputs import question_inputs, tile_inputs, whole_inputs
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import EMBEDDED, Samples, load_samples
from defaker_opt.target import load_target

PEER_PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.31.1")
Tensors = dict[str, np.ndarray]

# Runs in the peers' environment: quantizes, then answers each line "run N" with milliseconds and outputs on input N.
WORKER = """
import sys, time
from pathlib import Path
import numpy as np, openvino, nncf

graph, folder, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
model = openvino.Core().read_model(graph)
load = lambda path: dict(np.load(path))
names = [port.get_any_name() for port in model.inputs]
given = [load(path) for path in sorted(folder.glob("calibration-*.npz"))]
started = time.perf_counter()
data = nncf.Dataset([[each[name] for name in names] for each in given])
kind = nncf.ModelType.TRANSFORMER
model = nncf.quantize(model, data, subset_size=len(given), model_type=kind)
print("made", time.perf_counter() - started, flush=True)
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
for line in sys.stdin:
    each = load(folder / f"test-{int(line.split()[1]):04d}.npz")
    started = time.perf_counter()
    result = compiled([each[name] for name in names])
    elapsed = (time.perf_counter() - started) * 1e3
    np.savez(folder / "result.npz", **{port.get_any_name(): result[port] for port in compiled.outputs})
    print("ms", elapsed, flush=True)
"""


@dataclass(frozen=True)
class Form:
    """One form of a stage: runs one input, and says outputs and milliseconds. made: seconds of quantizing."""

    run: Callable[[int], tuple[Tensors, float]]
    made: float


class Reader(quantization.CalibrationDataReader):
    """The calibration inputs as onnxruntime wants them."""

    def __init__(self, inputs: list[Tensors]) -> None:
        self.left: Iterator[Tensors] = iter(inputs)

    def get_next(self) -> Tensors | None:
        """The next input, None after the last."""
        return next(self.left, None)


def stage_calls(detector: Detector, stage: str, samples: Samples) -> Iterator[Tensors]:
    """What a stage is given for pictures, by the float stages before it."""
    names = [tensor.name for tensor in detector.spec(stage).inputs]
    if stage == "language":
        vision = detector.stream_stage("vision_encoder")
        calls = (
            q for t in tile_inputs(detector, samples) for q in question_inputs(detector, [vision(*t.tensors)], None)
        )
    else:
        calls = tile_inputs(detector, samples) if stage == "vision_encoder" else whole_inputs(detector, samples)
    return ({n: tensor.numpy() for n, tensor in zip(names, call.tensors)} for call in calls)


def ort_form(path: Path, tests: list[Tensors], threads: int, made: float) -> Form:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, threads
    # Or the threads of one form would spin on while the next one is timed.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(index: int) -> tuple[Tensors, float]:
        started = time.perf_counter()
        result = session.run(names, tests[index])
        return dict(zip(names, result)), (time.perf_counter() - started) * 1e3

    return Form(run, made)


def our_form(detector: Detector, stage: str, folder: Path, tests: list[Tensors], threads: int) -> Form:
    (quantize,) = load_recipe("int8").passes
    assert isinstance(quantize, Quantize)
    others = tuple(Rule(f"{other}.*", "float") for other in STAGES if other != stage)
    coded = Detector(detector.config, detector.weights)
    graph = export_stage(coded, stage)  # peers are given an exported graph, so ours is not timed either
    started = time.perf_counter()
    Quantize((*others, *quantize.rules)).apply(coded, lambda what, fraction: None)
    fill_weights_(graph, coded, load_target("cpu").encodings)
    path = write_graph(graph, folder / "ours")[0]
    return ort_form(path, tests, threads, time.perf_counter() - started)


def dynamic_form(plain: Path, folder: Path, tests: list[Tensors], threads: int) -> Form:
    """One scale a channel where onnxruntime can run what it writes; on the mask encoder it cannot."""
    for per_channel in (True, False):
        started = time.perf_counter()
        path = folder / f"dynamic-{per_channel}.onnx"
        quantization.quantize_dynamic(plain, path, per_channel=per_channel, weight_type=quantization.QuantType.QInt8)
        form = ort_form(path, tests, threads, time.perf_counter() - started)
        try:
            form.run(0)
        except native.Fail as failure:
            print(f"per_channel={per_channel}: {failure}", file=sys.stderr)
            continue
        return form
    raise SystemExit("onnxruntime cannot run its dynamically quantized graph")


def static_form(plain: Path, folder: Path, calls: list[Tensors], tests: list[Tensors], threads: int) -> Form:
    started = time.perf_counter()
    path = folder / "static.onnx"
    quantization.quantize_static(plain, path, Reader(calls), per_channel=True)
    return ort_form(path, tests, threads, time.perf_counter() - started)


def openvino_form(plain: Path, folder: Path, calls: list[Tensors], tests: list[Tensors], threads: int) -> Form:
    for kind, inputs in (("calibration", calls), ("test", tests)):
        for number, each in enumerate(inputs):
            np.savez(folder / f"{kind}-{number:04d}.npz", **each)
    command = [str(peer_python()), "-c", WORKER, str(plain), str(folder), str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    assert worker.stdin
    assert worker.stdout
    said = (line.split() for line in worker.stdout)
    made = float(next(words[1] for words in said if words[:1] == ["made"]))

    def run(index: int) -> tuple[Tensors, float]:
        assert worker.stdin
        worker.stdin.write(f"run {index}\n")
        worker.stdin.flush()
        elapsed = float(next(words[1] for words in said if words[:1] == ["ms"]))
        return dict(np.load(folder / "result.npz")), elapsed

    return Form(run, made)


def peer_python() -> Path:
    """The interpreter of the environment with NNCF and OpenVINO."""
    return python_of("nncf", ("install", *PEER_PACKAGES), ("uninstall", "-y", "openvino-telemetry"))


def forms_of(
    detector: Detector, stage: str, folder: Path, given: argparse.Namespace, both: tuple[Samples, Samples]
) -> tuple[dict[str, Form], list[Tensors]]:
    calls, tests = (list(islice(stage_calls(detector, stage, each), given.pictures)) for each in both)
    (folder / "float").mkdir()
    (folder / "ours").mkdir()
    graph = export_stage(detector, stage)
    fill_weights_(graph, detector, load_target("cpu").encodings)
    plain = write_graph(graph, folder / "float")[0]
    makers: dict[str, Callable[[], Form]] = {
        "float32": lambda: ort_form(plain, tests, given.threads, 0.0),
        "ours": lambda: our_form(detector, stage, folder, tests, given.threads),
        "onnxruntime dynamic": lambda: dynamic_form(plain, folder, tests, given.threads),
        "onnxruntime static QDQ": lambda: static_form(plain, folder, calls, tests, given.threads),
    }
    if not given.without_openvino:
        makers["OpenVINO + NNCF"] = lambda: openvino_form(plain, folder, calls, tests, given.threads)
    forms = {}
    for name, make in makers.items():
        print(f"{stage}: {name}", file=sys.stderr)
        forms[name] = make()
    return forms, tests


def measure(forms: dict[str, Form], tests: int, rounds: int) -> dict[str, dict[str, float]]:
    exact = [forms["float32"].run(index)[0] for index in range(tests)]
    rows: dict[str, dict[str, float]] = {}
    for name, form in forms.items():
        errors = [error(form.run(index)[0], exact[index]) for index in range(tests)]
        rows[name] = {"error": float(np.mean(errors)), "made_s": form.made}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name, form in forms.items():
            times[name].append(form.run(turn % tests)[1])
    for name, row in rows.items():
        row["latency_ms"] = float(np.median(times[name]))
        row["share"] = float(np.median(np.array(times[name]) / np.array(times["float32"])))
    return rows


def error(result: Tensors, exact: Tensors) -> float:
    """The largest over outputs that mean something by themselves; keys and values are not among them."""
    named = [name for name in exact if not name.startswith(("present_", "kept_"))]
    return max(float(np.linalg.norm(result[n] - exact[n]) / max(np.linalg.norm(exact[n]), 1e-12)) for n in named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="reference")
    parser.add_argument("--stages", nargs="+", default=("vision_encoder", "language", "mask_encoder"))
    parser.add_argument("--pictures", type=int, default=32, help="calls for calibration, and as many for the error")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--without-openvino", action="store_true")
    parser.add_argument("--quick", action="store_true", help="8 calls and 7 rounds")
    given = parser.parse_args()
    if given.quick:
        given.pictures, given.rounds = 8, 7
    detector = load_detector(given.source)
    whole = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    # Neighbours are twins, so both halves have both labels and all domains.
    half = len(whole) // 2
    both = (
        Samples(whole.name, whole.digest, whole.items[:half]),
        Samples(whole.name, whole.digest, whole.items[half:]),
    )
    results = {}
    for stage in given.stages:
        with tempfile.TemporaryDirectory() as folder:
            forms, tests = forms_of(detector, stage, Path(folder), given, both)
            results[stage] = measure(forms, len(tests), given.rounds)
            print(stage, json.dumps(results[stage]), file=sys.stderr)
    print_table(results, given.source)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts: dict[str, Any] = {"source": given.source, "pictures": given.pictures, "rounds": given.rounds}
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "peers": PEER_PACKAGES}
    print(json.dumps({"stages": results, **facts, "machine": machine, "versions": versions}))


def print_table(results: dict[str, dict[str, dict[str, float]]], source: str) -> None:
    table = Table(title=f"INT8 forms of {source}: share of float32's time")
    for column in ("stage", "form", "ms", "share of float32", "error", "made, s"):
        table.add_column(column, justify="left" if column in ("stage", "form") else "right")
    for stage, rows in results.items():
        for name, row in rows.items():
            cells = (f"{row['latency_ms']:.1f}", f"{row['share']:.2f}", f"{row['error']:.4f}", f"{row['made_s']:.1f}")
            table.add_row(stage, name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
