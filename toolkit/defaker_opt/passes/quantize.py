"""Replace the weights of linear layers by integer codes, each as the first rule that matches its name says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from defaker_opt.catalog import find_module, module_names
from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.errors import PassError, one_of
from defaker_opt.histogram import Clip, input_scale
from defaker_opt.methods import (
    NOTHING_SEEN,
    Array,
    Method,
    Need,
    QuantizedWeight,
    Scheme,
    SchemeName,
    Statistics,
    parse_scheme,
)
from defaker_opt.observe.inputs import Balance
from defaker_opt.observe.sweep import Foregone, observe_layers
from defaker_opt.passes import PassResult, Preview
from defaker_opt.progress import Progress
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import Samples
from defaker_opt.strict import Invalid, parse
from defaker_opt.target import Target


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


@dataclass(frozen=True)
class Quantize:
    """Every linear layer must match a rule, and every rule must match a layer.

    balance: how tokens of the language stage count where methods look at pictures; all alike if it is not given.
    """

    rules: tuple[Rule, ...]
    balance: Balance | None = None

    def __post_init__(self) -> None:
        if not self.rules:
            raise Invalid('rules must not be empty; {match: "*", scheme: int8} quantizes everything')

    def check(self, config: DetectorConfig, target: Target) -> Preview:
        """See `Pass`."""
        problems = [
            f"rules: {rule.scheme} ({rule.match}) cannot run on target {target.name}, "
            f"which runs {', '.join(target.kinds)}"
            for rule in self.rules
            if (scheme := parse_scheme(rule.scheme)) and scheme.kind not in target.kinds
        ]
        weights = _all_linear(config)
        matched = {name: self._rule(name) for name in weights}
        unmatched = [name for name, rule in matched.items() if rule is None]
        if unmatched:
            problems.append(
                f"no rule matches {unmatched[0]} ({len(unmatched)} such weights); "
                'end with {match: "*", scheme: float} to keep the rest'
            )
        used = {index for name in weights if (index := self._index(name)) is not None}
        problems += [
            f"rules[{index}]: {_why_unused(rule, weights)}"
            for index, rule in enumerate(self.rules)
            if index not in used
        ]
        if problems:
            raise PassError("quantize:\n  " + "\n  ".join(problems))
        schemes = {name: self._scheme(name, shape) for name, shape in weights.items()}
        reasons = {name: self._why_float(name, shape) for name, shape in weights.items() if schemes[name] is None}
        return Preview(
            {name: str(scheme) if scheme else "float" for name, scheme in schemes.items()},
            {**reasons, **_never_quantized(config)},
            self._looks(weights),
            {name: needs for name, needs in self._needs(weights).items() if needs},
            tuple(n for n, scheme in schemes.items() if scheme and (r := self._rule(n)) and r.chooser().SCALES_INPUTS),
        )

    def apply(self, detector: Detector, progress: Progress, samples: Samples | None = None) -> PassResult:
        """See `Pass`."""
        weights = _all_linear(detector.config)
        schemes = {name: scheme for name, shape in weights.items() if (scheme := self._scheme(name, shape))}
        chooser = Chooser(detector, schemes, {name: rule for name in schemes if (rule := self._rule(name))})
        done = 0
        for group in self._groups(detector, weights, samples, chooser.foregone):
            for name, seen in group.items():
                # A run that was killed may have left codes behind, which are what they would be now.
                if name in schemes and name not in detector.codes:
                    detector.codes[name] = chooser.codes(name, seen)
                done += 1
                progress(f"quantize {name}", done / len(weights))
        quantized = {name: str(detector.codes[name].scheme) for name in weights if name in detector.codes}
        left = {name: self._why_float(name, shape) for name, shape in weights.items() if name not in quantized}
        return PassResult({"quantized": quantized, "left_in_float": {**left, **_never_quantized(detector.config)}})

    def _groups(
        self,
        detector: Detector,
        weights: Mapping[str, tuple[int, ...]],
        samples: Samples | None,
        foregone: Foregone,
    ) -> Iterator[dict[str, Statistics]]:
        """All linear layers in the order in which they run, with what their methods need to have seen."""
        if not self._looks(weights):
            yield dict.fromkeys(weights, NOTHING_SEEN)
            return
        assert samples is not None, "check said that pictures are needed"
        yield from observe_layers(detector, samples, self._needs(weights), self.balance, foregone)

    def _needs(self, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Need, ...]]:
        rules = {name: self._rule(name) for name, shape in weights.items() if self._scheme(name, shape) is not None}
        return {name: rule.needs() for name, rule in rules.items() if rule is not None}

    def _looks(self, weights: Mapping[str, tuple[int, ...]]) -> str:
        needing = [rule for name, needs in self._needs(weights).items() if needs and (rule := self._rule(name))]
        methods = sorted({rule.method for rule in needing if rule.chooser().NEEDS})
        ranges = ["ranges of activations"] * any(rule.static for rule in needing)
        return f"{', '.join([*methods, *ranges])} for {len(needing)} layers" if needing else ""

    def _rule(self, name: str) -> Rule | None:
        index = self._index(name)
        return None if index is None else self.rules[index]

    def _index(self, name: str) -> int | None:
        return next((i for i, rule in enumerate(self.rules) if fnmatchcase(name, rule.match)), None)

    def _scheme(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        rule = self._rule(name)
        scheme = parse_scheme(rule.scheme) if rule else None
        return scheme.fitted(shape[1]) if scheme else None

    def _why_float(self, name: str, shape: tuple[int, ...]) -> str:
        rule = self._rule(name)
        assert rule is not None
        if rule.scheme == "float":
            return f"rule {rule.match!r} keeps it in float"
        scheme = parse_scheme(rule.scheme)
        assert scheme is not None
        return f"{shape[1]} columns have no group of {scheme.least_group} or more that divides them"


@dataclass(frozen=True)
class Chooser:
    """Chooses codes of layers by their rules; early: of the block at hand, what does not depend on pictures."""

    detector: Detector
    schemes: Mapping[str, Scheme]
    rules: Mapping[str, Rule]
    early: dict[str, QuantizedWeight] = field(default_factory=dict)

    def foregone(self, layers: Collection[str]) -> Mapping[str, QuantizedWeight] | None:
        """See `observe_layers`."""
        self.early.clear()
        coded = [name for name in layers if name in self.schemes]
        if any(self.rules[name].chooser().NEEDS for name in coded):
            return None
        done = self.detector.codes
        fresh = [name for name in coded if name not in done]
        self.early.update(
            {n: self.rules[n].chooser().quantize(self._original(n), self.schemes[n], NOTHING_SEEN) for n in fresh}
        )
        # Codes of an earlier pass stay, also of layers that this one leaves alone.
        return {**{name: done[name] for name in layers if name in done}, **self.early}

    def codes(self, name: str, seen: Statistics) -> QuantizedWeight:
        """Codes of a layer when its inputs have been seen."""
        if name in self.early:
            return self.rules[name].with_range(self.early.pop(name), seen)
        return self.rules[name].codes(self._original(name), self.schemes[name], seen)

    def _original(self, name: str) -> Array:
        weight: Array = dataclasses.replace(self.detector, codes={}).read(name).numpy()
        return weight


def _all_linear(config: DetectorConfig) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for stage in STAGES for name, shape in linear_weights(config, stage).items()}


def _never_quantized(config: DetectorConfig) -> dict[str, str]:
    """Parameters that no rule speaks about, with the reason."""
    reasons: dict[str, str] = {}
    for stage in STAGES:
        linear = linear_weights(config, stage)
        for name, shape in parameter_shapes(config, stage).items():
            if name in linear:
                continue
            if len(shape) == 1:
                reasons[name] = "a bias, a norm or a layer scale: added or multiplied, not a product"
            elif name.endswith("weight") and len(shape) == 4:
                reasons[name] = "a convolution, a small share of the work"
            else:
                reasons[name] = "a table of tokens or positions, added as it is"
    return reasons


def _why_unused(rule: Rule, weights: Mapping[str, tuple[int, ...]]) -> str:
    if any(fnmatchcase(name, rule.match) for name in weights):
        return f"{rule.match!r} matches only what earlier rules already took; move it up or remove it"
    return f"{rule.match!r} matches no linear layer; names look like {', '.join(list(weights)[:1])}"


PASS = Quantize
