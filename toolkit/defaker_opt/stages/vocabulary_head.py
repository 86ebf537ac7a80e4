"""The head over the whole vocabulary: only in builds that do without the eight-row verdict head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from defaker_opt.config import DetectorConfig
from defaker_opt.runtime.spec import VOCABULARY_HEAD, StageSpec, TensorSpec
from defaker_opt.savings import Savings
from defaker_opt.stages import Read

# See `StageFile`.
BLOCKS = ""


class VocabularyHead(nn.Module):
    """A logit for every word."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.language.hidden_size, config.language.vocab_size, bias=False)

    def forward(self, last_hidden: torch.Tensor) -> tuple[torch.Tensor]:
        """From last_hidden [1, H] to vocabulary_logits [1, V]."""
        return (self.head(last_hidden),)


def spec(config: DetectorConfig) -> StageSpec:
    """See `StageFile`."""
    return StageSpec(
        VOCABULARY_HEAD,
        (TensorSpec("last_hidden", "float32", (1, config.language.hidden_size)),),
        (TensorSpec("vocabulary_logits", "float32", (1, config.language.vocab_size)),),
    )


def build(config: DetectorConfig, savings: Savings) -> nn.Module:
    """See `StageFile`."""
    return VocabularyHead(config)


def stored_only(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """See `StageFile`."""
    return {}


def derived(config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
    """See `StageFile`: the table belongs to the language stage, which takes eight rows of it."""
    return {"head.weight": lambda: read("language.lm_head.weight")}
