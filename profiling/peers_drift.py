"""How far INT8 of peers drifts, and ours, on whole pictures: each peer in a build of its own, through the gate.

    python profiling/peers_drift.py exported/reference-float32 exported/reference-int8 [--suite embedded]

Peers get the float build's graphs of the vision encoder, the language part and the mask encoder, which are what ours
quantizes, and the same calibration pictures; what they write takes the graphs' places in a copy of the float build, and
`validate` compares it with the float build on the suite. onnxruntime runs every build. NNCF writes by its ONNX backend,
in an environment of its own in the cache folder. Builds and rows are kept, so a rerun goes on. JSON is the last line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import quantization
from peers import Reader, Tensors, peer_python
from rich.console import Console
from rich.table import Table

from defaker_opt.cli.progress import progress_bar
from defaker_opt.files import default_cache_folder, write_json
from defaker_opt.limits import Limit
from defaker_opt.progress import part_of
from defaker_opt.report.validation import Hands, Request, validate_build
from defaker_opt.runtime import open_build
from defaker_opt.runtime.build import MANIFEST, SEAL, file_sha256, seal
from defaker_opt.runtime.recording import record_calls
from defaker_opt.samples import EMBEDDED, load_samples

STAGES = ("vision_encoder", "language", "mask_encoder")
LIMITS = {"verdict_accuracy": Limit(0.005, 0.95), "mask_iou": Limit(0.005, 0.95)}

WORKER = """
import sys
from pathlib import Path
import numpy as np, onnx, nncf

graph, folder, written = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
given = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
usual = {"subset_size": len(given), "model_type": nncf.ModelType.TRANSFORMER}
off = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
try:
    model = nncf.quantize(onnx.load(graph), nncf.Dataset(given), **usual)
except AssertionError:
    print(graph, "without SmoothQuant, which asserts one input of every product")
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off)
    model = nncf.quantize(onnx.load(graph), nncf.Dataset(given), advanced_parameters=advanced, **usual)
onnx.save(model, written)
"""

# Writes a quantized graph at the second path, given the float one at the first and what it is calibrated on.
Quantizer = Callable[[Path, Path, list[Tensors]], None]


def dynamic(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """One scale a channel where onnxruntime can run what it then writes, which for the mask encoder it cannot."""
    for per_channel in (True, False):
        quantization.quantize_dynamic(plain, written, per_channel=per_channel, weight_type=quantization.QuantType.QInt8)
        try:
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 4
            onnxruntime.InferenceSession(str(written), settings).run(None, calls[0])
        except Exception as failure:  # noqa: BLE001 - its errors have no base class of their own
            print(f"{plain.stem}, per_channel={per_channel}: {str(failure)[:200]}", file=sys.stderr)
        else:
            return
    raise SystemExit(f"onnxruntime cannot run its own {written}")


def static(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """QDQ with the defaults, one scale a channel."""
    quantization.quantize_static(plain, written, Reader(calls), per_channel=True)


def nncf(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """NNCF's default algorithm for transformers."""
    python = peer_python()
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "onnx", "onnxruntime"], check=True)  # noqa: S603
    with tempfile.TemporaryDirectory() as folder:
        for number, each in enumerate(calls):
            np.savez(Path(folder) / f"{number:04d}.npz", **each)
        command = [str(python), "-c", WORKER, str(plain), folder, str(written)]
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603


PEERS: dict[str, Quantizer] = {"onnxruntime-dynamic": dynamic, "onnxruntime-static": static, "nncf": nncf}


@functools.cache
def stage_calls(plain: Path, pictures: int) -> dict[str, list[Tensors]]:
    """What the float build gives each stage for calibration pictures, masks included."""
    build, calls = open_build(plain), dict[str, list[Tensors]]()
    samples = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    for image in islice(samples.images(), pictures):
        for call in record_calls(build, image, gate=0.0):
            calls.setdefault(call.stage, []).append(dict(call.tensors))
    return calls


def peer_build(plain: Path, name: str, quantizer: Quantizer, pictures: int) -> Path:
    """A copy of the float build with that peer's stages, beside it."""
    folder = plain.with_name(f"{plain.name}-{name}-{pictures}")
    if (folder / MANIFEST).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns(MANIFEST))
    data: dict[str, Any] = json.loads((plain / MANIFEST).read_text(encoding="utf-8"))
    calls = stage_calls(plain, pictures)
    for stage in STAGES:
        print(f"{name}: {stage}", file=sys.stderr)
        for file in folder.glob(f"{stage}.onnx*"):
            file.unlink()
        quantizer(plain / f"{stage}.onnx", folder / f"{stage}.onnx", calls[stage])
    data["recipe"]["name"] = name
    data["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(folder.iterdir())
    }
    data[SEAL] = seal(data)
    write_json(folder / MANIFEST, data)
    return folder


def drift_of(folder: Path, plain: Path, request: Request) -> dict[str, Any]:
    """What the gate finds, in the first suite."""
    with progress_bar() as progress:
        hands = Hands("processes", 0, 0)
        done = validate_build(open_build(folder), str(plain), request, hands, LIMITS, part_of(progress, 0.0, 1.0))
    suite = done.report.suites[0]
    figures = {figure.metric: figure for figure in suite.figures}
    found = {
        metric: {"drop": figures[metric].drop, "low": figures[metric].low, "high": figures[metric].high}
        for metric in LIMITS
    }
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"decision": done.report.decision, "flips": suite.flips.flips, "n": suite.flips.n, "bytes": size, **found}


def show(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in (
        "build",
        "MB",
        "flips",
        "accuracy, drop [pp]",
        "95 %",
        "mask IoU, drop [pp]",
        "95 %",
        "gate, 0.5 pp",
    ):
        table.add_column(column, justify="left" if column == "build" else "right")
    for name, row in rows.items():
        cells = [f"{row['bytes'] / 1e6:.1f}", str(row["flips"])]
        for metric in LIMITS:
            drop, low, high = (100 * row[metric][key] for key in ("drop", "low", "high"))
            cells += [f"{drop:.2f}", f"{low:.2f} … {high:.2f}"]
        table.add_row(name, *cells, row["decision"])
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("ours", type=Path, nargs="+")
    parser.add_argument("--suite", default="embedded")
    parser.add_argument("--pictures", type=int, default=32, help="that peers are calibrated on")
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=list(PEERS))
    given, started = parser.parse_args(), time.time()
    folders = {folder.name: folder for folder in given.ours}
    folders |= {name: peer_build(given.plain, name, PEERS[name], given.pictures) for name in given.peers}
    request = Request((given.suite,), None, (), "calibration", 0, "", default_cache_folder())
    rows = {name: drift_of(folder, given.plain, request) for name, folder in folders.items()}
    show(rows, f"{given.suite}, against {given.plain.name}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    facts = {"suite": given.suite, "pictures": given.pictures, "seconds": round(time.time() - started)}
    print(json.dumps({"builds": rows, **facts, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
