"""A full-size detector on one CUDA GPU: eager bfloat16 modules against our bfloat16, FP8, INT8 and bitsandbytes builds.

    python profiling/gpu.py [--source defakerone-2b:random] [--quick] [--rounds 30] [--work exported/gpu]
    python profiling/gpu.py --source reference:random --device cpu --rounds 1

Weights are drawn (or a detector's own); the picture gives 13 tiles; every form judges it through the same session, with
the mask, one picture at a time. Eager runs torch's modules, bfloat16 weights under autocast, with the savings of our
graphs: one shared prefix, eight answer words, one call a question. So what is compared is the backend alone.

latency_ms: a whole picture, wall time, median of the rounds, after three that warm up and capture. stages: each one by
itself on its own inputs, with a wait after it; efficiency: its operations (counted from its graph) a second, as a share
of what a large product of the same type reached in this run. images_per_s: at batch 1 from whole pictures, one
after another; at batch 16 from 64 pictures, 16 judged at once, as `run --concurrency 16 --batch-wait 50` judges them:
the vision encoder takes the tiles of those that wait in one call, and the other stages go picture by picture, as their
graphs have a batch of one; null for LLM.int8, which chooses columns by call. gpu_memory_mb: the most that torch had
allocated.

--quick keeps 2 layers a stack. --device cpu only checks that this script runs, with two pictures at once and no warming
up, and its figures say nothing. Without a CUDA device it ends with 2. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import make, picture
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from defaker_opt.detector import Detector, load_detector
from defaker_opt.errors import DefakerError
from defaker_opt.profiles.work import count_file
from defaker_opt.runtime import Session, open_build
from defaker_opt.runtime.at_once import session_at_once
from defaker_opt.runtime.backends import Choice
from defaker_opt.runtime.images import load_image
from defaker_opt.runtime.recording import Call, RecordingSession
from defaker_opt.runtime.spec import STAGES, StageSpec
from defaker_opt.runtime.torch_graph.array import DeviceArray, to_tensor

# Each form with the recipe of its build, and the type that most of its products have.
FORMS = {
    "eager bf16": ("float32", "bf16"),
    "bf16": ("float32", "bf16"),
    "fp8": ("datacenter-fp8", "fp8"),
    "int8": ("datacenter-int8", "int8"),
    "NVFP4": ("datacenter-nvfp4", "bf16"),
    "NF4, bitsandbytes": ("bitsandbytes-nf4", "bf16"),
    "LLM.int8, bitsandbytes": ("bitsandbytes-int8", "int8"),
}
TARGET = "h200-cuda"
WARM_UP = 3
BATCH = 16
BATCH_WAIT_MS = 50.0
PEAK_SIZE = 8192


class EagerStage:
    """A stage's torch module in bfloat16 as a stage of a session."""

    def __init__(self, detector: Detector, spec: StageSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.module = detector.load_stage(spec.name).to(device)
        for part in self.module.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                part.to(torch.bfloat16)

    # Called as `OpenStage` says.
    def __call__(self, tensors: Mapping[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
        given = [to_tensor(tensors[tensor.name], self.device) for tensor in self.spec.inputs]
        # Modules compute masks and positions in float32; autocast narrows what is multiplied, as in training.
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16):
            results = self.module(*given)
        named = dict(zip((tensor.name for tensor in self.spec.outputs), results))
        return {name: DeviceArray(_typed(named[name])) for name in outputs}


def _typed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def open_form(form: str, source: str, work: Path, device: torch.device) -> RecordingSession:
    build = open_build(work / FORMS[form][0])
    session = RecordingSession(build, 0, Choice("torch_cuda", {"device": str(device), "compute": "bfloat16"}))
    if form.startswith("eager"):
        detector = load_detector(source)
        for stage in STAGES:
            session._open[stage] = EagerStage(detector, session.spec(stage), device)
    return session


def waited(device: torch.device, run: Callable[[], Any]) -> float:
    """Milliseconds of a call, until the device is done."""
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begun)


def median_ms(device: torch.device, run: Callable[[], Any], rounds: int) -> float:
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        waited(device, run)
    return statistics.median(waited(device, run) for _ in range(rounds))


def measure_peaks(device: torch.device, size: int, rounds: int) -> dict[str, float]:
    """10¹² operations a second of one large product, by type; types that the device has no products of are left out."""
    wide = torch.randn(size, size, device=device)
    products: dict[str, Callable[[], Any]] = {}
    narrow, codes = wide.bfloat16(), (wide * 30).clamp(-127, 127).to(torch.int8)
    products["bf16"] = lambda: narrow @ narrow.t()
    products["int8"] = lambda: torch._int_mm(codes, codes.t())
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        small, one = wide.to(torch.float8_e4m3fn), torch.ones((), device=device)
        products["fp8"] = lambda: torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.bfloat16)
    return {name: 2 * size**3 / median_ms(device, run, rounds) / 1e9 for name, run in products.items()}


def call_operations(work: Path, form: str, call: Call) -> float:
    shapes = {name: tuple(array.shape) for name, array in call.tensors.items()}
    return count_file(work / FORMS[form][0] / f"{call.stage}.onnx", shapes, call.outputs).total


def measure_stages(
    session: RecordingSession, form: str, facts: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """Each stage on the calls that one picture takes."""
    device, peak = facts["device"], facts["peaks"].get(FORMS[form][1])
    rows: dict[str, dict[str, float | None]] = {}
    for stage in STAGES:
        calls = [call for call in session.calls if call.stage == stage]
        spent = sum(call_ms(session, call, device, facts["rounds"]) for call in calls)
        teras = sum(call_operations(facts["work"], form, call) for call in calls) / spent / 1e9
        share = teras / peak if peak else None
        rows[stage] = {"ms": spent, "tera_operations_per_s": teras, "efficiency": share}
    return rows


def call_ms(session: Session, call: Call, device: torch.device, rounds: int) -> float:
    opened = session.open_stage(call.stage)
    return median_ms(device, lambda: opened(call.tensors, call.outputs), rounds)


def measure_batch(session: Session, image: Any, facts: Mapping[str, Any]) -> float | None:
    """Images a second, of as many judged at once; None if its vision encoder rounds by call, so that none is shared."""
    on_gpu = facts["device"].type == "cuda"
    batch, pictures = (BATCH, 4 * BATCH) if on_gpu else (2, 2)
    try:
        shared = session_at_once(session, batch, BATCH_WAIT_MS)
    except DefakerError as error:
        print(error, file=sys.stderr)
        return None
    rounds = max(1, facts["rounds"] // 10)
    with ThreadPoolExecutor(batch) as threads:

        def judge_all() -> None:
            list(threads.map(lambda _: shared.judge(image, gate=0.0), range(pictures)))

        return pictures * 1e3 / median_ms(facts["device"], judge_all, rounds)


def measure_form(form: str, image: Any, reference: Any, facts: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    device = facts["device"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    session = open_form(form, facts["source"], facts["work"], device)
    verdict = session.judge(image, gate=0.0)
    stages = measure_stages(session, form, facts)
    session.calls.clear()
    plain = Session(session.build, 0, session.choice, session._open)
    latency = median_ms(device, lambda: plain.judge(image, gate=0.0), facts["rounds"])
    row = {
        "latency_ms": latency,
        "images_per_s": {"1": 1e3 / latency, str(BATCH): measure_batch(plain, image, facts)},
        "stages": stages,
        "gpu_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
        "fake_probability": verdict.fake_probability,
        **differences(verdict, reference or verdict),
    }
    # Both have the same stages.
    session.close()
    gc.collect()
    return row, verdict


def differences(verdict: Any, reference: Any) -> dict[str, float]:
    ours, theirs = (np.asarray(each.mask, bool) for each in (verdict, reference))
    return {
        "max_logit_difference": float(np.abs(verdict.verdict_logits - reference.verdict_logits).max()),
        "mask_agreement": _agreement(ours, theirs),
    }


def _agreement(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    return float((ours == theirs).mean())


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: the GPU, its clocks while idle and its limits, and versions."""
    import onnx

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"numpy": np.__version__, "onnx": onnx.__version__}
    facts: dict[str, Any] = {"device": str(device), "versions": versions}
    query = shutil.which("nvidia-smi")
    if device.type == "cuda" and query:
        fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
        command = [query, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - found on the path
        facts["gpu"] = dict(zip(fields.split(","), (each.strip() for each in done.stdout.split(","))))
    return facts


def _cell(stage: Mapping[str, Any]) -> str:
    share = "no peak" if stage["efficiency"] is None else f"{stage['efficiency']:.0%}"
    return f"{stage['ms']:.2f} ({share})"


def show(rows: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, float], title: str) -> None:
    table = Table(title=title)
    for column in ("form", "ms", "img/s", f"img/s at {BATCH}", *STAGES, "GPU MB", "largest Δlogit", "mask agrees"):
        table.add_column(column.replace("_", " "), justify="left" if column == "form" else "right")
    for form, row in rows.items():
        stages = [_cell(row["stages"][stage]) for stage in STAGES]
        rates = ["-" if rate is None else f"{rate:.1f}" for rate in row["images_per_s"].values()]
        memory = "-" if row["gpu_memory_mb"] is None else f"{row['gpu_memory_mb']:.0f}"
        ends = [memory, f"{row['max_logit_difference']:.1e}", f"{row['mask_agreement']:.4f}"]
        table.add_row(form, f"{row['latency_ms']:.2f}", *rates, *stages, *ends)
    console = Console(width=200, file=sys.stdout)
    console.print(table)
    console.print("stages: ms (share of the peak). Peaks: " + ", ".join(f"{k} {v:.1f} TOPS" for k, v in peaks.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default="defakerone-2b:random")
    parser.add_argument("--quick", action="store_true", help="2 layers a stack")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu only checks that the script runs"
    )
    parser.add_argument("--work", type=Path, default=Path("exported") / "gpu", help="builds are kept here")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu.py: torch {torch.__version__} sees no CUDA device, and every figure here is one of a GPU; run it on "
            "a machine with one, with a torch for CUDA; --device cpu only checks that the script runs",
            file=sys.stderr,
        )
        return 2
    source = given.source + (",layers=2" if given.quick else "")
    work = given.work / source.replace(":", "-").replace(",", "-")
    work.mkdir(parents=True, exist_ok=True)
    image = load_image(picture(work / "picture.png"))
    for recipe in dict.fromkeys(recipe for recipe, _ in FORMS.values()):
        make(recipe, source, work, "--target", TARGET)
    device = torch.device(given.device)
    size = PEAK_SIZE if device.type == "cuda" else 256
    facts = {"device": device, "rounds": given.rounds, "source": source, "work": work}
    facts["peaks"] = measure_peaks(device, size, max(3, given.rounds))
    rows: dict[str, Any] = {}
    reference = None
    for form in FORMS:
        rows[form], verdict = measure_form(form, image, reference, facts)
        reference = reference or verdict
    note = (
        "" if device.type == "cuda" else "ON THE CPU: this only checks that the script runs; no figure means anything. "
    )
    show(rows, facts["peaks"], f"{note}{source}, {given.rounds} rounds; differences to the first")
    told = {"note": note or None, "source": source, "rounds": given.rounds, "peaks_tera": facts["peaks"], "forms": rows}
    print(json.dumps({**told, **machine(device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
