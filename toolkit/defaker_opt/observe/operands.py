"""Queries and keys as attention's first product is given them, taken where transformers looks up its attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

_NOTED = "defaker_noted"
# Where a module keeps who is told.
_TOLD = "note_operands"


def _noted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain attention of the module's own file, which is what stages compute, after telling of its operands."""
    told = getattr(module, _TOLD, None)
    if told is not None:
        told(query, key)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[torch.Tensor, torch.Tensor] = eager(module, query, key, value, attention_mask, **options)
    return result


AttentionInterface.register(_NOTED, _noted_attention)


@contextmanager
def noted_operands(
    attentions: Mapping[str, nn.Module], note: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, `note(name, queries, keys)` is called whenever one of the modules attends.

    queries [B, heads, S, d]; keys [B, key heads, T, d], before they are repeated for groups of queries.
    """
    configs = list({id(module.config): module.config for module in attentions.values()}.values())
    before = [config._attn_implementation for config in configs]  # type: ignore[union-attr]
    for config in configs:
        config._attn_implementation = _NOTED  # type: ignore[union-attr]
    for name, module in attentions.items():
        setattr(module, _TOLD, lambda query, key, name=name: note(name, query, key))
    try:
        yield
    finally:
        for module in attentions.values():
            delattr(module, _TOLD)
        for config, implementation in zip(configs, before):
            config._attn_implementation = implementation  # type: ignore[union-attr]
