"""Patch embeddings that begin with an eye for fine detail, where forgeries leave their traces."""

from __future__ import annotations

import torch
from torch.nn import functional

from defaker_opt.training.model import JointModel

# Three quarters of the filters are made to ignore what is smooth; the others still see colour and light.
_SHARPENED = 0.75

# Residuals of photographs are this much fainter than the photographs, so their filters are drawn this much larger.
_GAIN = 12.0

# Second-order residual in both directions (Fridrich and Kodovsky 2012, section III; "square 3x3").
_RESIDUAL = ((-1.0, 2.0, -1.0), (2.0, -4.0, 2.0), (-1.0, 2.0, -1.0))


@torch.no_grad()
def sharpen_(model: JointModel) -> None:
    """Turn most drawn filters of both patch embeddings into the same filters of the picture's residual.

    Drawn filters see mostly light and colour, which the norms after them scale to one; thousands of pictures then
    teach nothing.
    """
    towers = (model.vision_encoder.tower.embeddings.patch_embeddings, model.mask_encoder.trunk.patch_embed)
    for patches in towers:
        weight = patches.projection.weight
        count = int(_SHARPENED * len(weight))
        weight[:count] = high_pass(weight[:count])


def high_pass(filters: torch.Tensor) -> torch.Tensor:
    """Filters [out, in, h, w] → filters of that size which answer to residuals only, _GAIN times as large in norm.

    Convolving the residual with the inner part of a filter is one filter of the full size.
    """
    kernel = torch.tensor(_RESIDUAL, device=filters.device, dtype=filters.dtype)[None, None]
    height, width = filters.shape[-2:]
    inner = functional.pad(filters[..., 1:-1, 1:-1], (2, 2, 2, 2)).reshape(-1, 1, height + 2, width + 2)
    passed = functional.conv2d(inner, kernel).reshape(filters.shape)
    scaled: torch.Tensor = passed * (_GAIN * filters.norm() / passed.norm().clamp(min=1e-12))
    return scaled
