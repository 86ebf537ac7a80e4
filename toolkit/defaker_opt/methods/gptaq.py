"""GPTAQ (Li et al. 2025): GPTQ that aims at what the layer gave before anything before it was quantized.

Minimizes ‖Ŵ X - W X̃‖², X the inputs as they are now and X̃ as they were. That is ‖(Ŵ - W*) X‖² and a constant, where
W* = W X̃ Xᵀ (X Xᵀ)⁻¹ is the best weight without rounding; so it is GPTQ of W*, with no second set of formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from defaker_opt.methods import NOTHING_SEEN, Array, Need, QuantizedWeight, Scheme, Statistics
from defaker_opt.methods._feedback import damped, quantize_columns


@dataclass(frozen=True)
class Gptaq:
    """damping, order: as in GPTQ. correction: how far to go from W to W*, 0 (GPTQ) … 1."""

    damping: float = 0.01
    order: Literal["activation", "natural"] = "natural"
    correction: float = 1.0

    NEEDS: ClassVar[tuple[Need, ...]] = ("hessian", "shift")
    SCALES_INPUTS: ClassVar[bool] = False

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in]."""
        assert seen.hessian is not None
        assert seen.shift is not None
        hessian, whole = damped(seen.hessian, self.damping), weight.astype(np.float64)
        # With the damping on both sides, weights that inputs say nothing about stay as they are.
        aim = whole + self.correction * cho_solve(cho_factor(hessian), (whole @ seen.shift).T).T
        return quantize_columns(aim, hessian, scheme, self.order)


METHOD = Gptaq
