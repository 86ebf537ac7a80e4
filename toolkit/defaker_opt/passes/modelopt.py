"""NVIDIA ModelOpt as the quantizer, for targets that run its formats: it chooses scales and factors, codes become ours.

int8-smoothquant   INT8 with a scale for each row and one range of activations; large channels move into weights
                   (Xiao et al. 2023); scheme `int8-static`
int4-awq           INT4 in blocks; columns that meet large inputs are scaled up (Lin et al. 2024); scheme `int4-sym-g…`
fp8                FP8 with one scale for a weight and one for its input; scheme `fp8-static`
auto               each decoder layer of the language part int4-awq, int8-smoothquant or float, as ModelOpt's
                   `auto_quantize` finds by the divergence of the verdict, with `effective_bits` a weight on average
A whole stage is in memory at a time, unlike in `quantize`.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, linear_weights
from defaker_opt.errors import PassError, one_of
from defaker_opt.methods import Scheme
from defaker_opt.passes import PassResult, Preview
from defaker_opt.passes._modelopt import (
    AUTO,
    AUTO_CHOICES,
    JUDGED,
    SCHEMES,
    SEARCH,
    fitted_scheme,
    library,
    stage_codes,
)
from defaker_opt.progress import Progress
from defaker_opt.samples import Samples
from defaker_opt.strict import Invalid
from defaker_opt.target import Target

_STAGES = ("vision_encoder", "language", "mask_encoder")


@dataclass(frozen=True)
class Modelopt:
    """stages: stage → algorithm, see above; others stay float. keep: globs over full weight names that stay float.

    effective_bits: of a weight on average, for `auto`. pairs: how many of the calibration set's pairs of twins int4-awq
    and auto are shown, evenly spread, as AWQ's search runs a layer eleven times for each call; others are shown all.
    """

    stages: dict[str, str]
    keep: tuple[str, ...] = ()
    effective_bits: float = 6.0
    pairs: int = 16

    CHECKS: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {
        "stages": lambda stages: _wrong_stages(stages),
        "effective_bits": lambda bits: None if 4.5 <= bits <= 8 else f"must be at least 4.5 and at most 8, got {bits}",
        "pairs": lambda pairs: None if pairs >= 1 else f"must be 1 or more, got {pairs}",
    }

    def __post_init__(self) -> None:
        if AUTO in [algorithm for stage, algorithm in self.stages.items() if stage != "language"]:
            raise Invalid("stages: auto is for the language part, whose verdict it looks at; give int8-smoothquant")

    def check(self, config: DetectorConfig, target: Target) -> Preview:
        """See `Pass`."""
        library()
        chosen = {name: self._schemes(name, shape) for name, shape in self._weights(config).items()}
        kinds = {scheme.kind for schemes in chosen.values() for scheme in schemes}
        problems = [
            f"{kind} cannot run on target {target.name}, which runs {', '.join(target.kinds)}"
            for kind in sorted(kinds - set(target.kinds))
        ]
        unused = [glob for glob in self.keep if not any(fnmatchcase(name, glob) for name in self._weights(config))]
        if AUTO in self.stages.values() and (narrow := self._too_narrow(config)):
            problems.append(narrow)
        problems += [f"keep: {glob!r} matches no linear layer of {', '.join(self.stages)}" for glob in unused]
        if problems:
            raise PassError("modelopt:\n  " + "\n  ".join(problems))
        # What `auto` will choose is not known yet: the last, widest choice is foreseen.
        schemes = {name: str(found[-1]) if found else "float" for name, found in chosen.items()}
        coded = tuple(name for name, found in chosen.items() if found)
        reasons = {name: self._why_float(name) for name in chosen if name not in coded}
        factored = tuple(name for name in coded if self.stages[name.partition(".")[0]] != "fp8")
        return Preview(schemes, reasons, f"modelopt for {len(coded)} layers", {}, factored)

    def apply(self, detector: Detector, progress: Progress, samples: Samples | None = None) -> PassResult:
        """See `Pass`."""
        assert samples is not None, "check said that pictures are needed"
        weights = self._weights(detector.config)
        chosen = [stage for stage in _STAGES if stage in self.stages]
        shown = {stage: _spread(samples, self.pairs if self.stages[stage] in SEARCH else None) for stage in chosen}
        for index, stage in enumerate(chosen):
            progress(f"modelopt {stage}", index / len(chosen))
            own = {n: s for n, s in weights.items() if n.startswith(f"{stage}.") and self._schemes(n, s)}
            # A run that was killed may have left some; scales are found together, so a stage is begun anew.
            earlier = [name for name in own if name in detector.codes]
            if len(earlier) == len(own):
                continue
            for name in earlier:
                del detector.codes[name]
            detector.codes.update(
                stage_codes(detector, stage, own, self.stages[stage], shown[stage], self.effective_bits)
            )
        pictures = {stage: len(each) for stage, each in shown.items()}
        quantized = {name: str(detector.codes[name].scheme) for name in weights if name in detector.codes}
        left = {name: self._why_float(name) for name in weights if name not in quantized}
        version = importlib.metadata.version("nvidia-modelopt")
        notes = {"quantized": quantized, "left_in_float": left, "modelopt": version, "pictures": pictures}
        return PassResult(notes)

    def _too_narrow(self, config: DetectorConfig) -> str | None:
        """`auto` gives all layers blocks of one size."""
        shapes = {name: shape for name, shape in self._weights(config).items() if self._schemes(name, shape)}
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(JUDGED)}
        shared = math.gcd(*(columns for _, columns in shapes.values()))
        if shapes and fitted_scheme("int4-awq", shared) is None:
            name = min(shapes, key=lambda each: math.gcd(shapes[each][1], 128))
            return (
                f"auto: the columns of all layers share no blocks that engines take ({name} has {shapes[name][1]}); "
                "add such layers to keep:, or give int8-smoothquant"
            )
        return None

    def _weights(self, config: DetectorConfig) -> dict[str, tuple[int, ...]]:
        return {n: s for stage in _STAGES if stage in self.stages for n, s in linear_weights(config, stage).items()}

    def _schemes(self, name: str, shape: tuple[int, ...]) -> list[Scheme]:
        """What a layer may get: one scheme, several with `auto`, none if it stays float."""
        if any(fnmatchcase(name, glob) for glob in self.keep):
            return []
        algorithm = self.stages[name.partition(".")[0]]
        if algorithm == AUTO and not name.startswith(JUDGED):
            return []
        found = [fitted_scheme(each, shape[1]) for each in (AUTO_CHOICES if algorithm == AUTO else (algorithm,))]
        return [scheme for scheme in found if scheme is not None]

    def _why_float(self, name: str) -> str:
        kept = next((glob for glob in self.keep if fnmatchcase(name, glob)), None)
        if kept:
            return f"keep: {kept!r} keeps it in float"
        if self.stages[name.partition(".")[0]] == AUTO:
            seen = name.startswith(JUDGED)
            return "auto_quantize leaves it in float" if seen else "no decoder layer, which auto is about"
        return "its columns have no blocks that engines take"


def _wrong_stages(stages: Mapping[str, str]) -> str | None:
    for stage, algorithm in stages.items():
        if stage not in _STAGES:
            return f"{one_of(stage, _STAGES)}; the mask decoder stays in float"
        if algorithm not in (*SCHEMES, AUTO):
            return f"{stage}: {one_of(algorithm, (*SCHEMES, AUTO))}"
    return None if stages else "must not be empty; {language: int4-awq} quantizes the language part"


def _spread(samples: Samples, pairs: int | None) -> Samples:
    """So many pairs of neighbours, evenly spread over the set; all of it if it has no more, or for None."""
    have = len(samples) // 2
    if pairs is None or pairs >= have:
        return samples
    starts = [2 * (index * have // pairs) for index in range(pairs)]
    items = tuple(item for start in starts for item in samples.items[start : start + 2])
    return Samples(samples.name, samples.digest, items)


PASS = Modelopt
