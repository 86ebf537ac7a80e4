"""Smoothing moves large channels into weights, and in float changes no bit of what a detector computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from defaker_opt.detector import Detector, load_detector
from defaker_opt.errors import PassError
from defaker_opt.files import default_cache_folder
from defaker_opt.observe import recorded
from defaker_opt.observe.inputs import question_inputs, tile_inputs, whole_inputs
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.passes.smooth import Smooth
from defaker_opt.samples import Samples, load_samples
from defaker_opt.target import load_target


@pytest.fixture(scope="module")
def samples() -> Samples:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return Samples(whole.name, whole.digest, whole.items[:2])


@pytest.fixture(scope="module")
def smoothed(samples: Samples) -> Detector:
    detector = load_detector("reference")
    result = Smooth().apply(detector, lambda what, fraction: None, samples)
    assert max(result.notes["largest_power_of_two"].values()) >= 1
    return detector


def run(
    detector: Detector, stage: str, samples: Samples, watched: str
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """A stage's outputs on the first picture, and the inputs of one of its layers there."""
    module = detector.load_stage(stage)
    with torch.inference_mode(), recorded({watched: module.get_submodule(watched)}) as seen:
        if stage == "mask_encoder":
            outputs = module(*next(iter(whole_inputs(detector, samples))).tensors)
        elif stage == "vision_encoder":
            outputs = module(*next(iter(tile_inputs(detector, samples))).tensors)
        else:
            generator = torch.Generator().manual_seed(0)
            vision = (torch.randn(1, 64, 192, generator=generator), torch.arange(64)[None])
            outputs = module(*question_inputs(detector, [vision], None)[0].tensors)
    return outputs, seen[watched][0]


@pytest.mark.parametrize(
    ("stage", "watched"),
    [
        ("vision_encoder", "tower.encoder.layer.1.mlp.fc1"),
        ("language", "layers.1.mlp.down_proj"),
        ("mask_encoder", "trunk.blocks.1.attn.qkv"),
    ],
)
def test_in_float_nothing_changes_but_the_channels_within(
    stage: str, watched: str, samples: Samples, smoothed: Detector
) -> None:
    before, x = run(load_detector("reference"), stage, samples, watched)
    after, smooth_x = run(smoothed, stage, samples, watched)
    for one, other in zip(before, after):
        assert torch.equal(one, other)
    ratio = (x / smooth_x)[x != 0]
    assert torch.equal(torch.exp2(torch.log2(ratio).round()), ratio)
    assert float(ratio.max()) > float(ratio.min())


def test_the_reach_of_channels_becomes_more_even(samples: Samples, smoothed: Detector) -> None:
    def unevenness(detector: Detector) -> float:
        _, x = run(detector, "vision_encoder", samples, "projector.1")
        largest = x.abs().flatten(0, -2).amax(0)
        return float(torch.log2(largest[largest > 0]).std())

    assert unevenness(smoothed) < unevenness(load_detector("reference"))


def test_factors_are_those_of_the_paper_to_the_nearest_power_of_two() -> None:
    largest, weight = np.array([8.0, 1.0, 2.0, 0.0]), np.array([[0.5, -2.0, 0.5, 1.0], [-0.25, 1.0, 0.125, 1.0]])
    powers = Smooth(strength=0.5)._powers(largest, [weight])
    plain = [np.log2(8**0.5 / 0.5**0.5), np.log2(1 / 2**0.5), np.log2(2**0.5 / 0.5**0.5)]
    assert powers.tolist() == [round(value - np.median(plain)) for value in plain] + [0]


def test_scales_of_two_calls_multiply() -> None:
    detector = replace(load_detector("reference"), scales={})
    name = "language.layers.0.mlp.up_proj.weight"
    plain = detector.read(name)
    detector.scale_(name, rows=np.full(512, 2, np.float32))
    detector.scale_(name, rows=np.full(512, 4, np.float32), columns=np.full(192, 0.5, np.float32))
    assert torch.equal(detector.read(name), plain * 4)


def test_a_glob_that_matches_no_norms_reader_is_an_error() -> None:
    with pytest.raises(PassError, match="matches no layer that reads a norm"):
        Smooth("mask_decoder.*").check(load_detector("reference").config, load_target("cpu"))


def test_a_run_that_was_killed_in_the_pass_behind_it_goes_on(samples: Samples, smoothed: Detector) -> None:
    """What a later pass left in the spool must not decide what is folded."""
    detector = replace(load_detector("reference"), codes={}, scales={})
    Quantize((Rule("vision_encoder.*", "int8"), Rule("*", "float"))).apply(detector, lambda what, fraction: None)
    assert detector.codes
    Smooth().apply(detector, lambda what, fraction: None, samples)
    assert detector.scales.keys() == smoothed.scales.keys()
    for name, (rows, columns) in smoothed.scales.items():
        assert torch.equal(rows, detector.scales[name][0]) and torch.equal(columns, detector.scales[name][1])
