"""Drawn weights that begin with an eye for what forgeries disturb: how much fine detail there is, and where.

Drawn patch embeddings see mostly light and colour, which the norms after them scale to one; tens of thousands of
pictures then teach nothing. The vision tower's beginning is in `attune_vision`. Of SAM2's trunk most filters of the
patch embedding become the finer waves of a cosine transform, and the first block's feed-forward net sums their strength
by band into channels of its own: GELU(x) + GELU(-x) is nearly |x|.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from defaker_opt.training import waves
from defaker_opt.training.attune_vision import attune_vision_
from defaker_opt.training.model import JointModel

# Fine detail of photographs is this much fainter than the photographs; coarse waves are damped instead.
_GAIN, _DAMPING = 24.0, 0.15

# What the constant channels hold: next to it the norm leaves a measure of strength, not only of proportions.
_CONSTANT = 3.0

# How far the paired units are driven into the two arms of |x|, and where strength of average detail comes to lie.
_SLOPE, _CENTRE = 2.0, -1.0

# Colour's waves begin here in the order of fineness: codecs that halve colour planes erase its finer ones.
_COLOUR_FROM = 0.3


@dataclass(frozen=True)
class _Channels:
    """How the channels of a patch embedding are used, in this order."""

    light: int  # the finest waves of light
    colour: int  # finer waves of colour differences
    coarse: int
    constant: int
    strength: int  # empty until the first feed-forward net fills them

    @property
    def waves(self) -> int:
        """Channels whose strength is summed."""
        return self.light + self.colour


def attune_(model: JointModel) -> None:
    """Give both encoders their beginning; the language model and the mask decoder stay as drawn."""
    attune_vision_(model)
    trunk = model.mask_encoder.trunk
    _attune_(trunk.patch_embed.projection, trunk.blocks[0].mlp.proj_in, trunk.blocks[0].mlp.proj_out)


@torch.no_grad()
def _attune_(patches: nn.Conv2d, expand: nn.Linear, contract: nn.Linear) -> None:
    """patches [D, 3, p, p], expand [F, D] with F >= 2 waves, contract [D, F]."""
    width, _, size, _ = patches.weight.shape
    channels = _shares(width, size)
    filters = wave_filters(size, channels.light, channels.colour, channels.coarse)
    patches.weight.zero_()
    patches.weight[: len(filters)] = filters.to(patches.weight)
    if patches.bias is not None:
        patches.bias.zero_()
        patches.bias[len(filters) : len(filters) + channels.constant] = _CONSTANT
    count, each = channels.waves, torch.arange(channels.waves)
    expand.weight[: 2 * count] = 0
    expand.bias[: 2 * count] = 0
    expand.weight[each, each] = _SLOPE
    expand.weight[count + each, each] = -_SLOPE
    sums = band_sums(channels.light, channels.colour, channels.strength).to(contract.weight)
    contract.weight[:, : 2 * count] = 0
    contract.weight[-channels.strength :] = 0
    contract.weight[-channels.strength :, : 2 * count] = torch.cat((sums, sums), dim=1)
    contract.bias[-channels.strength :] = _CENTRE


def _shares(width: int, size: int) -> _Channels:
    """Half of the channels (or of the waves there are) for light, a quarter for colour, the rest for the others."""
    constant = max(1, width // 24)
    light = min(width // 2, size * size // 2)
    colour = min(width // 4, size * size // 4)
    strength = max(1, (width - light - colour - constant) // 2)
    return _Channels(light, colour, width - light - colour - constant - strength, constant, strength)


def wave_filters(size: int, light: int, colour: int, coarse: int) -> torch.Tensor:
    """Filters [light + colour + coarse, 3, size, size], fine waves first.

    The finest `light` waves of light, finer waves of both colour differences in turn, and the coarsest of light.
    """
    order = waves.coarse_to_fine(size)
    fine = [(wave, waves.LIGHT) for wave in order[len(order) - light :]]
    start = round(_COLOUR_FROM * len(order))
    tinted = [(wave, direction) for wave in order[start:] for direction in waves.DIFFERENCES][:colour]
    broad = [(wave, waves.LIGHT) for wave in order[:coarse]]
    gains = torch.tensor([_GAIN] * (len(fine) + len(tinted)) + [_DAMPING] * len(broad))
    return waves.filters(size, fine + tinted + broad) * gains[:, None, None, None]


def band_sums(light: int, colour: int, strength: int) -> torch.Tensor:
    """Means over bands of waves [strength, light + colour]: a third for light, one each for colours, the rest mixed.

    The mixed ones take every n-th wave, n = 2, 3, …, so that no two measure the same.
    """
    sums = torch.zeros(strength, light + colour)
    bands = max(1, strength // 3)
    edges = [round(light * band / bands) for band in range(bands + 1)]
    groups = [slice(start, end) for start, end in itertools.pairwise(edges)]
    groups += [slice(light, None, 1), slice(light, None, 2), slice(light + 1, None, 2)] if colour > 1 else []
    groups += [slice(stride % 3, None, stride) for stride in range(2, 2 + max(0, strength - len(groups)))]
    for row, group in zip(sums, groups):
        row[group] = 1.0
    return sums / sums.sum(dim=1, keepdim=True).clamp(min=1.0)
