"""Number formats, quantized weights, and what a method that makes them looks like."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SchemeName = Literal["float", "int8", "int8-token", "int4-g128", "int4-g64", "int4-g32"]
SCHEMES: tuple[str, ...] = get_args(SchemeName)

# The smallest group a blocked kernel accepts.
MIN_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """How weights become integers, and with what precision activations meet them.

    bits: of a code. group_size: how many columns of a row share one scale (None: the whole row).
    activations: "tensor" or "token": what shares one 8-bit scale, found anew at each call. 4-bit products choose for
    themselves and say "block". Symmetric: zero is exact, codes lie in [-(2^(bits-1) - 1), 2^(bits-1) - 1].
    """

    bits: int
    group_size: int | None = None
    activations: str = "tensor"

    @property
    def kind(self) -> str:
        """What a target looks its encoding up by: "int8", "int8-token" or "int4"."""
        return f"int{self.bits}-token" if self.activations == "token" else f"int{self.bits}"

    @property
    def largest_code(self) -> int:
        """The greatest absolute code."""
        return int(2 ** (self.bits - 1) - 1)

    def __str__(self) -> str:
        return self.kind if self.group_size is None else f"{self.kind}-g{self.group_size}"

    def fitted(self, columns: int) -> Scheme | None:
        """The same scheme with the largest group, a power of two, that divides `columns`; None if there is none."""
        if self.group_size is None:
            return self
        group_size = math.gcd(self.group_size, columns)
        return dataclasses.replace(self, group_size=group_size) if group_size >= MIN_GROUP else None


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one linear layer's weight. Group g of row r stands for `codes * scale[r, g]`.

    codes: int8 [out, in] (4-bit codes too, one a byte). scale: float32 [out, groups].
    """

    codes: NDArray[np.int8]
    scale: Array
    scheme: Scheme

    def dequantize(self) -> Array:
        """The float32 weight [out, in] that the codes stand for."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, self.scale.shape[1], -1).astype(np.float32)
        return (grouped * self.scale[:, :, None]).reshape(rows, columns)


class Method(Protocol):
    """A way of choosing codes. One frozen class a file, named METHOD there."""

    def quantize(self, weight: Array, scheme: Scheme) -> QuantizedWeight:
        """Quantize weight [out, in] in a scheme whose group size divides its columns."""
        ...


def parse_scheme(name: str) -> Scheme | None:
    """The scheme of that name, None for "float". The name has been checked against SCHEMES."""
    if name == "float":
        return None
    kind, _, detail = name.partition("-")
    bits = int(kind.removeprefix("int"))
    if detail == "token":
        return Scheme(bits, activations="token")
    return Scheme(bits, int(detail.removeprefix("g")), "block") if detail else Scheme(bits)
