"""How a vision tower's drawn weights begin: with waves of 8 px that see single grey values, and their logarithms.

What a forgery disturbs (noise, the steps of a codec, resampling) is a few grey values high and lies in differences
between places. So the patch embedding is a cosine transform, the first feed-forward net turns each coefficient c into
pieces of log(|c| + 0.5), mixed, and heads compare a place with wider and wider windows around it (`positions`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionLayer,
    InternVLVisionMLP,
)

from defaker_opt.runtime.images import IMAGENET_STD
from defaker_opt.training import waves
from defaker_opt.training.model import JointModel
from defaker_opt.training.positions import gain_of, position_waves

# What one grey value of 0…255 is in a normalized picture, to the same for all colours.
_GREY = 1 / (255 * float(IMAGENET_STD.mean()))

# Height of a wave's channel for each grey value of its coefficient: in the residual stream, and before the logarithms.
_UNIT, _SHARP_UNIT = 0.02, 0.25

_MEAN_GAIN = 0.1

# Constant channels outweigh all others, so that the first norms scale every patch alike.
_CONSTANT, _CONSTANT_SEEN = 30.0, 0.3

# Positions are to be read beside channels that grow while training.
_POSITION = 15.0

# log(|c| + 0.5) in straight pieces: where each begins (grey values), how much it rises, how sharply GELU bends there.
_THRESHOLDS, _RISES, _TAIL, _SLOPES = (0.0, 1.0, 4.0, 14.0), (1.1, 1.1, 1.17), 0.02, (8.0, 4.0, 2.0, 1.0)

# Coarse waves of both colour differences; codecs that halve colour planes erase the fine ones.
_TINTED = 8

# Gains of drawn weights that begin quiet: the first block's attention, other units of its net, what writes elsewhere.
_QUIET_ATTENTION, _QUIET_UNITS, _QUIET_ELSEWHERE = 0.02, 0.3, 0.01


@dataclass(frozen=True)
class Channels:
    """How the channels of the residual stream are used, in this order: [0, waves), [waves, constants), and so on."""

    waves: int  # of light, then of colour differences
    means: int  # light and colour of the patch
    constants: int
    positions: int
    free: int  # empty until the first feed-forward net fills them

    @property
    def first_constant(self) -> int:
        """Where the constant channels begin."""
        return self.waves + self.means

    @property
    def first_position(self) -> int:
        """Where positions begin."""
        return self.first_constant + self.constants

    @property
    def first_free(self) -> int:
        """Where free channels begin."""
        return self.first_position + self.positions

    @property
    def untouched(self) -> list[int]:
        """What no block may write to: positions, and two constants (one of each sign) that tell the norm's mean."""
        return [*self.reference, *range(self.first_position, self.first_free)]

    @property
    def reference(self) -> list[int]:
        """The two constants. Their mean, 0 before a norm, is what the norm moves every channel by."""
        return [self.first_constant, self.first_constant + 1]


@torch.no_grad()
def attune_vision_(model: JointModel) -> None:
    """Give the patch embedding, the positions and every block their beginning; the rest stays as drawn."""
    encoder = model.vision_encoder
    embeddings, blocks = encoder.tower.embeddings, encoder.tower.encoder.layer
    patches = embeddings.patch_embeddings.projection
    positions = position_waves(patches.out_channels, encoder.side)
    chosen = _chosen_waves(patches.out_channels, patches.kernel_size[0])
    channels = share_channels(patches.out_channels, len(chosen), positions.shape[1])
    _attune_patches_(patches, chosen, channels)
    embeddings.position_embeddings.zero_()
    embeddings.position_embeddings[0, 1:, channels.first_position : channels.first_free] = _POSITION * positions
    embeddings.cls_token[0, 0] = patches.bias
    for number, block in enumerate(blocks):
        block.lambda_1.fill_(1)
        block.lambda_2.fill_(1)
        _attune_norms_(block, channels, first=number == 0)
        _attune_likeness_(block, channels, first=number == 0)
        _attune_attention_(block.attention, channels, first=number == 0)
        block.mlp.fc2.weight[channels.waves : channels.first_free] *= _QUIET_ELSEWHERE
        block.mlp.fc2.bias[: channels.first_free] = 0
    _attune_logarithms_(blocks[0].mlp, channels)
    for block in blocks:
        for read in (block.attention.v_proj, block.mlp.fc1):
            read.weight[:, channels.untouched] = 0
        for written in (block.attention.projection_layer, block.mlp.fc2):
            written.weight[channels.untouched] = 0
    # Their work is done; the norms that follow are to scale each patch by what it holds.
    constants = slice(channels.first_constant, channels.first_position)
    blocks[0].mlp.fc2.bias[constants] = -patches.bias[constants]
    norm = encoder.projector[0]
    assert isinstance(norm, nn.LayerNorm), "the projector begins with a norm"
    norm.weight.fill_(1)
    norm.bias.zero_()


def _chosen_waves(width: int, size: int) -> list[tuple[waves.Wave, waves.Direction]]:
    """A third of the channels at most for waves of light, a twelfth for colour's; coarse ones first."""
    order = waves.coarse_to_fine(size)[1:]
    light = [(wave, waves.LIGHT) for wave in order[: width // 3]]
    tinted = [(wave, direction) for wave in order[:_TINTED] for direction in waves.DIFFERENCES]
    return light + tinted[: width // 12]


def share_channels(width: int, chosen: int, positions: int) -> Channels:
    """Channels of a tower that is `width` wide, of which some are waves and positions."""
    constants = 2 * max(1, width // 24)
    means = 3
    return Channels(chosen, means, constants, positions, width - chosen - means - constants - positions)


def _attune_patches_(patches: nn.Conv2d, chosen: list[tuple[waves.Wave, waves.Direction]], channels: Channels) -> None:
    size = patches.kernel_size[0]
    means = [((0, 0), direction) for direction in (waves.LIGHT, *waves.DIFFERENCES)]
    patches.weight.zero_()
    patches.weight[: channels.waves] = waves.filters(size, chosen) * (_UNIT / _GREY)
    patches.weight[channels.waves : channels.first_constant] = waves.filters(size, means) * _MEAN_GAIN
    assert patches.bias is not None, "InternViT's patch embedding has a bias"
    patches.bias.zero_()
    signs = torch.tensor([1.0, -1.0]).repeat(channels.constants // 2)
    patches.bias[channels.first_constant : channels.first_position] = _CONSTANT * signs


def _attune_norms_(block: InternVLVisionLayer, channels: Channels, *, first: bool) -> None:
    """The first block's norms divide by what the constants come to, and multiply by it again."""
    power = _CONSTANT**2 * channels.constants + _POSITION**2 / 2 * channels.positions
    height = math.sqrt(power / len(block.layernorm_before.weight))
    for norm, sharper in ((block.layernorm_before, 1.0), (block.layernorm_after, _SHARP_UNIT / _UNIT)):
        norm.weight.fill_(height if first else 1)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
        if first:
            norm.weight[: channels.waves] *= sharper
            norm.weight[channels.first_constant : channels.first_position] = _CONSTANT_SEEN * height / _CONSTANT


def _attune_attention_(attention: InternVLVisionAttention, channels: Channels, *, first: bool) -> None:
    """Heads read free channels, and write where the first block had its waves."""
    width, size = attention.embed_dim, attention.head_dim
    attention.v_proj.weight[:, : channels.first_free] = 0
    attention.v_proj.weight *= math.sqrt(width / channels.free)
    if attention.v_proj.bias is not None:
        attention.v_proj.bias.zero_()
    attention.projection_layer.bias.zero_()
    if first:
        attention.projection_layer.weight *= _QUIET_ATTENTION
        return
    drawn = attention.projection_layer.weight.clone()
    attention.projection_layer.weight *= _QUIET_ELSEWHERE
    ends = [round(channels.waves * head / attention.num_heads) for head in range(attention.num_heads + 1)]
    for head in range(attention.num_heads):
        block = (slice(ends[head], ends[head + 1]), slice(head * size, (head + 1) * size))
        attention.projection_layer.weight[block] = drawn[block] * math.sqrt(width / size)


def _attune_likeness_(block: InternVLVisionLayer, channels: Channels, *, first: bool) -> None:
    """Queries and keys are positions, and nothing for a head that sees the whole tile.

    Where they are normalized (`qk_norm`), how loud a patch is says nothing, so attention looks at the very windows.
    """
    attention, gains = block.attention, block.layernorm_before.weight
    size, positions, reference = attention.head_dim, channels.positions, torch.tensor(channels.reference)
    looking = [head for head in range(attention.num_heads) if gain_of(head) and positions <= size]
    normalized = attention.config.use_qk_norm
    # Root mean square of positions in queries: after the norm over all heads, or after the one before the block.
    square = (
        2 * attention.embed_dim / (max(len(looking), 1) * positions) if normalized else _seen_square(channels, first)
    )
    for projection, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
        projection.weight.zero_()
        if projection.bias is not None:
            projection.bias.zero_()
        for head in looking:
            # What queries and keys are multiplied by: amplitude² · square / sqrt(size) = gain
            amplitude = math.sqrt(gain_of(head) * math.sqrt(size) / square)
            rows = head * size + torch.arange(positions)
            held = 1.0 if normalized else amplitude
            seen = slice(channels.first_position, channels.first_free)
            projection.weight[rows, seen.start + torch.arange(positions)] = held / gains[seen]
            projection.weight[rows[:, None], reference] = -0.5 * held / gains[reference]
            if normalized:
                norm.weight[head * size : (head + 1) * size] = amplitude


def _seen_square(channels: Channels, first: bool) -> float:
    """About the square of a position's amplitude after a block's first norm; other channels' power is about 1."""
    width = channels.first_free + channels.free
    power = _POSITION**2 / 2 * channels.positions + (_CONSTANT**2 * channels.constants if first else 0.0)
    return _POSITION**2 / (power / width + 1)


def _attune_logarithms_(mlp: InternVLVisionMLP, channels: Channels) -> None:
    """Units for both signs of every wave from each threshold on; free channels are mixtures of the sums."""
    count, each = channels.waves, torch.arange(channels.waves)
    pieces = min(len(_THRESHOLDS), mlp.fc1.out_features // (2 * count))
    slopes = [rise / (end - start) for rise, start, end in zip(_RISES, _THRESHOLDS, _THRESHOLDS[1:])] + [_TAIL]
    sums = torch.zeros(count, 2 * count * pieces)
    for piece in range(pieces):
        bend = slopes[piece] - (slopes[piece - 1] if piece else 0.0)
        for place, sign in ((2 * piece, 1.0), (2 * piece + 1, -1.0)):
            units = place * count + each
            mlp.fc1.weight[units] = 0
            mlp.fc1.weight[units, each] = sign * _SLOPES[piece]
            mlp.fc1.bias[units] = -_SLOPES[piece] * _THRESHOLDS[piece] * _SHARP_UNIT
            sums[each, units] = bend / (_SLOPES[piece] * _SHARP_UNIT)
    mixed = _mixture(channels.free, count)
    units_used = sums.shape[1]
    mlp.fc2.weight[: channels.first_free] *= _QUIET_ELSEWHERE
    mlp.fc2.weight[channels.first_free :, :units_used] = mixed @ sums
    mlp.fc2.weight[channels.first_free :, units_used:] *= _QUIET_UNITS
    # The logarithm of a photograph's average coefficient, in the units above, is about 1.
    mlp.fc2.bias[channels.first_free :] = -mixed.sum(1)


def _mixture(free: int, count: int) -> torch.Tensor:
    """Each free channel has one wave's logarithm more than the others' [free, count]."""
    mixed: torch.Tensor = torch.randn(free, count, generator=torch.Generator().manual_seed(0)) * count**-0.5
    own = torch.arange(min(free, count))
    mixed[own] *= 0.7
    mixed[own, own] += 0.7
    return mixed
