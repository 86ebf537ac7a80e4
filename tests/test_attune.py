"""What drawn weights begin with before training: waves, and channels that tell how much fine detail there is."""

from __future__ import annotations

import pytest
import torch

from defaker_opt.detector import load_detector
from defaker_opt.training import Phase, Plan, loop
from defaker_opt.training.attune import attune_, band_sums, wave_filters
from defaker_opt.training.model import JointModel


@pytest.mark.parametrize(("size", "light", "colour", "coarse"), [(14, 96, 48, 20), (7, 24, 12, 13), (4, 8, 4, 3)])
def test_waves_are_orthogonal_and_fine_ones_are_blind_to_light(size: int, light: int, colour: int, coarse: int) -> None:
    filters = wave_filters(size, light, colour, coarse).double().flatten(1)
    assert len(filters) == light + colour + coarse
    unit = filters / filters.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(len(filters), dtype=torch.float64), atol=1e-6, rtol=0)
    flat = torch.ones(3 * size * size, dtype=torch.float64)
    assert (filters[: light + colour] @ flat).abs().max() < 1e-4 * filters[0].norm()
    ramp = torch.arange(size, dtype=torch.float64).expand(3, size, size).flatten()
    coarsest, finest = unit[light + colour :] @ ramp, unit[:light] @ ramp
    assert finest.abs().max() < 0.06 * coarsest.abs().max()


def test_grey_detail_does_not_show_in_waves_of_colour() -> None:
    filters = wave_filters(7, 24, 12, 4)
    grey = torch.randn(7, 7, generator=torch.manual_seed(0)).expand(3, 7, 7)
    found = (filters * grey).sum((1, 2, 3))
    assert found[24:36].abs().max() < 1e-4 < found[:24].abs().min()


@pytest.mark.parametrize(("light", "colour", "strength"), [(96, 48, 20), (24, 12, 13), (8, 4, 4), (8, 0, 4)])
def test_bands_are_means_and_cover_every_wave(light: int, colour: int, strength: int) -> None:
    sums = band_sums(light, colour, strength)
    assert sums.shape == (strength, light + colour)
    torch.testing.assert_close(sums.sum(1), torch.ones(strength))
    assert (sums >= 0).all()
    assert (sums.sum(0) > 0).all()
    assert len({tuple(row.tolist()) for row in sums}) == strength


def test_strength_grows_with_grain_and_says_nothing_of_light() -> None:
    torch.manual_seed(0)
    model = JointModel(load_detector("reference:random"))
    attune_(model)
    trunk, size, strengths = model.mask_encoder.trunk, 224, 13
    block = trunk.blocks[0]
    grain = torch.randn(1, 3, size, size)
    gradient = torch.linspace(-2, 2, size).expand(1, 3, size, size)
    pictures = torch.cat([gradient + sigma * grain for sigma in (0.01, 0.03, 0.06, 0.12, 0.24)])
    with torch.no_grad():
        seen = trunk.patch_embed.projection(pictures).flatten(2).transpose(1, 2)
        found = block.mlp(block.layer_norm2(seen))[..., -strengths:]  # without the attention before it
    means = found.mean((1, 2))
    assert (means.diff() > 0.05).all(), means
    # Grain twice as strong is told apart patch by patch, whatever light the patch has.
    assert (found[1].mean(-1) < found[3].mean(-1)).float().mean() > 0.99


@pytest.mark.parametrize(("source", "kept"), [("reference", True), ("reference:random", False)])
def test_only_drawn_weights_begin_attuned(source: str, kept: bool) -> None:
    detector = load_detector(source)
    plan = Plan((Phase("verdict", 16),))
    model = loop._begin(detector, plan, loop.Machine(torch.device("cpu"), 0)).model
    before = detector.read("vision_encoder.tower.embeddings.patch_embeddings.projection.weight")
    assert torch.equal(model.vision_encoder.tower.embeddings.patch_embeddings.projection.weight.data, before) is kept
