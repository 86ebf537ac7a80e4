"""Whether the codes of a detector's language part have a place in a GPTQ checkpoint, and which."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from defaker_opt.checkpoint import gptq
from defaker_opt.errors import PassError
from defaker_opt.gptq_folder.model import LAYERS
from defaker_opt.methods import Scheme, parse_scheme
from defaker_opt.packing import BITS, fills_words


@dataclass(frozen=True)
class Layout:
    """What all layers of a folder have in common. symmetric: zero is the middle code everywhere."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def format(self) -> str:
        """Every reader knows "gptq" and has its own idea of a zero point of 0 there, which only asymmetric codes have;
        "gptq_v2" is newer, and clear.
        """
        return "gptq" if self.symmetric else "gptq_v2"

    @property
    def middle(self) -> int:
        """What stands for our code 0, as codes are stored from 0 up."""
        return int(2 ** (self.bits - 1))

    def as_json(self) -> dict[str, Any]:
        """The settings as GPTQModel writes them."""
        return {
            "quant_method": gptq.METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": self.symmetric,
            "lm_head": False,
            "checkpoint_format": self.format,
            "pack_dtype": "int32",
        }


def find_layout(shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, str], factored: Collection[str]) -> Layout:
    """The layout that holds the codes of these layers [out, in], by their schemes. Raises PassError where none does.

    factored: layers whose codes may come with an input factor. Groups are as long as the shortest; longer ones are cut.
    """
    layers = {name: shape for name, shape in shapes.items() if name.startswith(LAYERS)}
    found = {name: parse_scheme(schemes.get(name, "float")) for name in layers}
    problems = [
        f"{name}: {reason}" for name in layers if (reason := _why_not(found[name], layers[name], name in factored))
    ]
    bits = sorted({scheme.bits for scheme in found.values() if scheme})
    if len(bits) > 1 and not problems:
        problems.append(f"layers have codes of {' and '.join(map(str, bits))} bits, and a checkpoint has one number")
    if problems:
        more = [f"({len(problems)} such layers)"] if len(problems) > 1 else []
        raise PassError(
            "--gptq: a GPTQ checkpoint cannot hold these codes:\n  "
            + "\n  ".join([*problems[:3], *more])
            + '\n  give all layers of the language stage one 4-bit scheme: {match: "language.*", scheme: int4-g128}'
        )
    known = [scheme for scheme in found.values() if scheme]
    sizes = [scheme.group_size or 0 for scheme in known]
    return Layout(bits[0], math.gcd(*sizes), all(scheme.zero_point == "fixed" for scheme in known))


def _why_not(scheme: Scheme | None, shape: tuple[int, ...], factored: bool) -> str:
    if scheme is None:
        return "stays in float"
    if scheme.number in ("nf", "nvfp"):
        table = {"nf": "NF4", "nvfp": "FP4"}[scheme.number]
        return f"scheme {scheme}: its codes stand for the numbers of {table}, and the format's are integers"
    if scheme.activations != "block" or scheme.bits not in BITS:
        return f"scheme {scheme}: what the layer is given is quantized too, which the format has no place for"
    if factored:
        return "its method scales what the layer is given, which the format has no place for; choose another method"
    if not all(fills_words(size, scheme.bits) for size in shape):
        return f"{list(shape)} codes of {scheme.bits} bits do not fill words of 32 bits"
    return ""
