"""GPTQ checkpoints: decoded as the slow twin says, and refused where anything of them is missing or unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defaker_opt.checkpoint import gptq, tensors_of
from defaker_opt.convert import convert, open_tensors, plan_conversion
from defaker_opt.detector import load_detector
from defaker_opt.errors import SourceError
from defaker_opt.weights import StoredWeights, open_weights
from tests.reference.checkpoint import write_checkpoint
from tests.reference.packing import dequantize_plain, pack_plain

FIRST = "language_model.model.layers.0.attention.wqkv"
LAST = "language_model.model.layers.1.feed_forward.w2"
# As the twin is slow, not all: the endings of those that are packed.
LINEAR = ("wqkv.weight", "w2.weight", "k_proj.weight", "qkv_proj.weight", "o_proj.weight")

Tensors = dict[str, torch.Tensor]


@lru_cache
def packed_layer(shape: tuple[int, ...], bits: int, offset: int, order: str, seed: int) -> tuple[Tensors, np.ndarray]:
    """A layer's tensors, and the weight [out, in] that the twin makes of them."""
    generator = np.random.default_rng(seed)
    rows, columns = shape
    size = 32
    groups = columns // size
    codes = generator.integers(0, 2**bits, (columns, rows))
    zeros = generator.integers(1, 2**bits, (groups, rows))  # 0 has no clear place in the older format
    scales = (generator.standard_normal((groups, rows)) * 0.01).astype(np.float16)
    group = np.arange(columns) // size
    if order == "activation":
        group = generator.permutation(group)
    parts = {
        "qweight": pack_plain(codes, bits),
        "qzeros": np.ascontiguousarray(pack_plain((zeros - offset).T, bits).T),
        "scales": scales,
        "g_idx": group.astype(np.int32),
    }
    weight = dequantize_plain(*parts.values(), bits, offset)
    if order == "unsaid":
        del parts["g_idx"]
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}, weight


def quantized(
    folder: Path, bits: int = 4, layout: str = "gptq", order: str = "natural", kind: str = "internlm2"
) -> Path:
    """A checkpoint with linear layers of the language packed, and beside it, as `plain`, the same decoded."""
    write_checkpoint(folder, kind)
    plain = folder.with_name("plain")
    shutil.copytree(folder, plain)
    tensors = load_file(folder / "model.safetensors")
    decoded = dict(tensors)
    for name in sorted(tensors):
        if name.startswith("language_model.model.layers.") and name.endswith(LINEAR):
            parts, weight = packed_layer(tuple(tensors.pop(name).shape), bits, int(layout == "gptq"), order, len(name))
            module = name.removesuffix(".weight")
            tensors.update({f"{module}.{part}": value.clone() for part, value in parts.items()})
            decoded[name] = torch.from_numpy(weight.copy())
    save_file(decoded, plain / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order == "activation"}
    restate(folder, lambda config: config.update(quantization_config={**settings, "checkpoint_format": layout}))
    return folder


def restate(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def alter(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    one, other = load_detector(str(left)).weights, load_detector(str(right)).weights
    assert one.shapes() == other.shapes()
    for name in one.shapes():
        assert torch.equal(one.read(name), other.read(name)), name


def load(folder: Path) -> Tensors:
    """Every packed layer of a folder, decoded."""
    config = json.loads((folder / "config.json").read_text())
    tensors = gptq.unpacked(folder, tensors_of(open_weights(folder)), config)
    return {name: tensors.read(name) for name in tensors.places}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["natural", "activation", "unsaid"])
def test_packed_layers_decode_as_the_twin_says(bits: int, layout: str, order: str, tmp_path: Path) -> None:
    decoded = load(quantized(tmp_path / "packed", bits, layout, order))
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert decoded.keys() == expected.keys()
    assert all(torch.equal(decoded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "phi3"])
def test_every_kind_of_decoder_is_converted(kind: str, tmp_path: Path) -> None:
    done = convert(quantized(tmp_path / "packed", kind=kind, order="activation"), tmp_path / "detector")
    assert "GPTQ codes of 4 layers (4 bits) decoded to float32" in done.notes
    convert(tmp_path / "plain", tmp_path / "expected")
    assert_same(tmp_path / "detector", tmp_path / "expected")


def test_names_and_shapes_need_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized(tmp_path / "packed")
    read = StoredWeights.read

    def refused(self: StoredWeights, name: str) -> torch.Tensor:
        tensor = read(self, name)  # its type may be asked for, of which nothing is read
        monkeypatch.setattr(torch.Tensor, "numpy", None)
        return tensor

    monkeypatch.setattr(StoredWeights, "read", refused)
    plan_conversion(folder, open_tensors(folder))


def test_settings_may_lie_where_older_writers_put_them(tmp_path: Path) -> None:
    for place in ("llm_config", "quantize_config.json"):
        folder = quantized(tmp_path / place / "packed")
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        restate(folder, lambda config: config.pop("quantization_config"))
        if place == "llm_config":
            restate(folder, lambda config, settings=settings: config["llm_config"].update(quantization_config=settings))
        else:
            del settings["quant_method"]
            (folder / place).write_text(json.dumps(settings))
        assert load(folder)[f"{FIRST}.weight"].dtype == torch.float32


def test_layers_may_have_bits_of_their_own_where_it_says_so(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "packed")
    parts, weight = packed_layer((64, 96), 8, 1, "natural", 5)
    alter(folder, lambda tensors: tensors.update({f"{LAST}.{part}": value for part, value in parts.items()}))
    with pytest.raises(SourceError, match=r"feed_forward\.w2: qweight \[24, 64\].* do not fit codes of 4 bits"):
        convert(folder, tmp_path / "detector")
    restate(folder, lambda config: config["quantization_config"].update(dynamic={"+:.*w2": {"bits": 8}}))
    np.testing.assert_array_equal(load(folder)[f"{LAST}.weight"].numpy(), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, r"quant_method: 'awq' is not one of gptq; convert the checkpoint as it was before"),
        ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' is not one of gptq"),
        ({"bits": 5}, r"bits: 5 is not one of 2, 3, 4, 8; quantize it to one of them"),
        ({"bits": True}, "bits: True is not one of"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format: 'marlin' is not one of gptq, gptq_v2.*; save it"),
        ({"checkpoint_format": None, "format": "bitblas"}, "checkpoint_format: 'bitblas'"),
    ],
)
def test_other_kinds_of_quantization_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "packed")
    restate(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(SourceError, match=rf"config\.json: quantization_config\.{message}"):
        convert(folder, tmp_path / "detector")
    assert not list(tmp_path.glob("*detector*"))


def test_settings_that_are_missing_or_no_object_are_refused(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "packed")
    restate(folder, lambda config: config.update(quantization_config="gptq"))
    with pytest.raises(SourceError, match="quantization_config: must be an object, got 'gptq'"):
        convert(folder, tmp_path / "detector")
    restate(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(SourceError, match=r"quantization_config is missing, but .*qweight holds packed codes \(4 such"):
        convert(folder, tmp_path / "detector")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.scales"), r"wqkv\.scales: missing"),
        (lambda t: t.pop(f"{FIRST}.qzeros"), r"wqkv\.qzeros: missing"),
        (lambda t: t.update({f"{FIRST}.scales": torch.zeros(3)}), r"wqkv\.scales: \[3\], which is no shape of it"),
        (lambda t: t.update({f"{FIRST}.g_idx": torch.zeros(9, dtype=torch.int32)}), r"g_idx \[9\] do not fit together"),
        (lambda t: t.update({f"{FIRST}.qweight": torch.zeros(8, 128)}), r"wqkv\.qweight: float32, must be int32"),
        (lambda t: t.update({f"{FIRST}.weight": torch.zeros(128, 64)}), r"wqkv\.weight: there beside .*qweight"),
        (lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][:1]}), "do not fit together"),
    ],
)
def test_a_broken_layer_is_named(change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "packed")
    alter(folder, change)
    with pytest.raises(SourceError, match=rf"1 packed tensors are wrong; copy the checkpoint again:\n  .*{message}"):
        convert(folder, tmp_path / "detector")
    assert not list(tmp_path.glob("*detector*"))


def test_values_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "packed")
    alter(folder, lambda tensors: tensors[f"{FIRST}.g_idx"].add_(7))
    with pytest.raises(SourceError, match=r"wqkv\.g_idx: groups 7 to 8, but .*wqkv\.scales has 0 to 1; copy"):
        convert(folder, tmp_path / "detector")
    assert not (tmp_path / "detector").exists()
    alter(folder, lambda tensors: tensors[f"{FIRST}.g_idx"].sub_(7))
    alter(folder, lambda tensors: tensors[f"{FIRST}.qzeros"].fill_(-1))
    with pytest.raises(SourceError, match=r"wqkv\.qzeros: has the code 15, .* save the checkpoint as 'gptq_v2'"):
        convert(folder, tmp_path / "detector")
    restate(folder, lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))
    convert(folder, tmp_path / "detector")
