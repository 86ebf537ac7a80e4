"""Peers that write quantized graphs: onnxruntime, NNCF and ModelOpt, each given a float graph and calls to look at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from environments import python_of
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer
from peers import Reader, Tensors, peer_python
from peers import stage_calls as whole_calls

from defaker_opt.detector import load_detector
from defaker_opt.files import default_cache_folder
from defaker_opt.runtime.build import MANIFEST
from defaker_opt.samples import EMBEDDED, load_samples

BLOCK = 64

NNCF = """
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

MODELOPT = """
import sys
from pathlib import Path
import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization.calibrate import CalibrationDataReader

graph, folder, written, mode, method = sys.argv[1:]

class Reader(CalibrationDataReader):
    given = [dict(np.load(path)) for path in sorted(Path(folder).glob("*.npz"))]
    left = iter(given)
    def get_next(self): return next(self.left, None)
    def get_first(self): return self.given[0]
    def rewind(self): self.left = iter(self.given)

# Fusing AWQ's scales into what comes before needs cupy.
blocks = {"block_size": 64, "nodes_to_exclude": ["language.verdict_head.weight"], "awqlite_fuse_nodes": False}
quantize(graph, quantize_mode=mode, calibration_method=method, calibration_data_reader=Reader(), output_path=written,
    calibration_eps=["cpu"], high_precision_dtype="fp32", mha_accumulation_dtype="fp32",
    **(blocks if mode == "int4" else {}))
"""

# Its extra [onnx] wants onnxruntime-gpu and cupy, so what it needs is named.
MODELOPT_PACKAGES = (
    ("install", "torch==2.13.0"),
    ("install", "--no-deps", "nvidia-modelopt==0.47.0"),
    ("install", "onnx~=1.21.0", "onnxruntime==1.31.1", "onnxscript==0.7.2", "onnxslim", "onnx-graphsurgeon",
     "onnxconverter-common", "polygraphy", "scipy", "tqdm", "pydantic", "omegaconf", "nvidia-ml-py", "pulp", "regex",
     "safetensors", "rich", "requests", "ninja", "packaging", "setuptools", "lief", "cppimport", "ml_dtypes", "pyyaml"),
)  # fmt: skip

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


def ask_peer(python: Path, script: str, plain: Path, written: Path, calls: list[Tensors], *options: str) -> None:
    """Have a script of another environment write the graph; it gets copies, as some change what they are given."""
    with tempfile.TemporaryDirectory() as folder:
        for number, each in enumerate(calls):
            np.savez(Path(folder) / f"{number:04d}.npz", **each)
        for file in plain.parent.glob(f"{plain.name}*"):
            shutil.copy(file, folder)
        command = [str(python), "-c", script, str(Path(folder) / plain.name), folder, str(written.absolute()), *options]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)  # noqa: S603


def nncf(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """NNCF's default algorithm for transformers."""
    ask_peer(peer_python(), NNCF, plain, written, calls)


def modelopt(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """ModelOpt's INT8 with its default calibration."""
    ask_peer(python_of("modelopt", *MODELOPT_PACKAGES), MODELOPT, plain, written, calls, "int8", "entropy")


def modelopt_awq(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """ModelOpt's AWQ. It wants calls of one shape, so it gets the whole question in one, as torch is given it."""
    detector = load_detector(json.loads((plain.parent / MANIFEST).read_text(encoding="utf-8"))["source"]["name"])
    samples = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    whole = list(islice(whole_calls(detector, "language", samples), len(calls)))
    alike = Counter(map(shapes, whole)).most_common(1)[0][0]
    fitting = [call for call in whole if shapes(call) == alike]
    ask_peer(python_of("modelopt", *MODELOPT_PACKAGES), MODELOPT, plain, written, fitting, "int4", "awq_lite")


def shapes(call: Tensors) -> tuple[tuple[int, ...], ...]:
    return tuple(call[name].shape for name in sorted(call))


def blocks(plain: Path, written: Path, config: matmul_nbits_quantizer.WeightOnlyQuantConfig) -> None:
    """4 bits in blocks by onnxruntime's own quantizer, which looks at no picture; the verdict's rows stay in float."""
    kept = ["language.verdict_head.weight"]
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(plain), nodes_to_exclude=kept, algo_config=config, accuracy_level=0
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(written))


def nearest(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """Rounded to nearest, with a zero point for each block."""
    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=0)
    blocks(plain, written, config)


def half_quadratic(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """HQQ."""
    blocks(plain, written, matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=4))


def searched(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """The search of llama.cpp's K-quants."""
    blocks(plain, written, matmul_nbits_quantizer.KQuantWeightOnlyQuantConfig())


@dataclass(frozen=True)
class Contest:
    """What peers quantize, and who they are."""

    stages: tuple[str, ...]
    peers: Mapping[str, Quantizer]


CONTESTS = {
    8: Contest(
        ("vision_encoder", "language", "mask_encoder"),
        {"onnxruntime-dynamic": dynamic, "onnxruntime-static": static, "nncf": nncf, "modelopt": modelopt},
    ),
    4: Contest(
        ("language",),
        {
            "onnxruntime-rtn": nearest,
            "onnxruntime-hqq": half_quadratic,
            "onnxruntime-k-quant": searched,
            "modelopt-awq": modelopt_awq,
        },
    ),
}
