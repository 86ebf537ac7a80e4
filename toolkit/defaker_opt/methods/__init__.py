"""Number formats, quantized weights, and what a method that makes them looks like."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]

SchemeName = Literal[
    "float",
    "int8",
    "int8-token",
    "int8-static",
    "int4-g128",
    "int4-g64",
    "int4-g32",
    "int4-asym-g128",
    "int4-asym-g64",
    "int4-asym-g32",
    "int2-asym-g32",
    "int4-sym-g128",
    "int4-sym-g64",
    "fp8-static",
    "nf4-g64",
    "nvfp4-g16",
    "int8-outlier",
]
SCHEMES: tuple[str, ...] = get_args(SchemeName)

# What calibration may be asked to collect, by the names of `Statistics`.
Need = Literal["hessian", "shift", "mean_abs", "largest", "histogram"]

# The smallest group that blocked kernels accept on CPUs, in engines, and in bitsandbytes.
_MIN_GROUP, _MIN_ENGINE_GROUP, _MIN_NF_GROUP = 16, 64, 32

_NAME = re.compile(
    r"(?P<number>int|fp|nf|nvfp)(?P<bits>\d)(-(?P<activations>token|static|outlier))?(-(?P<sides>asym|sym))?(-g(?P<group>\d+))?"
)

# FP8 codes: 4 bits of exponent, 3 of fraction, no infinities, up to 448 (Micikevicius et al. 2022, "FP8 formats for
# deep learning", section 3.1).
FP8 = ml_dtypes.float8_e4m3fn
FP8_LARGEST = 448

# FP4 codes: 2 bits of exponent, 1 of fraction, so ±0, 0.5, 1, 1.5, 2, 3, 4 and 6 (Open Compute Project 2023, "OCP
# microscaling formats (MX)", section 5.3.3). NVFP4 gives 16 of them a scale of FP8, and all of a weight one of float32.
FP4 = ml_dtypes.float4_e2m1fn
_FP4_LARGEST = 6

# What the 16 codes of NF4 stand for, -1 … 1: quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA",
# section 3 and appendix E), as bitsandbytes has them.
NF4: Array = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
NF4.flags.writeable = False


@dataclass(frozen=True)
class Scheme:
    """How weights become codes, and with what precision activations meet them.

    bits: of a code. group_size: how many columns of a row share one scale (None: the whole row).
    activations: "tensor" or "token": what shares one 8-bit scale, found anew at each call; "outlier": as "token", but
    columns with large inputs stay float; "static": one for good, found by calibration. 4-bit products choose for
    themselves and say "block". zero_point: "fixed", zero is the code 0, or "group", each group has its own. symmetric:
    blocked codes are as many on both sides, and scales are positive numbers that float16 has, as engines want them.
    number: what codes stand for, times their scale: integers, numbers of FP8, those of `NF4`, or NVFP4's of FP4, whose
    scales are positive numbers of FP8 times one float32 of the whole weight.
    """

    bits: int
    group_size: int | None = None
    activations: str = "tensor"
    zero_point: Literal["fixed", "group"] = "fixed"
    symmetric: bool = False
    number: Literal["int", "fp", "nf", "nvfp"] = "int"

    @property
    def floating(self) -> bool:
        """Whether codes are numbers of FP8."""
        return self.number == "fp"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes, a byte each."""
        kind: np.dtype[Any] = np.dtype({"fp": FP8, "nvfp": FP4}.get(self.number, np.int8))
        return kind

    @property
    def kind(self) -> str:
        """What a target looks its encoding up by: a key of `target.ENCODINGS`."""
        named = f"-{self.activations}" if self.activations in ("token", "static", "outlier") else ""
        return f"{self.number}{self.bits}{named}{'-sym' if self.symmetric else ''}"

    @property
    def largest_code(self) -> int:
        """The greatest number that a code stands for."""
        integer = int(2 ** (self.bits - 1) - 1)
        return {"int": integer, "fp": FP8_LARGEST, "nf": 1, "nvfp": _FP4_LARGEST}[self.number]

    @property
    def smallest_code(self) -> int:
        """The least one. Blocked products of integers take all 2^bits of them, others the symmetric ones."""
        whole = self.number == "int" and self.activations == "block" and not self.symmetric
        return -self.largest_code - whole

    def __str__(self) -> str:
        asymmetric = "-asym" if self.zero_point == "group" else ""
        return f"{self.kind}{asymmetric}" + ("" if self.group_size is None else f"-g{self.group_size}")

    def fitted(self, columns: int) -> Scheme | None:
        """The same scheme with the largest group, a power of two, that divides `columns`; None if there is none."""
        if self.group_size is None:
            return self
        group_size = math.gcd(self.group_size, columns)
        return dataclasses.replace(self, group_size=group_size) if group_size >= self.least_group else None

    @property
    def least_group(self) -> int:
        """The smallest group that its products take."""
        return _MIN_NF_GROUP if self.number == "nf" else _MIN_ENGINE_GROUP if self.symmetric else _MIN_GROUP

    def numbers(self, codes: NDArray[Any]) -> NDArray[Any]:
        """What codes stand for before they are scaled."""
        return NF4[codes] if self.number == "nf" else codes


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one linear layer's weight. Group g of row r stands for `(codes - zero[r, g]) * scale[r, g]`.

    codes: int8 [out, in] (codes of fewer bits too, one a byte), FP8, FP4, or places in the table `NF4`, int8 0…15.
    scale: float32 [out, groups], not zero, and negative where a group's largest weight is positive and gets the one
    code more that the negative side has. zero: int8 [out, groups], None if all are 0. input_factor: float32 [in]: the
    layer multiplies its input by it before it meets the codes; None if by 1. input_scale: the layer's input is rounded
    to -128…127 times it, or to FP8 times it; only of schemes with static activations. tensor_scale: a float32 that all
    scales of NVFP4 are numbers of FP8 times of; None of other schemes.
    """

    codes: NDArray[Any]
    scale: Array
    scheme: Scheme
    zero: NDArray[np.int8] | None = None
    input_factor: Array | None = None
    input_scale: float | None = None
    tensor_scale: float | None = None

    def dequantize(self) -> Array:
        """The float32 weight [out, in] that stands for codes and input factor."""
        return decode(self.scheme.numbers(self.codes), self.scale, self.zero, self.input_factor)

    def block_scales(self) -> NDArray[Any]:
        """Of NVFP4, the numbers of FP8 [out, groups] that `tensor_scale` makes `scale` of, exactly."""
        assert self.tensor_scale is not None, f"{self.scheme} has no scales of FP8"
        return (self.scale / np.float32(self.tensor_scale)).astype(FP8)


def decode(
    codes: NDArray[Any], scale: Array, zero: NDArray[np.int8] | None = None, factor: Array | None = None
) -> Array:
    """The float32 weight [out, in] of codes, see `QuantizedWeight`; of NF4 what they stand for is given."""
    rows, columns = codes.shape
    grouped = codes.reshape(rows, scale.shape[1], -1).astype(np.float32)
    if zero is not None:
        grouped -= zero[:, :, None]
    weight: Array = (grouped * scale[:, :, None]).reshape(rows, columns)
    return weight if factor is None else weight * factor


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of a linear layer's inputs x [in]; what was not asked for is None. Means are over tokens,
    by their weight.

    hessian: mean of x xᵀ [in, in]. shift: mean of (x̃ - x) xᵀ [in, in], where x̃ is what the layer is given when nothing
    before it is quantized. mean_abs: mean of |x| [in]. largest: the largest |x| [in]. histogram: of |x| over all of
    x, every token counted alike, by the bins of `histogram.EDGES`. tokens: how many were seen.
    """

    tokens: int = 0
    hessian: Doubles | None = None
    shift: Doubles | None = None
    mean_abs: Doubles | None = None
    largest: Doubles | None = None
    histogram: Doubles | None = None


NOTHING_SEEN = Statistics()


class Method(Protocol):
    """A way of choosing codes. One frozen class a file, named METHOD there; its fields are knobs with defaults."""

    NEEDS: ClassVar[tuple[Need, ...]]
    # Whether its codes may come with an input factor.
    SCALES_INPUTS: ClassVar[bool]

    def quantize(self, weight: Array, scheme: Scheme, seen: Statistics = NOTHING_SEEN) -> QuantizedWeight:
        """Quantize weight [out, in] in a scheme whose group size divides its columns; `seen` has all NEEDS."""
        ...


def parse_scheme(name: str) -> Scheme | None:
    """The scheme of that name, None for "float". The name has been checked against SCHEMES, or is a fitted one."""
    if name == "float":
        return None
    found = _NAME.fullmatch(name)
    assert found, f"{name} is no scheme"
    group = int(found["group"]) if found["group"] else None
    activations = found["activations"] or ("block" if group else "tensor")
    zero_point: Literal["fixed", "group"] = "group" if found["sides"] == "asym" else "fixed"
    number: Literal["int", "fp", "nf"] = found["number"]  # type: ignore[assignment]
    return Scheme(int(found["bits"]), group, activations, zero_point, found["sides"] == "sym", number)
