"""Replace the weights of linear layers by integer codes, each as the first rule that matches its name says."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import OPERANDS, Detector, linear_weights, parameter_shapes
from defaker_opt.errors import PassError
from defaker_opt.histogram import Clip
from defaker_opt.methods import (
    NOTHING_SEEN,
    Array,
    Need,
    QuantizedWeight,
    Scheme,
    Statistics,
    parse_scheme,
)
from defaker_opt.observe.inputs import Balance
from defaker_opt.observe.sweep import Foregone, observe_layers
from defaker_opt.passes import PassResult, Preview
from defaker_opt.passes._rule import Rule as Rule
from defaker_opt.passes._scores import coded_attentions, operand_needs, operand_scales
from defaker_opt.progress import Progress
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import Samples
from defaker_opt.strict import Invalid
from defaker_opt.target import Target


@dataclass(frozen=True)
class Quantize:
    """Every linear layer must match a rule, and every rule must match a layer.

    balance: how tokens of the language stage count where methods look at pictures; all alike if it is not given.
    scores: how far codes of queries and keys reach, in attentions of which every layer has static activations, on
    targets with `attention: int8`; elsewhere, and if it is not given, attention's scores are products of floats.
    """

    rules: tuple[Rule, ...]
    balance: Balance | None = None
    scores: Clip | None = None

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
        if self.scores and not self.attentions(config):
            problems.append(
                f"scores: {self.scores}, but no attention has static activations in all its layers; remove it, or give "
                "those layers the scheme int8-static"
            )
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
                if name in weights:
                    done += 1
                    progress(f"quantize {name}", done / len(weights))
            self.scale_operands_(detector, group)
        quantized = {name: str(detector.codes[name].scheme) for name in weights if name in detector.codes}
        left = {name: self._why_float(name, shape) for name, shape in weights.items() if name not in quantized}
        notes = {"quantized": quantized, "left_in_float": {**left, **_never_quantized(detector.config)}}
        scales = {name: list(detector.operand_scales[name]) for name in self.attentions(detector.config)}
        return PassResult({**notes, **({"operand_scales": scales} if self.scores else {})})

    def attentions(self, config: DetectorConfig) -> tuple[str, ...]:
        """Those that get ranges for queries and keys."""
        if not self.scores:
            return ()
        rules = {name: self._rule(name) for name in _all_linear(config)}
        return coded_attentions(config, {n: rule is not None and rule.coded for n, rule in rules.items()})

    def scale_operands_(self, detector: Detector, group: Mapping[str, Statistics]) -> None:
        """Note the ranges of attentions that are in a group; those of a run that was killed are there already."""
        for name in group:
            attention, _, operand = name.rpartition(".")
            if operand == OPERANDS[0] and attention not in detector.operand_scales:
                assert self.scores is not None, "nobody else asks for operands"
                detector.operand_scales[attention] = operand_scales(attention, group, self.scores)

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
        needs = {**self._needs(weights), **operand_needs(self.attentions(detector.config))}
        yield from observe_layers(detector, samples, needs, self.balance, foregone)

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
