"""Released checkpoints, one family a file: which tensor becomes what, before any of them is read.

Files whose names begin with an underscore help the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from defaker_opt.config import DetectorConfig
from defaker_opt.weights import Shapes

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a plan is made from.

    config: its `config.json`. facts: what the release does not state, from `*_meta.json` beside it. shapes: of all
    tensors, those of a separate SAM2 under the names of `checkpoint.segmenter`. prompts: a file of texts, or None.
    """

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    shapes: Shapes
    prompts: Path | None = None


@dataclass(frozen=True)
class Take:
    """One tensor of the detector folder comes from one of the checkpoint, as it is or changed (sliced, reshaped)."""

    source: str
    change: Change | None = None
    how: str = ""


@dataclass(frozen=True)
class Plan:
    """Where every tensor goes.

    takes: name in the detector folder → where from. drawn: what the checkpoint does not have, to be drawn from a seed.
    ignored: source name → reason.
    """

    config: DetectorConfig
    takes: Mapping[str, Take]
    ignored: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    drawn: Shapes = field(default_factory=dict)


class Source(Protocol):
    """What each file of this folder offers."""

    MODEL_TYPE: str
    """The `model_type` in `config.json` of the checkpoints it converts."""

    def plan(self, checkpoint: Checkpoint) -> Plan:
        """Account for every tensor of the checkpoint. Raises SourceError naming those that do not fit."""
        ...
