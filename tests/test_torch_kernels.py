"""Triton kernels against slow twins, run by Triton's interpreter on a CPU; and that they compile for real GPUs.

The kernels compute in float32 what the twins compute in float64. So a number that lies on the edge between two codes
may get either: neighbours are allowed, and few of them. Where the quotient itself is given, codes are exactly those of
the twins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels' interpreter: pip install 'defaker-opt[cuda]'")

from defaker_opt.runtime.torch_graph import kernels
from defaker_opt.runtime.torch_graph.products import pack_fp4, pack_int4, unpack_int4, widen_fp4, widen_int4
from tests.reference import kernels as twins
from tests.reference.nvfp4 import e2m1_numbers

KINDS = {torch.int8: np.int8, torch.float8_e4m3fn: twins.FP8}
ROWS, COLUMNS = 7, 193  # no power of two, and no multiple of anything


def hard(seed: int, columns: int = COLUMNS) -> torch.Tensor:
    """Rows of ordinary numbers, zeros, tiny ones, outliers, and halves that lie between two codes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, columns, generator=generator)
    x[1] = 0
    x[2] *= 1e-6
    x[3, 3], x[3, 5] = 1e6, -1e6
    x[4] = (torch.arange(columns) - columns // 2) * 0.5
    x[5] *= 300
    return x


def assert_codes(got: torch.Tensor, expected: np.ndarray[Any, Any], kind: torch.dtype, share: float = 0.0) -> None:
    """Codes are those expected, up to a share of them that may be the next one."""
    assert got.dtype == kind
    ours = got.float().double().numpy()
    every = twins.codes_of(KINDS[kind])
    apart = np.abs(np.searchsorted(every, ours) - np.searchsorted(every, expected))
    assert apart.max() <= (1 if share else 0)
    assert (apart > 0).mean() <= share


@pytest.mark.parametrize("step", [1.0, 0.5, 0.0371])
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_is_exact(kind: torch.dtype, step: float) -> None:
    x = hard(0)
    got = kernels.quantize(x, torch.tensor(step), kind)
    assert_codes(got, twins.quantize(x.numpy(), step, KINDS[kind]), kind)
    assert got[1].float().abs().max() == 0
    largest = {torch.int8: (127, -128), torch.float8_e4m3fn: (448, -448)}[kind]
    assert (float(got[3, 3]), float(got[3, 5])) == largest


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_and_every_middle_between_two_is_rounded_as_onnx_says(kind: torch.dtype) -> None:
    codes = twins.codes_of(KINDS[kind])
    x = torch.tensor(np.sort(np.concatenate([codes, (codes[1:] + codes[:-1]) / 2]))).float()
    assert_codes(kernels.quantize(x, torch.tensor(1.0), kind), twins.quantize(x.numpy(), 1.0, KINDS[kind]), kind)


def test_a_transposed_input_is_read_by_its_places() -> None:
    x = hard(1).t()
    got = kernels.quantize(x, torch.tensor(0.5), torch.int8)
    assert_codes(got, twins.quantize(x.numpy(), 0.5, np.int8), torch.int8)


@pytest.mark.parametrize("form", ["layer", "layer without bias", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_quantize(kind: torch.dtype, form: str) -> None:
    x, weight, bias = hard(2), hard(3)[0], hard(4)[0]
    shift = bias if form == "layer" else None
    attributes = {"epsilon": 1e-6, "centred": form != "rms", "codes": kind}
    got = kernels.norm_quantize(x, weight, shift, torch.tensor(0.02), attributes)
    if form == "rms":
        normed = twins.rms_norm(x.numpy(), weight.numpy(), 1e-6)
    else:
        normed = twins.norm(x.numpy(), weight.numpy(), None if shift is None else shift.numpy(), 1e-6)
    assert_codes(got, twins.quantize(normed, 0.02, KINDS[kind]), kind, share=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gelu_quantize_applies_scale_and_bias_on_the_way(kind: torch.dtype) -> None:
    product = (hard(5) * 1000).round().clamp(-1e6, 1e6).to(torch.int32)
    scale, bias = torch.rand(COLUMNS) * 1e-3, torch.randn(COLUMNS)
    attributes = {"codes": kind, "compute": torch.float32}
    got = kernels.gelu_quantize(product, scale, bias, torch.tensor(0.05), attributes)
    shifted = (product.float() * scale + bias).numpy()
    assert_codes(got, twins.quantize(twins.gelu(shifted), 0.05, KINDS[kind]), kind, share=2e-3)
    done = kernels.gelu_quantize(torch.from_numpy(shifted), None, None, torch.tensor(0.05), attributes)
    assert torch.equal(done.view(torch.uint8), got.view(torch.uint8))


def test_gelu_of_a_product_that_is_handed_on_in_bfloat16() -> None:
    product, scale = (hard(6) * 1000).round().clamp(-1e6, 1e6).to(torch.int32), torch.rand(COLUMNS) * 1e-3
    attributes = {"codes": torch.int8, "compute": torch.bfloat16}
    got = kernels.gelu_quantize(product, scale, None, torch.tensor(0.05), attributes)
    narrow = (product.float() * scale).bfloat16().float().numpy()
    assert_codes(got, twins.quantize(twins.gelu(narrow), 0.05, np.int8), torch.int8, share=2e-3)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_quantize(kind: torch.dtype, given: torch.dtype) -> None:
    left, up = (hard(7).clamp(-80, 80) * 3).to(given), hard(8).to(given)
    got = kernels.gate_quantize(left, up, torch.tensor(0.1), {"codes": kind})
    expected = twins.quantize(twins.gate(left.float().numpy(), up.float().numpy()), 0.1, KINDS[kind])
    assert_codes(got, expected, kind, share=2e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_scale_and_shift(kind: torch.dtype, biased: bool) -> None:
    product = (hard(9) * 1000).round().clamp(-1e8, 1e8).to(torch.int32)
    scale, bias = torch.rand(COLUMNS) * 1e-3, torch.randn(COLUMNS) if biased else None
    got = kernels.scale_and_shift(product, scale, bias, kind)
    expected = product.float() * scale if bias is None else product.float() * scale + bias
    assert torch.equal(got, expected.to(kind))


@pytest.mark.parametrize(("rows", "columns", "out", "blocks"), [(1, 64, 64, 1), (5, 192, 70, 3), (33, 256, 129, 2)])
def test_int4_product(rows: int, columns: int, out: int, blocks: int) -> None:
    generator = np.random.default_rng(rows)
    codes = generator.integers(-8, 8, (columns, out), dtype=np.int8)
    scale = generator.uniform(1e-3, 0.1, (blocks, out)).astype(np.float16)
    x = generator.standard_normal((rows, columns)).astype(np.float16)
    x[0] = 0
    x[-1, 0] = 1000
    packed = pack_int4(torch.from_numpy(codes))
    assert torch.equal(unpack_int4(packed), torch.from_numpy(codes))
    got = kernels.int4_product(torch.from_numpy(x), packed, torch.from_numpy(scale)).numpy()
    expected = twins.int4_product(x, codes, scale)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    widened = x.astype(np.float64) @ widen_int4(packed, torch.from_numpy(scale)).double().numpy()
    np.testing.assert_allclose(widened, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 16, 64), (5, 176, 70), (33, 256, 129)])
def test_fp4_product(rows: int, columns: int, out: int) -> None:
    generator = np.random.default_rng(rows)
    numbers = np.array(e2m1_numbers(), np.float32)[generator.integers(0, 16, (columns, out))]
    steps = generator.uniform(2.0**-9, 448, (columns // 16, out)).astype(ml_dtypes.float8_e4m3fn)
    steps[0, :2] = 2.0**-9, 448
    whole = np.float32(3e-4)
    x = generator.standard_normal((rows, columns)).astype(np.float16)
    x[0] = 0
    stored = torch.from_numpy(steps.view(np.uint8)), torch.tensor(whole)
    packed = pack_fp4(torch.from_numpy(numbers))
    weight = numbers * np.repeat(steps.astype(np.float32) * whole, 16, axis=0)
    np.testing.assert_array_equal(widen_fp4(packed, *stored).numpy(), weight)
    got = kernels.fp4_product(torch.from_numpy(x), packed, *stored).numpy()
    expected = x.astype(np.float64) @ weight.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from defaker_opt.runtime.torch_graph import kernels

numbers = {"count": "i32", "columns": "i32", "rows": "i32", "out": "i32", "group": "i32", "epsilon": "fp32"}
pointers = {"x": "*fp32", "gate": "*bf16", "up": "*bf16", "product": "*i32", "packed": "*u8",
            "result": "*bf16", "weight": "*fp32", "bias": "*fp32", "scale": "*fp32", "step": "*fp32"}
constants = {"block": 1024, "centred": True, "biased": True, "scaled": True, "narrow": True,
             "block_rows": 16, "block_out": 64, "block_pairs": 32}
products = {"int4_product": {"x": "*fp16", "scale": "*fp16", "result": "*fp32", "whole": "*fp16"},
            "fp4_product": {"x": "*fp16", "scale": "*u8", "result": "*fp32", "whole": "*fp32"}}

def check(name, sm, codes):
    kernel = getattr(kernels, "_block_product_kernel" if name in products else f"_{name}_kernel")
    types = {**numbers, **pointers, "codes": codes, **products.get(name, {})}
    known = {**constants, "fp8": codes != "*i8", "fp4": name == "fp4_product"}
    signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
    fixed = {(place,): known[each] for place, each in enumerate(kernel.arg_names) if each not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    assert triton.compile(source, target=GPUTarget("cuda", sm, 32)).asm["ptx"]
    print(name, sm, codes)

for sm, codes in ((80, "*i8"), (89, "*fp8e4nv"), (90, "*fp8e4nv"), (100, "*fp8e4nv")):
    for name in ("quantize", "norm_quantize", "gelu_quantize", "gate_quantize", "scale_and_shift", *products):
        check(name, sm, codes)
"""


def test_kernels_compile_for_ampere_ada_hopper_and_blackwell(tmp_path: Path) -> None:
    """Triton's compiler needs no GPU; whether and how fast what it makes runs, only a GPU can tell."""
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del settings["TRITON_INTERPRET"]
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 4 * 7
