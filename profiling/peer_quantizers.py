"""Peers that write quantized graphs: onnxruntime, NNCF and ModelOpt, each given a float graph and calls to look at; and
ours, given the same calls.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import gptq_interchange
import numpy as np
import onnx
import onnxruntime
import torch
from environments import python_of
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from safetensors.torch import save_file

from defaker_opt.detector import Detector, linear_weights, load_detector, parameter_shapes, source_folder
from defaker_opt.files import default_cache_folder, write_json
from defaker_opt.gptq_folder.model import LAYERS, model_config, model_name
from defaker_opt.graph.traced import traced_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.methods import parse_scheme
from defaker_opt.observe.inputs import StageInput, calibration_inputs
from defaker_opt.observe.sweep import Sweep
from defaker_opt.passes._scores import operand_needs
from defaker_opt.passes.quantize import Chooser, Quantize
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime.backends.onnx_runtime import OPEN_ERRORS
from defaker_opt.runtime.build import MANIFEST
from defaker_opt.samples import EMBEDDED, Samples, load_samples
from defaker_opt.stage_build import fill_stage_
from defaker_opt.target import load_target

Tensors = dict[str, np.ndarray]
BLOCK = 64
NNCF_PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.31.1")

# Not what getrusage says, which begins with what the process that began this one had.
PEAK = """
def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
"""

# Scripts of peers that have environments of their own say how long they took, without what they import, and their peak.
NNCF_OPENVINO = """
import sys, time
from pathlib import Path
import numpy as np, openvino, nncf

graph, folder, written = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
given = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
started = time.perf_counter()
model = openvino.Core().read_model(graph)
data = nncf.Dataset([[each[port.get_any_name()] for port in model.inputs] for each in given])
model = nncf.quantize(model, data, subset_size=len(given), model_type=nncf.ModelType.TRANSFORMER)
openvino.save_model(model, written, compress_to_fp16=False)
print("made", time.perf_counter() - started, peak_bytes())
"""

NNCF = """
import sys, time
from pathlib import Path
import numpy as np, onnx, nncf

graph, folder, written = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
given = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
started = time.perf_counter()
usual = {"subset_size": len(given), "model_type": nncf.ModelType.TRANSFORMER}
off = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
try:
    model = nncf.quantize(onnx.load(graph), nncf.Dataset(given), **usual)
except AssertionError:
    print(graph, "without SmoothQuant, which asserts one input of every product")
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off)
    model = nncf.quantize(onnx.load(graph), nncf.Dataset(given), advanced_parameters=advanced, **usual)
onnx.save(model, written)
print("made", time.perf_counter() - started, peak_bytes())
"""

MODELOPT = """
import sys, time
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
started = time.perf_counter()
quantize(graph, quantize_mode=mode, calibration_method=method, calibration_data_reader=Reader(), output_path=written,
    calibration_eps=["cpu"], high_precision_dtype="fp32", mha_accumulation_dtype="fp32",
    **(blocks if mode == "int4" else {}))
print("made", time.perf_counter() - started, peak_bytes())
"""

# Every token of the pictures and of the prompts is a row of the table, so that what GPTQModel takes for words is what
# the language part is given.
GPTQMODEL = """
import json, sys
from pathlib import Path
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

given, written = Path(sys.argv[1]), sys.argv[2]
config = AutoConfig.from_pretrained(given)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model.load_state_dict(load_file(given / "weights.safetensors"), strict=False)
model.save_pretrained(given / "plain")
words = Tokenizer(models.WordLevel({"?": 0, "!": 1}, unk_token="?"))  # it asks for one, and is given none of its words
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="!", eos_token="?").save_pretrained(given / "plain")
questions = json.loads((given / "questions.json").read_text())
examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in questions]
model = GPTQModel.load(str(given / "plain"), QuantizeConfig(bits=4, group_size=64, device="cpu"), dtype=torch.float32)
model.quantize(examples, batch_size=1, calibration_sort=None, backend=BACKEND.TORCH)
model.save(written)
"""


MODELOPT_PACKAGE = "nvidia-modelopt==0.47.0"
# Its extra [onnx] wants onnxruntime-gpu and cupy, so what it needs is named.
MODELOPT_PACKAGES = (
    ("install", "torch==2.13.0"),
    ("install", "--no-deps", MODELOPT_PACKAGE),
    ("install", "onnx~=1.21.0", "onnxruntime==1.31.1", "onnxscript==0.7.2", "onnxslim", "onnx-graphsurgeon",
     "onnxconverter-common", "polygraphy", "scipy", "tqdm", "pydantic", "omegaconf", "nvidia-ml-py", "pulp", "regex",
     "safetensors", "rich", "requests", "ninja", "packaging", "setuptools", "lief", "cppimport", "ml_dtypes", "pyyaml"),
)  # fmt: skip

# Writes a quantized graph at the second path, given the float one at the first and what it is calibrated on.
Quantizer = Callable[[Path, Path, list[Tensors]], None]


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
    calls = calibration_inputs(detector, stage, samples)
    return ({n: tensor.numpy() for n, tensor in zip(names, call.tensors)} for call in calls)


def ours(detector: Detector, stage: str, recipe: str, target: str) -> Callable[[Path, list[Tensors]], None]:
    """Writes a stage as a recipe says into a folder. What is timed of it is calibrating, coding and writing, as peers
    are given an exported graph too.
    """
    (quantize,) = load_recipe(recipe).passes
    assert isinstance(quantize, Quantize)
    shapes = linear_weights(detector.config, stage)
    rules = {name: next(rule for rule in quantize.rules if fnmatchcase(name, rule.match)) for name in shapes}
    schemes = {
        name: scheme
        for name, rule in rules.items()
        if (whole := parse_scheme(rule.scheme)) and (scheme := whole.fitted(shapes[name][1]))
    }
    graph = traced_stage(detector, stage)

    def write(folder: Path, calls: list[Tensors]) -> None:
        coded = Detector(detector.config, detector.weights)
        attentions = [name for name in quantize.attentions(detector.config) if name.startswith(f"{stage}.")]
        needs = {name: rule.needs() for name, rule in rules.items() if rule.scheme != "float"}
        needs.update(operand_needs(attentions))
        names = [tensor.name for tensor in detector.spec(stage).inputs]
        given = [StageInput(tuple(torch.from_numpy(call[name]) for name in names)) for call in calls]
        chooser = Chooser(coded, schemes, {name: rules[name] for name in schemes})
        with torch.inference_mode():
            for group in Sweep([coded], needs, None, chooser.foregone).walk(stage, lambda: [given]):
                for name in group.keys() & schemes.keys():
                    coded.codes[name] = chooser.codes(name, group[name])
                quantize.scale_operands_(coded, group)
        fill_stage_(graph, coded, load_target(target))
        write_graph(graph, folder)

    return write


def dynamic(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """One scale a channel where onnxruntime can run what it then writes, which for the mask encoder it cannot."""
    for per_channel in (True, False):
        quantization.quantize_dynamic(plain, written, per_channel=per_channel, weight_type=quantization.QuantType.QInt8)
        try:
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 4
            onnxruntime.InferenceSession(str(written), settings).run(None, calls[0])
        except OPEN_ERRORS as failure:
            print(f"{plain.stem}, per_channel={per_channel}: {str(failure)[:200]}", file=sys.stderr)
        else:
            return
    raise SystemExit(f"onnxruntime cannot run its own {written}")


def static(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """QDQ with the defaults, one scale a channel."""
    quantization.quantize_static(plain, written, Reader(calls), per_channel=True)


def peak_bytes() -> float:
    """The largest memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def peer_python() -> Path:
    """The interpreter of the environment with NNCF and OpenVINO."""
    return python_of("nncf", ("install", *NNCF_PACKAGES), ("uninstall", "-y", "openvino-telemetry"))


def ask_peer(python: Path, script: str, plain: Path, written: Path, calls: list[Tensors], *options: str) -> None:
    """Have a script of another environment write the graph; it gets copies, as some change what they are given."""
    with tempfile.TemporaryDirectory() as folder:
        for number, each in enumerate(calls):
            np.savez(Path(folder) / f"{number:04d}.npz", **each)
        for file in plain.parent.glob(f"{plain.name}*"):
            shutil.copy(file, folder)
        command = [
            str(python),
            "-c",
            PEAK + script,
            str(Path(folder) / plain.name),
            folder,
            str(written.absolute()),
            *options,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)  # noqa: S603


def nncf(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """NNCF's default algorithm for transformers."""
    ask_peer(peer_python(), NNCF, plain, written, calls)


def nncf_openvino(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """The same for OpenVINO: an .xml with its .bin."""
    ask_peer(peer_python(), NNCF_OPENVINO, plain, written, calls)


def modelopt(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """ModelOpt's INT8 with its default calibration."""
    ask_peer(python_of("modelopt", *MODELOPT_PACKAGES), MODELOPT, plain, written, calls, "int8", "entropy")


def modelopt_largest(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """The same with the largest activations as ranges, which holds no activations in memory."""
    ask_peer(python_of("modelopt", *MODELOPT_PACKAGES), MODELOPT, plain, written, calls, "int8", "max")


def gptqmodel(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """GPTQModel's GPTQ with its defaults, in blocks as long as the others'. It knows tokens alone, so each position of
    a calibration question becomes a token of its own; the codes are then decoded into the float graph.
    """
    source = json.loads((plain.parent / MANIFEST).read_text(encoding="utf-8"))["source"]["name"]
    detector = load_detector(source)
    samples = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    embeds = [
        torch.from_numpy(c["inputs_embeds"][0]) for c in islice(stage_calls(detector, "language", samples), len(calls))
    ]
    rows = torch.cat(embeds)
    ends = np.cumsum([len(each) for each in embeds]).tolist()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "given"
        folder.mkdir()
        names = [name for name in parameter_shapes(detector.config, "language") if name.startswith(LAYERS)]
        state = {model_name(name): detector.read(name).contiguous() for name in (*names, "language.norm.weight")}
        save_file({**state, "model.embed_tokens.weight": rows}, folder / "weights.safetensors")
        config = {**model_config(detector.config.language, source_folder(source)), "vocab_size": len(rows)}
        config = {**config, "torch_dtype": "float32", "eos_token_id": None, "pad_token_id": None}
        write_json(folder / "config.json", config)
        write_json(folder / "questions.json", [list(range(a, b)) for a, b in zip([0, *ends], ends)])
        gptq_interchange.ask_peer(GPTQMODEL, folder, Path(work) / "quantized")
        decoded = gptq_interchange.read_folder(Path(work) / "quantized")
        model = onnx.load(plain)
        for tensor in model.graph.initializer:
            name = model_name(tensor.name.removesuffix(".transposed"))
            if name.startswith("model.layers.") and name in decoded.places and tensor.name.endswith(".transposed"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(decoded.read(name).float().numpy().T.copy(), tensor.name))
    onnx.save(model, written, save_as_external_data=True, location=f"{written.name}.data")


def modelopt_awq(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """ModelOpt's AWQ. It wants calls of one shape, so it gets the whole question in one, as torch is given it."""
    detector = load_detector(json.loads((plain.parent / MANIFEST).read_text(encoding="utf-8"))["source"]["name"])
    samples = load_samples(EMBEDDED, default_cache_folder(), lambda what, fraction: None)
    whole = list(islice(stage_calls(detector, "language", samples), len(calls)))
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


def nf4(plain: Path, written: Path, calls: list[Tensors]) -> None:
    """bitsandbytes' NF4, by onnxruntime's quantizer for it."""
    kept = ["language.verdict_head.weight"]
    quantizer = MatMulBnb4Quantizer(onnx.load(plain), MatMulBnb4Quantizer.NF4, BLOCK, nodes_to_exclude=kept)
    quantizer.process()
    quantizer.model.save_model_to_file(str(written))


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
            "bitsandbytes-nf4": nf4,
            "gptqmodel-gptq": gptqmodel,
            "modelopt-awq": modelopt_awq,
        },
    ),
}
