"""GPTQ (Frantar et al. 2022): round column by column, and let later columns make up for the error on real inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from defaker_opt.methods import NOTHING_SEEN, Array, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._feedback import damped, quantize_columns


@dataclass(frozen=True)
class Gptq:
    """damping: share of the Hessian's mean diagonal that is added to it. order: of columns, see `quantize_columns`."""

    damping: float = 0.01
    order: Literal["activation", "natural"] = "natural"

    NEEDS: ClassVar[tuple[Need, ...]] = ("hessian",)
    SCALES_INPUTS: ClassVar[bool] = False

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]."""
        assert seen.hessian is not None
        return quantize_columns(weight.astype(np.float64), damped(seen.hessian, self.damping), scheme, self.order)


METHOD = Gptq
