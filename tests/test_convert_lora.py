"""LoRA in a checkpoint or beside it: merged as the formula says, and refused where anything of it is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defaker_opt.checkpoint import Extras
from defaker_opt.convert import convert
from defaker_opt.detector import load_detector
from defaker_opt.errors import SourceError
from tests.conftest import defaker_opt
from tests.reference.checkpoint import HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, VIT, write_checkpoint

RANK, ALPHA = 4, 16.0
TARGETS = {
    "language_model.model.layers.0.attention.wqkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "language_model.model.layers.1.feed_forward.w2": (HIDDEN, INNER),
    "vision_model.encoder.layers.1.attn.qkv": (3 * VIT, VIT),
}
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["wqkv", "w2", "qkv"]}

Tensors = dict[str, torch.Tensor]


def sides(seed: int = 9) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(RANK, inner, generator=generator), torch.randn(out, RANK, generator=generator))
        for module, (out, inner) in TARGETS.items()
    }


def merged(base: Tensors, factor: float) -> Tensors:
    """The slow twin: float64, row by row."""
    result = dict(base)
    for module, (down, up) in sides().items():
        weight = base[f"{module}.weight"].double().clone()
        for row in range(weight.shape[0]):
            for rank in range(RANK):
                weight[row] += factor * up[row, rank].double() * down[rank].double()
        result[f"{module}.weight"] = weight.to(base[f"{module}.weight"].dtype)
    return result


def assert_same(left: Path, right: Path) -> None:
    one, other = load_detector(str(left)).weights, load_detector(str(right)).weights
    assert one.shapes() == other.shapes()
    for name in one.shapes():
        a, b = one.read(name), other.read(name)
        assert a.dtype == b.dtype
        # Rounded once to the same type: one unit in the last place apart at the most, or nearly zero.
        np.testing.assert_allclose(
            a.float().numpy(), b.float().numpy(), rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "internlm2", request.param)


def expected(checkpoint: Path, factor: float) -> Path:
    """The detector of a checkpoint that was merged before."""
    folder = checkpoint.parent / "merged"
    shutil.copytree(checkpoint, folder)
    save_file(merged(load_file(checkpoint / "model.safetensors"), factor), folder / "model.safetensors")
    convert(folder, checkpoint.parent / "expected")
    return checkpoint.parent / "expected"


def write_adapter(folder: Path, prefix: str = "base_model.model.", drop: str = "", **changes: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (down, up) in sides().items():
        tensors[f"{prefix}{module.removeprefix(drop)}.lora_A.weight"] = down
        tensors[f"{prefix}{module.removeprefix(drop)}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5), ({"lora_alpha": 1}, 0.25)],
)
def test_an_adapter_folder_is_merged(checkpoint: Path, changes: dict[str, Any], factor: float, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", **changes)
    done = convert(checkpoint, tmp_path / "detector", extras=Extras(adapters=(adapter,)))
    assert_same(tmp_path / "detector", expected(checkpoint, factor))
    assert f"LoRA merged into 3 weights, B A times {factor:g}" in done.notes
    plain = convert(checkpoint, tmp_path / "plain")
    assert plain.used == done.used
    changed = load_detector(str(tmp_path / "plain")).weights.digest()
    assert changed != load_detector(str(tmp_path / "detector")).weights.digest()


def test_an_adapter_of_the_language_model_alone_finds_its_place(checkpoint: Path, tmp_path: Path) -> None:
    """PEFT around `language_model` writes names without it; the vision module here is named in full."""
    adapter = write_adapter(tmp_path / "adapter", drop="language_model.")
    convert(checkpoint, tmp_path / "detector", extras=Extras(adapters=(adapter,)))
    assert_same(tmp_path / "detector", expected(checkpoint, ALPHA / RANK))


def test_two_adapters_are_both_added(checkpoint: Path, tmp_path: Path) -> None:
    adapters = tuple(write_adapter(tmp_path / name, lora_alpha=alpha) for name, alpha in (("a", 4), ("b", 12)))
    convert(checkpoint, tmp_path / "detector", extras=Extras(adapters=adapters))
    read = load_detector(str(tmp_path / "detector")).weights.read
    name = "language.layers.1.mlp.down_proj.weight"
    once = load_detector(str(expected(checkpoint, 4.0))).weights.read(name)
    np.testing.assert_allclose(read(name).float().numpy(), once.float().numpy(), rtol=2**-6, atol=2**-6)


def test_patterns_of_rank_and_alpha_count(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", r=99, rank_pattern={"wqkv": RANK, "w2": RANK, r".*\.qkv": RANK}, alpha_pattern={"w2": 2.0}
    )
    done = convert(checkpoint, tmp_path / "detector", extras=Extras(adapters=(adapter,)))
    assert "LoRA merged into 3 weights, B A times 0.5, 4" in done.notes


def wrap(folder: Path, base_layer: bool = True) -> None:
    """Rename the tensors of a checkpoint as PEFT's wrappers do, and add the adapter."""
    tensors = load_file(folder / "model.safetensors")
    wrapped: Tensors = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        module = name.rpartition(".")[0]
        if base_layer and module in TARGETS:
            rest = rest.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        inner = "base_model.model." if part in ("language_model", "vision_model") else ""
        wrapped[f"{part}.{inner}{rest}"] = tensor
    for module, (down, up) in sides().items():
        part, _, rest = module.partition(".")
        wrapped[f"{part}.base_model.model.{rest}.lora_A.default.weight"] = down
        wrapped[f"{part}.base_model.model.{rest}.lora_B.default.weight"] = up
    save_file(wrapped, folder / "model.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def set_facts(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / "checkpoint_meta.json").read_text())
    (folder / "checkpoint_meta.json").write_text(json.dumps({**facts, **changes}))


@pytest.mark.parametrize("base_layer", [True, False], ids=["base_layer", "older names"])
@pytest.mark.parametrize("place", ["facts", "peft", "released code"])
def test_an_adapter_inside_a_checkpoint_is_merged(
    checkpoint: Path, base_layer: bool, place: str, tmp_path: Path
) -> None:
    factor = 2.0 if place == "released code" else ALPHA / RANK
    right = expected(checkpoint, factor)
    wrap(checkpoint, base_layer)
    if place == "facts":
        set_facts(checkpoint, lora_alpha=ALPHA)
    elif place == "peft":
        (checkpoint / "adapter_config.json").write_text(json.dumps(CONFIG))
    else:
        set_config(checkpoint, use_llm_lora=RANK)
    done = convert(checkpoint, tmp_path / "detector")
    assert_same(tmp_path / "detector", right)
    assert any(note.startswith("LoRA merged into 3 weights") for note in done.notes)


def test_modules_that_were_trained_whole_replace_the_originals(checkpoint: Path, tmp_path: Path) -> None:
    set_facts(checkpoint, lora_alpha=ALPHA)
    wrap(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "language_model.base_model.model.output"
    original = tensors.pop(f"{name}.weight")
    tensors[f"{name}.original_module.weight"] = original
    tensors[f"{name}.modules_to_save.default.weight"] = original + 1
    save_file(tensors, checkpoint / "model.safetensors")
    done = convert(checkpoint, tmp_path / "detector")
    assert torch.equal(load_detector(str(tmp_path / "detector")).weights.read("language.lm_head.weight"), original + 1)
    assert "1 modules that were trained beside LoRA replace 1 original tensors" in done.notes


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        (found,) = (each for each in tensors if name in each)
        del tensors[found]
        save_file(tensors, file)

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)

    return change


def narrow(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("w2.lora_B.weight"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file)


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes})) and None


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no A": (without("w2.lora_A"), r"an incomplete adapter lacks .*w2\.lora_A"),
    "no B": (without("wqkv.lora_B"), r"an incomplete adapter lacks .*wqkv\.lora_B"),
    "rank": (with_config(r=8), r"lora_A.* has rank 4, but r = 8 is stated"),
    "shape": (narrow, r"w2.*lora_B.*\[63, 4\].*do not fit together; is it an adapter of this checkpoint"),
    "module": (rename(".w2.", ".w4."), r"w4\.weight is not in the checkpoint"),
    "kind": (rename("w2.lora_A", "w2.lora_embedding_A"), r"lora_embedding_A.*only lora_A and lora_B are merged"),
    "dora": (with_config(use_dora=True), "use_dora is True, which is not merged here; merge it with PEFT first"),
    "transposed": (with_config(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "bias": (with_config(bias="all"), "bias is 'all'; only 'none' is merged"),
    "type": (with_config(peft_type="IA3"), "peft_type is 'IA3'; only 'LORA' is merged"),
    "alpha": (with_config(lora_alpha="16"), "lora_alpha must be a number above 0, got '16'"),
    "alpha missing": (with_config(lora_alpha=None), "lora_alpha must be a number above 0, got None"),
    "pattern": (with_config(rank_pattern=[1]), "rank_pattern must be a mapping"),
    "pattern values": (with_config(alpha_pattern={"w2": "x"}), "alpha_pattern: w2 must be a number above 0"),
    "pattern text": (with_config(alpha_pattern={"(": 3}), r"alpha_pattern: \( is no pattern"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config\.json: missing or not"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"no adapter_model\.safetensors in it",
    ),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"adapter_model\.bin would have to be unpickled, which is never done",
    ),
    "cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 20),
        r"adapter_model\.safetensors: cannot be read",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_is_named(broken: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    adapter = write_adapter(tmp_path / "adapter")
    change, words = BROKEN[broken]
    change(adapter)
    with pytest.raises(SourceError, match=words) as caught:
        convert(checkpoint, tmp_path / "out" / "detector", extras=Extras(adapters=(adapter,)))
    assert str(adapter) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [None, "16", 0, True])
def test_an_adapter_inside_a_checkpoint_needs_its_alpha(alpha: object, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    wrap(checkpoint)
    if alpha is not None:
        set_facts(checkpoint, lora_alpha=alpha)
    words = "does not say by which alpha" if alpha is None else "lora_alpha must be a number above 0"
    with pytest.raises(SourceError, match=words):
        convert(checkpoint, tmp_path / "detector")


def test_several_adapters_inside_a_checkpoint_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    set_facts(checkpoint, lora_alpha=ALPHA)
    wrap(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {n.replace("default", "other") if ".w2." in n else n: t for n, t in tensors.items()}
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(SourceError, match="holds several adapters, default, other; export one of them"):
        convert(checkpoint, tmp_path / "detector")


def test_the_command_merges_and_says_so(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    adapter = write_adapter(tmp_path / "adapter")
    done = defaker_opt("convert", checkpoint, "--adapter", adapter, "-o", tmp_path / "detector")
    assert done.returncode == 0, done.stderr
    assert "note: LoRA merged into 3 weights, B A times 4" in done.stdout
    wrong = defaker_opt("convert", checkpoint, "--adapter", tmp_path / "no", "-o", tmp_path / "out" / "detector")
    assert wrong.returncode == 2
    assert "adapter_config.json: missing or not a JSON object; give a folder that PEFT's" in wrong.stderr
    assert not (tmp_path / "out").exists()
