"""How far peers drift on whole pictures, and ours: each peer's stages in a build of their own, through the gate.

    python profiling/peers_drift.py FLOAT_BUILD [OURS...] [--bits 8] [--suite embedded]
    python profiling/peers_drift.py exported/reference-float32 exported/reference-int8
    python profiling/peers_drift.py exported/reference-float32 --bits 4

What a peer writes takes the graphs' places in a copy of the float build, and `validate` compares that with the float
build on the suite. onnxruntime runs every build. With 8 bits peers get the stages that ours quantizes (vision encoder,
language part, mask encoder) and are calibrated on the pictures of ours. With 4 bits it is the language part alone, in
blocks of 64; ours, of the recipe `int4` with all else in float, is made too: its blocks are the largest of 64 and 128
that fit. NNCF writes by its ONNX backend; it and ModelOpt have environments of their own in the cache folder. Builds
and rows are kept, so a rerun goes on. JSON is the last line.
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
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import yaml
from peer_quantizers import CONTESTS, Contest, Tensors
from rich.console import Console
from rich.table import Table

from defaker_opt.catalog import data_folder
from defaker_opt.cli.progress import progress_bar
from defaker_opt.drift.compare import PairRow
from defaker_opt.drift.rows import Problem
from defaker_opt.files import default_cache_folder, write_json
from defaker_opt.limits import Limit
from defaker_opt.progress import part_of
from defaker_opt.report.validation import Hands, Request, validate_build
from defaker_opt.runtime import open_build
from defaker_opt.runtime.build import MANIFEST, SEAL, file_sha256, seal
from defaker_opt.runtime.recording import record_calls
from defaker_opt.samples import EMBEDDED, load_samples

LIMITS = {"verdict_accuracy": Limit(0.005, 0.95), "mask_iou": Limit(0.005, 0.95)}


def our_int4(plain: Path) -> Path:
    """The recipe `int4`, but all that is not in the language part stays in float."""
    folder = plain.with_name(f"{plain.name}-ours-{open_build(plain).digest[:8]}")
    if folder.exists():
        return folder
    recipe = yaml.safe_load((data_folder("recipes") / "int4.yaml").read_text(encoding="utf-8"))
    rules = recipe["passes"][0]["quantize"]["rules"]
    rules[-1] = {"match": "*", "scheme": "float"}
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "language-int4.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "defaker_opt", "quantize", "--recipe", str(path), "--output", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
    return folder


@functools.cache
def stage_calls(plain: Path, pictures: int) -> dict[str, list[Tensors]]:
    """What the float build gives each stage for calibration pictures, masks included."""
    build, calls = open_build(plain), dict[str, list[Tensors]]()
    samples = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    for image in islice(samples.images(), pictures):
        for call in record_calls(build, image, gate=0.0):
            calls.setdefault(call.stage, []).append(dict(call.tensors))
    return calls


def peer_build(plain: Path, name: str, contest: Contest, pictures: int) -> Path:
    """A copy of the float build with that peer's stages, beside it."""
    folder = plain.with_name(f"{plain.name}-{name}-{pictures}-{open_build(plain).digest[:8]}")
    if (folder / MANIFEST).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns(MANIFEST))
    data: dict[str, Any] = json.loads((plain / MANIFEST).read_text(encoding="utf-8"))
    calls = stage_calls(plain, pictures)
    for stage in contest.stages:
        print(f"{name}: {stage}", file=sys.stderr)
        for file in folder.glob(f"{stage}.onnx*"):
            file.unlink()
        contest.peers[name](plain / f"{stage}.onnx", folder / f"{stage}.onnx", calls[stage])
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
    flips = {"flips": suite.flips.flips, "flips_upper": suite.flips.upper, "n": suite.flips.n}
    return {"decision": done.report.decision, "bytes": size, **flips, **kl_of(done.comparison.runs[0]), **found}


def kl_of(pairs: Iterable[PairRow | Problem]) -> dict[str, float]:
    """Mean KL of the build's verdict from the float one's, over the 8 answer words, in nats; bootstrap interval."""
    rows = [row for row in pairs if isinstance(row, PairRow)]
    exact, ours = (
        np.array([getattr(row, side).verdict_logits for row in rows], np.float64) for side in ("reference", "candidate")
    )
    exact, ours = (each - np.logaddexp.reduce(each, axis=1, keepdims=True) for each in (exact, ours))
    divergence = (np.exp(exact) * (exact - ours)).sum(axis=1)
    drawn = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    low, high = np.quantile(divergence[drawn].mean(axis=1), [0.025, 0.975])
    return {"kl": float(divergence.mean()), "kl_low": float(low), "kl_high": float(high)}


def show(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    drops = ("accuracy, drop [pp]", "95 %", "mask IoU, drop [pp]", "95 %")
    for column in ("build", "MB", "flips", "KL [mnat]", "95 %", *drops, "gate, 0.5 pp"):
        table.add_column(column, justify="left" if column == "build" else "right")
    for name, row in rows.items():
        cells = [f"{row['bytes'] / 1e6:.1f}", str(row["flips"]), f"{1e3 * row['kl']:.3f}"]
        cells.append(f"{1e3 * row['kl_low']:.3f} … {1e3 * row['kl_high']:.3f}")
        for metric in LIMITS:
            drop, low, high = (100 * row[metric][key] for key in ("drop", "low", "high"))
            cells += [f"{drop:.2f}", f"{low:.2f} … {high:.2f}"]
        table.add_row(name, *cells, row["decision"])
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("ours", type=Path, nargs="*")
    parser.add_argument("--bits", type=int, choices=sorted(CONTESTS), default=8)
    parser.add_argument("--suite", default="embedded")
    parser.add_argument("--pictures", type=int, default=32, help="that peers are calibrated on")
    given, started = parser.parse_args(), time.time()
    contest = CONTESTS[given.bits]
    folders = {folder.name: folder for folder in given.ours}
    folders |= {"ours": our_int4(given.plain)} if given.bits == 4 else {}
    folders |= {name: peer_build(given.plain, name, contest, given.pictures) for name in contest.peers}
    request = Request((given.suite,), None, (), "calibration", 0, "", default_cache_folder())
    rows = {name: drift_of(folder, given.plain, request) for name, folder in folders.items()}
    show(rows, f"{given.suite}, against {given.plain.name}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    facts = {
        "bits": given.bits,
        "suite": given.suite,
        "pictures": given.pictures,
        "seconds": round(time.time() - started),
    }
    print(json.dumps({"builds": rows, **facts, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
