"""How fast and how exact is one linear layer in each encoding? The shapes are those of full-size detectors.

    python profiling/int8_encodings.py [--repeat 15]

Activations have outlier channels and outlier tokens, as trained decoders do. Encodings run interleaved; the table gives
medians, the ratio to float32 and the relative error against a float64 product with the same decoded weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from defaker_opt.methods import Scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest

# Layer → tokens, columns in, rows out.
SHAPES = {
    "InternViT fc1, 1 tile": (1025, 1024, 4096),
    "InternViT fc2, 1 tile": (1025, 4096, 1024),
    "InternLM2-1.8B up, 1,000 tokens": (1000, 2048, 8192),
    "InternLM2-1.8B down, 1,000 tokens": (1000, 8192, 2048),
    "InternLM2-1.8B up, 16 tokens": (16, 2048, 8192),
    "SAM2-L qkv, stage 1": (65536, 144, 432),
    "SAM2-L mlp, stage 3": (4096, 576, 2304),
}

Graph = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]


def float32(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, x: np.ndarray) -> Graph:
    return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ascontiguousarray((codes * scale[:, None]).T)}


def matmul_integer(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, x: np.ndarray) -> Graph:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return nodes, {"w": np.ascontiguousarray(codes.T), "s": scale}


def matmul_integer_token(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, x: np.ndarray) -> Graph:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", "axis"], ["m"], keepdims=1),
        helper.make_node("Mul", ["m", "step"], ["xs0"]),
        helper.make_node("Max", ["xs0", "smallest"], ["xs"]),
        helper.make_node("Div", ["x", "xs"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "one", "zero"], ["xq"]),
        helper.make_node("MatMulInteger", ["xq", "w", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["g"]),
        helper.make_node("Mul", ["g", "xs"], ["y"]),
    ]
    constants = {"axis": np.array([-1]), "step": np.float32(1 / 127), "smallest": np.float32(1e-30)}
    return nodes, {
        "w": np.ascontiguousarray(codes.T),
        "s": scale,
        **constants,
        "one": np.float32(1),
        "zero": np.uint8(128),
    }


def static_qdq(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, x: np.ndarray) -> Graph:
    """Activation range taken from this very input: the best a static scale can be."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32((high - low) / 255)
    constants = {"xs": step, "xz": np.uint8(round(-low / step)), "s": scale, "sz": np.zeros(len(scale), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "sz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    return nodes, {"w": np.ascontiguousarray(codes.T), **constants}


def nbits_8(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, x: np.ndarray) -> Graph:
    """MatMulNBits with 8 bits: activations rounded by block; each block repeats its row's scale."""
    rows, columns = codes.shape
    size = 128 if columns % 128 == 0 else 16
    attributes = {"K": columns, "N": rows, "bits": 8, "block_size": size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    packed = (codes.astype(np.int16) + 128).astype(np.uint8).reshape(rows, columns // size, size)
    return [node], {"w": packed, "s": np.repeat(scale, columns // size)}


ENCODINGS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Graph]] = {
    "float32": float32,
    "matmul_integer": matmul_integer,
    "matmul_integer_token": matmul_integer_token,
    "static QDQ": static_qdq,
    "MatMulNBits 8": nbits_8,
}


def open_session(graph: Graph, columns: int, rows: int) -> onnxruntime.InferenceSession:
    nodes, constants = graph
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", c]) for n, c in (("x", columns), ("y", rows)))
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "layer", [x], [y], initializers), opset_imports=opsets, ir_version=10
    )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(model, path)
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def measure(tokens: int, columns: int, rows: int, repeat: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, and relative error, of each encoding; runs are interleaved."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((tokens, columns)).astype(np.float32)
    x[:, :3] *= 20
    x[tokens // 2] *= 5
    weight = (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    quantized = RoundToNearest().quantize(weight, Scheme(8))
    codes, scale = quantized.codes, np.ascontiguousarray(quantized.scale[:, 0])
    exact = x[:512].astype(np.float64) @ quantized.dequantize().T.astype(np.float64)
    sessions = {name: open_session(make(weight, codes, scale, x), columns, rows) for name, make in ENCODINGS.items()}
    errors = {}
    for name, session in sessions.items():
        got = session.run(None, {"x": x})[0][:512]
        errors[name] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeat):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: {"latency_ms": float(np.median(times[name])), "error": errors[name]} for name in sessions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    table = Table(title="one linear layer: ms (float32 time / time; relative error)")
    table.add_column("layer")
    for name in ENCODINGS:
        table.add_column(name, justify="right")
    results = {}
    for layer, shape in SHAPES.items():
        results[layer] = measured = measure(*shape, repeat)
        base = measured["float32"]["latency_ms"]
        cells = [f"{m['latency_ms']:.1f} ({base / m['latency_ms']:.1f}x; {m['error']:.4f})" for m in measured.values()]
        table.add_row(layer, *cells)
    Console(width=170).print(table)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps({"layers": results, "machine": machine, "versions": versions, "repeat": repeat}))


if __name__ == "__main__":
    main()
