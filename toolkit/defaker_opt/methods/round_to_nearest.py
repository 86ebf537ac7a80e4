"""Round to nearest: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defaker_opt.methods import Array, QuantizedWeight, Scheme


@dataclass(frozen=True)
class RoundToNearest:
    """Scale each group so that its largest weight gets the largest code, then round half to even."""

    def quantize(self, weight: Array, scheme: Scheme) -> QuantizedWeight:
        """Quantize weight [out, in]; a group of zeros gets scale 1, so that it decodes to zeros."""
        rows, columns = weight.shape
        group_size = scheme.group_size or columns
        assert columns % group_size == 0, f"{columns} columns in groups of {group_size}"
        grouped = np.asarray(weight, np.float32).reshape(rows, -1, group_size)  # [out, groups, group_size]
        largest = np.abs(grouped).max(axis=2)
        scale = (largest / np.float32(scheme.largest_code)).astype(np.float32)
        # Below the smallest normal number a scale loses bits or becomes zero, and codes would overflow.
        scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
        codes = np.clip(np.rint(grouped / scale[:, :, None]), -scheme.largest_code, scheme.largest_code)
        return QuantizedWeight(codes.reshape(rows, columns).astype(np.int8), scale, scheme)


METHOD = RoundToNearest
