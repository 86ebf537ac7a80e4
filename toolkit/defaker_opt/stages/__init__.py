"""The joint model in torch, cut into its four exportable stages: one file each.

A stage is an ordinary module whose `forward` takes the tensors of its `spec`, in order, and returns its outputs, in
order. Parameter names under a stage are the names in a detector folder, but for a few that are derived from others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from defaker_opt.catalog import find_module
from defaker_opt.config import DetectorConfig
from defaker_opt.runtime.spec import StageSpec
from defaker_opt.savings import Savings

# Reads a tensor of the detector folder by its full name, in the type it is stored in.
Read = Callable[[str], torch.Tensor]


class StageFile(Protocol):
    """What each file of this folder offers.

    BLOCKS: the `ModuleList` in the module whose entries are run one after the other, each on the first result of the
    one before it and on whatever else the first was given; "" if there is none.
    """

    BLOCKS: str

    def spec(self, config: DetectorConfig) -> StageSpec:
        """The stage's tensors by name, type and shape."""
        ...

    def build(self, config: DetectorConfig, savings: Savings) -> torch.nn.Module:
        """The module, its weights not yet filled in; savings do not change its parameters."""
        ...

    def stored_only(self, config: DetectorConfig) -> dict[str, tuple[int, ...]]:
        """Tensors of the detector folder that are not parameters of the module, name → shape."""
        ...

    def derived(self, config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
        """Parameters of the module that are not in the folder, name → how to compute them from what is."""
        ...


def stage_file(stage: str) -> StageFile:
    """The file of a stage."""
    module: Any = find_module("stages", stage)
    file: StageFile = module
    return file
