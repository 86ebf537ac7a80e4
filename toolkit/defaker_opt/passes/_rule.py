"""Which layers get which codes, and how those are chosen: a rule of the pass `quantize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from defaker_opt.catalog import find_module, module_names
from defaker_opt.errors import one_of
from defaker_opt.histogram import Clip, input_scale
from defaker_opt.methods import Array, Method, Need, QuantizedWeight, Scheme, SchemeName, Statistics, parse_scheme
from defaker_opt.strict import Invalid, parse


def _wrong_method(name: str) -> str | None:
    known = module_names("methods")
    return None if name in known else one_of(name, known)


@dataclass(frozen=True)
class Rule:
    """`match` is a glob over full weight names, e.g. "language.*"; `method` says how codes are chosen, `options` are
    its knobs. `clip` says how far static activations reach, "mse" unless given, of FP8 "largest"; other schemes have no
    use for it.
    """

    match: str
    scheme: SchemeName
    method: str = "round_to_nearest"
    options: dict[str, Any] = field(default_factory=dict)
    clip: Clip | None = None

    CHECKS: ClassVar[Mapping[str, Callable[[str], str | None]]] = {"method": _wrong_method}

    def __post_init__(self) -> None:
        problems: list[str] = []
        parse(
            find_module("methods", self.method).METHOD,
            self.options,
            "options",
            lambda where, what: problems.append(f"{where}: {what}"),
        )
        if problems:
            raise Invalid(f"method {self.method}: {'; '.join(problems)}")
        if self.clip and not self.static:
            raise Invalid(f"clip: {self.scheme} has no static activations; remove it, or choose the scheme int8-static")
        if self.clip in ("mse", "entropy") and self.floating:
            raise Invalid(f"clip: {self.clip} is about steps of one size, {self.scheme} has finer ones; give largest")
        if self.static and self.chooser().SCALES_INPUTS:
            raise Invalid(
                f"method {self.method} scales what a layer is given, so its range is not what was seen; choose another"
            )

    @property
    def static(self) -> bool:
        """Whether layers get an input scale."""
        scheme = parse_scheme(self.scheme)
        return scheme is not None and scheme.activations == "static"

    @property
    def floating(self) -> bool:
        """Whether codes are numbers of FP8."""
        scheme = parse_scheme(self.scheme)
        return scheme is not None and scheme.floating

    @property
    def coded(self) -> bool:
        """Whether activations are integers with a scale for good."""
        return self.static and not self.floating

    def needs(self) -> tuple[Need, ...]:
        """What must have been seen of a layer."""
        return (*self.chooser().NEEDS, *(("histogram",) if self.static else ()))

    def codes(self, weight: Array, scheme: Scheme, seen: Statistics) -> QuantizedWeight:
        """Codes for a weight [out, in], with the input's scale if the scheme has one."""
        return self.with_range(self.chooser().quantize(weight, scheme, seen), seen)

    def with_range(self, chosen: QuantizedWeight, seen: Statistics) -> QuantizedWeight:
        """Codes with the input's scale, if their scheme has one."""
        if not self.static:
            return chosen
        assert seen.histogram is not None
        clip = self.clip or ("largest" if chosen.scheme.floating else "mse")
        return dataclasses.replace(chosen, input_scale=input_scale(seen.histogram, clip, chosen.scheme.largest_code))

    def chooser(self) -> Method:
        """The method with its knobs."""
        method: Method = find_module("methods", self.method).METHOD(**self.options)
        return method
