"""NVIDIA ModelOpt as the quantizer: its codes are ours, its recipes make builds, its mistakes are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import linear_weights, load_detector
from defaker_opt.errors import PassError
from defaker_opt.files import default_cache_folder
from defaker_opt.observe.inputs import calibration_inputs
from defaker_opt.passes._modelopt import _config, _quantize_, codes_of
from defaker_opt.passes.modelopt import Modelopt, _spread
from defaker_opt.recipe import load_recipe, parse_recipe
from defaker_opt.runtime import open_build, open_session
from defaker_opt.sample import sample_image
from defaker_opt.samples import load_samples
from defaker_opt.strict import Invalid
from defaker_opt.target import load_target
from tests.conftest import MODELOPT_PARAMS, shared_build

needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"
)
SHAPES = {"language.a.weight": (24, 128), "language.b.weight": (8, 192)}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (rows, columns) in (("a", (24, 128)), ("b", (8, 192))):
            layer = nn.Linear(columns, rows)
            layer.weight.data = torch.randn(rows, columns, generator=generator)
            layer.weight.data[1] = 0
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(y)  # type: ignore[operator]


def inputs() -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(4)
    calls = [tuple(torch.randn(9, n, generator=generator) for n in (128, 192)) for _ in range(3)]
    for x, _ in calls:
        x[:, 5] *= 30
    return calls


@needs_modelopt
@pytest.mark.parametrize(
    ("algorithm", "error", "same"), [("int8-smoothquant", 0.03, 2e-3), ("int4-awq", 0.1, 1e-2), ("fp8", 0.05, 0.04)]
)
def test_codes_are_those_that_modelopt_computes_with(algorithm: str, error: float, same: float) -> None:
    module, before, calls = TwoLayers(), TwoLayers(), inputs()
    _quantize_(module, algorithm, SHAPES, lambda: iter(calls), 6.0)
    for index, name in enumerate(("a", "b")):
        layer = module.get_submodule(name)
        codes = codes_of(layer)
        assert codes is not None and not codes.dequantize()[1].any() and (codes.scale > 0).all()
        exact = before.get_submodule(name)(calls[0][index]).detach().numpy()
        # What the layer computes with its quantizers, from our codes alone.
        x = calls[0][index].numpy()
        factored = x if codes.input_factor is None else x * codes.input_factor
        if codes.input_scale is not None and codes.scheme.bits == 8 and not codes.scheme.floating:
            factored = np.clip(np.rint(factored / codes.input_scale), -128, 127) * codes.input_scale
        plain = codes.dequantize() if codes.input_factor is None else codes.dequantize() / codes.input_factor
        got = layer(calls[0][index]).detach().numpy()
        ours = factored @ plain.T + layer.bias.detach().numpy()  # type: ignore[union-attr]
        assert np.linalg.norm(got - ours) <= same * np.linalg.norm(got)
        assert np.linalg.norm(ours - exact) <= error * np.linalg.norm(exact)


@needs_modelopt
def test_blocks_fit_the_columns_of_each_layer() -> None:
    module = TwoLayers()
    _quantize_(module, "int4-awq", SHAPES, lambda: iter(inputs()), 6.0)
    first, second = (codes_of(module.get_submodule(name)) for name in "ab")
    assert first is not None and second is not None
    assert [str(codes.scheme) for codes in (first, second)] == ["int4-sym-g128", "int4-sym-g64"]
    assert first.scale.shape == (24, 1)
    scale = second.scale
    assert scale.shape == (8, 3) and np.array_equal(scale, scale.astype(np.float16).astype(np.float32))


def test_every_layer_is_named_as_modelopt_has_its_own_rules_for_names() -> None:
    config = _config("int8-smoothquant", {"mask_encoder.trunk.blocks.0.mlp.proj_out.weight": (8, 64)})
    names = [entry["quantizer_name"] for entry in config["quant_cfg"]]
    assert names == ["*", *(f"trunk.blocks.0.mlp.proj_out.{kind}_quantizer" for kind in ("weight", "input"))]


@needs_modelopt
@pytest.mark.parametrize("recipe", MODELOPT_PARAMS)
def test_the_whole_line_gives_a_verdict_near_floats(recipe: str, builds: Path, float_build: Path) -> None:
    build = open_build(shared_build(builds, recipe))
    image = Image.fromarray(sample_image())
    ours, whole = (open_session(each).judge(image, gate=0.0) for each in (build, open_build(float_build)))
    assert np.abs(ours.verdict_logits - whole.verdict_logits).max() < 0.5
    assert ours.mask is not None and whole.mask is not None
    assert (ours.mask != whole.mask).mean() < 0.03
    notes = build.manifest.data["passes"][0]["modelopt"]
    searched = 32 if recipe == "modelopt-int4" else 128
    assert notes["pictures"] == {"vision_encoder": 128, "language": searched, "mask_encoder": 128}
    assert notes["modelopt"].startswith("0.")
    assert set(notes["left_in_float"]) == {"language.verdict_head.weight"}
    assert len(notes["quantized"]) > 60


@needs_modelopt
def test_auto_keeps_to_its_bits() -> None:
    detector = load_detector("reference")
    samples = _spread(load_samples("embedded", default_cache_folder(), lambda what, fraction: None), 2)
    Modelopt({"language": "auto"}, ("language.verdict_head.*",), 6.0, 2).apply(detector, lambda what, f: None, samples)
    bits = {name: codes.scheme.bits for name, codes in detector.codes.items()}
    assert set(bits.values()) == {4, 8}, "it chose one format for all"
    sizes = {name: codes.codes.size for name, codes in detector.codes.items()}
    everything = sum(math.prod(s) for n, s in linear_weights(detector.config, "language").items() if "layers" in n)
    whole = 16 * (everything - sum(sizes.values()))  # what it leaves in float counts as 16 bits
    assert (sum(bits[name] * sizes[name] for name in bits) + whole) / everything <= 6.0


@needs_modelopt
@pytest.mark.parametrize("algorithm", ["int8-smoothquant", "auto"])
def test_what_a_killed_run_left_is_not_quantized_again(algorithm: str) -> None:
    samples = _spread(load_samples("embedded", default_cache_folder(), lambda what, fraction: None), 2)
    each = Modelopt({"language": algorithm}, ("language.verdict_head.*",), pairs=2)
    whole, resumed = (dataclasses.replace(load_detector("reference"), codes={}) for _ in range(2))
    each.apply(whole, lambda what, fraction: None, samples)
    for name in list(whole.codes)[:5]:
        resumed.codes[name] = whole.codes[name]
    each.apply(resumed, lambda what, fraction: None, samples)
    assert whole.codes.keys() == resumed.codes.keys()
    for name, codes in whole.codes.items():
        assert np.array_equal(codes.codes, resumed.codes[name].codes), name
        assert codes.scheme == resumed.codes[name].scheme


def test_pairs_are_spread_over_the_set_and_stay_together() -> None:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    few = _spread(whole, 16)
    assert len(few) == 32 and few.items[0] == whole.items[0] and _spread(whole, 1000) == whole
    labels = [item.label for item in few.items]
    assert labels.count(1) == 16
    assert len(list(calibration_inputs(load_detector("reference"), "mask_encoder", _spread(whole, 1)))) == 2


def reference_config() -> DetectorConfig:
    return load_detector("reference").config


@needs_modelopt
def test_what_a_target_does_not_run_is_refused() -> None:
    with pytest.raises(PassError, match=r"fp8-static cannot run on target orin-nano-super-8gb, which runs float"):
        Modelopt({"language": "fp8"}).check(reference_config(), load_target("orin-nano-super-8gb"))
    with pytest.raises(PassError, match=r"keep: 'language.lm_head.\*' matches no linear layer of language"):
        Modelopt({"language": "int4-awq"}, ("language.lm_head.*",)).check(reference_config(), load_target("a10"))
    language = dataclasses.replace(reference_config().language, intermediate_size=480)
    narrow = dataclasses.replace(reference_config(), language=language)
    with pytest.raises(PassError, match=r"share no blocks that engines take \(language\S*down_proj.weight has 480\)"):
        Modelopt({"language": "auto"}).check(narrow, load_target("a10"))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"stages": {"language": "int4"}}, "language: 'int4' is not one of .*int4-awq"),
        ({"stages": {"mask_decoder": "fp8"}}, "'mask_decoder' is not one of .*stays in float"),
        ({"stages": {}}, "must not be empty"),
        ({"stages": {"language": "auto"}, "effective_bits": 3}, "effective_bits: must be at least 4.5"),
        ({"stages": {"language": "fp8"}, "pairs": 0}, "pairs: must be 1 or more, got 0"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_place(written: dict[str, object], words: str) -> None:
    from defaker_opt.errors import ConfigError

    data = {"description": "mine", "source": "reference", "target": "a10", "passes": [{"modelopt": written}]}
    with pytest.raises(ConfigError, match=words):
        parse_recipe("mine", data, "mine.yaml")


def test_auto_is_for_the_language_part() -> None:
    with pytest.raises(Invalid, match="auto is for the language part"):
        Modelopt({"vision_encoder": "auto"})


def test_without_the_package_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    (each,) = load_recipe("modelopt-int8").passes
    with pytest.raises(PassError, match=r"'modelopt\S*' is not installed; pip install 'defaker-opt\[modelopt\]'"):
        each.check(reference_config(), load_target("a10"))
