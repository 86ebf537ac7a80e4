"""Channels of a vision tower that no block writes to stay so while it learns: positions, which attention relies on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import InternVLVisionModel


def untouched_channels(tower: InternVLVisionModel) -> torch.Tensor:
    """Whether all blocks' attention and feed-forward nets write nothing to a channel of the residual stream [D]."""
    written = [row for block in tower.encoder.layer for row in (block.attention.projection_layer, block.mlp.fc2)]
    return torch.stack([(each.weight == 0).all(dim=1) for each in written]).all(dim=0)


def hold_untouched_(tower: InternVLVisionModel) -> None:
    """Let nothing learn that would change what such channels hold, or how blocks read it."""
    taught = (~untouched_channels(tower)).float()
    if taught.all():
        return
    embeddings = tower.embeddings
    for parameter in (embeddings.position_embeddings, embeddings.cls_token):
        _scale_gradient_(parameter, taught)
    _scale_gradient_(embeddings.patch_embeddings.projection.bias, taught)
    for block in tower.encoder.layer:
        for written in (block.attention.projection_layer, block.mlp.fc2):
            _scale_gradient_(written.weight, taught[:, None])
            _scale_gradient_(written.bias, taught)
        _scale_gradient_(block.layernorm_before.weight, taught)
        _scale_gradient_(getattr(block.layernorm_before, "bias", None), taught)


def _scale_gradient_(parameter: torch.Tensor | nn.Parameter | None, share: torch.Tensor) -> None:
    """share: of each gradient's entries that is learnt by, broadcast to the parameter's shape."""
    if parameter is not None:
        parameter.register_hook(lambda gradient: gradient * share.to(gradient))  # type: ignore[no-untyped-call]
