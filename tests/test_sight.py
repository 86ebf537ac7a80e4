"""How a vision tower's drawn weights begin: logarithms of fine detail, and heads that look at windows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, load_detector, stored_shapes
from defaker_opt.training import waves
from defaker_opt.training.attune import attune_
from defaker_opt.training.attune_vision import share_channels
from defaker_opt.training.model import JointModel
from defaker_opt.training.positions import BY_POSITION, attend_by_position, gain_of, position_waves
from defaker_opt.training.untouched import hold_untouched_, untouched_channels
from defaker_opt.weights import DrawnWeights

SIDE, WIDTH, HEADS = 4, 96, 3


def drawn(config: DetectorConfig) -> JointModel:
    model = JointModel(Detector(config, DrawnWeights(stored_shapes(config), 0)))
    attune_(model)
    return model


def sighted(tile_size: int = 256, **vision: object) -> DetectorConfig:
    """A tower of 8 px patches whose queries and keys are normalized."""
    whole = load_detector("reference").config
    shape = {"layers": 3, "patch_size": 8, "shuffle": 4, "qk_norm": True, **vision}
    return dataclasses.replace(
        whole,
        tiling=dataclasses.replace(whole.tiling, tile_size=tile_size),
        vision=dataclasses.replace(whole.vision, **shape),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("size", [2, 8, 14])
def test_filters_are_orthonormal_and_all_but_the_first_are_blind_to_light(size: int) -> None:
    order = waves.coarse_to_fine(size)
    assert order[0] == (0, 0)
    assert len(set(order)) == size * size
    chosen = [(wave, direction) for wave in order for direction in (waves.LIGHT, *waves.DIFFERENCES)]
    filters = waves.filters(size, chosen).double().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(len(filters), dtype=torch.float64), atol=1e-6, rtol=0)
    assert filters[3:].sum(1).abs().max() < 1e-5


def test_attention_by_position_is_softmax_attention_that_reads_positions_alone() -> None:
    torch.manual_seed(0)
    waves_here = position_waves(WIDTH, SIDE)
    value = torch.randn(2, HEADS, 1 + SIDE * SIDE, WIDTH // HEADS)
    found, _ = attend_by_position(nn.Identity(), value, value, value)
    for head in range(HEADS):
        scores = torch.zeros(1 + SIDE * SIDE, 1 + SIDE * SIDE)
        for one in range(SIDE * SIDE):
            for other in range(SIDE * SIDE):
                scores[1 + one, 1 + other] = gain_of(head) * float(waves_here[one] @ waves_here[other])
        expected = scores.softmax(-1) @ value[:, head]
        torch.testing.assert_close(found[:, :, head], expected, atol=1e-5, rtol=1e-5)


def test_windows_differ_in_width_and_one_sees_the_whole_tile() -> None:
    gains = [gain_of(head) for head in range(3)]
    assert gains[0] == 0 < gains[1] < gains[2]
    assert [gain_of(head) for head in range(3, 6)] == gains


def test_the_first_net_takes_logarithms_of_detail_in_grey_values() -> None:
    """One wave at a time, of 0…200 grey values: the channel that has most of it follows log(|c| + 0.5)."""
    model = drawn(sighted())
    tower = model.vision_encoder.tower
    layer, patches = tower.encoder.layer[0], tower.embeddings.patch_embeddings.projection
    heights = torch.tensor([0.0, 1, 2, 4, 8, 14, 50, 200])
    wave = 30  # of the order, a fine one of light
    size, grey = patches.kernel_size[0], 1 / (255 * 0.226)
    filters = waves.filters(size, [(waves.coarse_to_fine(size)[1 + wave], waves.LIGHT)])
    for sign in (1, -1):
        pictures = sign * heights[:, None, None, None] * grey * filters
        with torch.no_grad():
            seen = patches(pictures).flatten(2).transpose(1, 2)
            written = layer.mlp(layer.layernorm_after(seen))[:, 0]
        channel = written[:, -78 + wave]
        rise = channel - channel[0]
        steps = heights <= 14
        logarithm = torch.log(heights + 0.5) - math.log(0.5)
        share = float(rise[steps] @ logarithm[steps] / (logarithm[steps] @ logarithm[steps]))
        assert 0.5 < share < 1.5
        assert (rise - share * logarithm)[steps].abs().max() < 0.3 * share
        assert (rise.diff() > 0).all()


def test_light_moves_coefficients_by_less_than_a_grey_value() -> None:
    """The norm's mean is over all channels, so not by nothing."""
    model = drawn(sighted())
    tower = model.vision_encoder.tower
    layer, patches = tower.encoder.layer[0], tower.embeddings.patch_embeddings.projection
    flat = torch.linspace(-2, 2, 5)[:, None, None, None].expand(5, 3, 8, 8)
    with torch.no_grad():
        seen = patches(flat).flatten(2).transpose(1, 2)
        units = layer.mlp.fc1(layer.layernorm_after(seen))[:, 0, : 8 * 79]
    grey_value = 8 * 0.25  # what one raises the units of the first threshold by
    assert (units[:, :79] / grey_value).abs().max() < 1


def test_constants_are_gone_after_the_first_block() -> None:
    model = drawn(sighted())
    tower = model.vision_encoder.tower
    channels = share_channels(192, 79, 16)
    constants = slice(channels.first_constant, channels.first_position)
    with torch.no_grad():
        seen = tower.embeddings.patch_embeddings(torch.randn(1, 3, 256, 256) * 0.5)
        assert seen[..., constants].abs().min() == pytest.approx(30, abs=0.1)
        hidden = torch.cat((tower.embeddings.cls_token, seen), dim=1) + tower.embeddings.position_embeddings
        after = tower.encoder.layer[0](hidden)
    assert after[..., constants].abs().max() < 1.5


@pytest.mark.parametrize(("qk_norm", "likeness"), [(True, 0.999), (False, 0.9)])
def test_attention_of_drawn_weights_begins_with_the_windows(qk_norm: bool, likeness: float) -> None:
    """Without a norm of queries and keys, patches that are loud or quiet see narrower or wider ones."""
    model = drawn(sighted(64, qk_norm=qk_norm))
    tiles = torch.randn(1, 3, 64, 64) * torch.linspace(0.01, 0.3, 64)
    with torch.no_grad():
        true = model._see(tiles[None], "eager")
        windows = model._see(tiles[None], BY_POSITION)
    assert torch.corrcoef(torch.stack([true.flatten(), windows.flatten()]))[0, 1] > likeness
    if qk_norm:
        torch.testing.assert_close(true, windows, atol=0.02, rtol=0.02)


def test_what_attention_reads_positions_by_stays_while_the_tower_learns() -> None:
    model = drawn(sighted(64))
    tower = model.vision_encoder.tower
    hold_untouched_(tower)
    untouched = untouched_channels(tower)
    assert untouched.sum() == 16 + 2
    before = {name: value.clone() for name, value in tower.named_parameters()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.01, weight_decay=0.0)
    tiles = torch.randn(2, 1, 3, 64, 64)
    for _ in range(3):
        optimizer.zero_grad()
        model._see(tiles, BY_POSITION).square().mean().backward()
        optimizer.step()
    assert torch.equal(untouched_channels(tower), untouched)
    moved = tower.embeddings.position_embeddings - before["embeddings.position_embeddings"]
    assert moved[..., untouched].abs().max() == 0 < moved[..., ~untouched].abs().min()
    with torch.no_grad():
        true, windows = (model._see(tiles, name) for name in ("eager", BY_POSITION))
    torch.testing.assert_close(true, windows, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_size": 32, "heads": 2, "intermediate_size": 64},
        {"norm": "rms_norm", "qkv_bias": False, "qk_norm": True},
        {"patch_size": 16, "shuffle": 2, "hidden_size": 384, "heads": 6, "intermediate_size": 1536},
    ],
)
def test_towers_of_other_shapes_begin_attuned_too(vision: dict[str, object]) -> None:
    model = drawn(sighted(64, **vision))
    tiles = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        for attention in ("eager", BY_POSITION):
            patches = model._see(tiles, attention)
            assert patches.isfinite().all()
            assert patches.std() > 0.01


def test_fine_detail_survives_bfloat16() -> None:
    """A grey value beside bright light: under autocast the patch embedding still computes in float32."""
    model = drawn(sighted())
    patches = model.vision_encoder.tower.embeddings.patch_embeddings.projection
    picture = torch.full((1, 3, 8, 8), 2.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert patches(picture).dtype == torch.float32
        assert patches(picture)[0, :79].abs().max() < 0.001
