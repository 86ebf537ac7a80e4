"""How much worse than its reference a build may be: limits by metric, from a recipe, a manifest or the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

from defaker_opt import strict
from defaker_opt.errors import ConfigError, DefakerError, one_of

# What may be limited, and what a drop of it is a drop of. Verdict figures are those of `benchmarks.metrics`.
LIMITABLE: Mapping[str, str] = MappingProxyType(
    {
        "verdict_accuracy": "share of right verdicts",
        "verdict_balanced_accuracy": "mean of the shares of both classes that are judged right",
        "verdict_true_positive_rate": "share of forged images called forged",
        "verdict_false_positive_rate": "share of authentic images called forged",
        "verdict_auc": "area under the ROC curve",
        "verdict_average_precision": "average precision",
        "verdict_equal_error_rate": "error rate where both kinds of errors are equally frequent",
        "verdict_tpr_at_reference_fpr": "true-positive rate at the reference's false-positive rate",
        "verdict_calibration_error": "expected calibration error",
        "verdict_brier": "Brier score",
        "mask_iou": "IoU of mask and ground truth, mean over forged images",
        "mask_f1": "pixel F1 at the shipped threshold, mean over forged images",
        "mask_best_f1": "pixel F1 at each image's best threshold, mean over forged images",
        "mask_pixel_auc": "area under the ROC curve of pixels, mean over forged images",
        "mask_agreement": "IoU of both builds' masks, mean over all images; 1 for the reference itself",
    }
)


def _wrong_drop(value: float) -> str | None:
    return None if 0 < value < 1 else f"must be above 0 and below 1, got {value:g}; 0.005 is half a percentage point"


def _wrong_confidence(value: float) -> str | None:
    return None if 0.5 < value < 1 else f"must be above 0.5 and below 1, got {value:g}; 0.95 is usual"


@dataclass(frozen=True)
class Limit:
    """max_drop: a build that is worse by this much or more must not pass; a share, so 0.005 is half a point.

    confidence: one-sided, of an ACCEPT and of a REJECT.
    """

    max_drop: float
    confidence: float = 0.95

    CHECKS: ClassVar[Mapping[str, Callable[[float], str | None]]] = {
        "max_drop": _wrong_drop,
        "confidence": _wrong_confidence,
    }


@dataclass(frozen=True)
class LatencyLimit:
    """max: milliseconds that the median image may take from end to end, mask included."""

    max: float

    CHECKS: ClassVar[Mapping[str, Callable[[float], str | None]]] = {
        "max": lambda value: None if value > 0 else f"must be above 0 milliseconds, got {value:g}"
    }


# The one limit in `accept:` that is no drop.
LATENCY = "latency_ms"

Accept = Mapping[str, Limit | LatencyLimit]


def parse_limits(data: Mapping[str, Any], where: str, report: strict.Report) -> dict[str, Limit | LatencyLimit]:
    """The limits of `accept:` by metric."""
    limits: dict[str, Limit | LatencyLimit] = {}
    known = (*LIMITABLE, LATENCY)
    for name, value in data.items():
        if name in known:
            parsed = strict.parse(LatencyLimit if name == LATENCY else Limit, value, f"{where}.{name}", report)
            limits[name] = cast("Limit | LatencyLimit", parsed)
        else:
            report(where, one_of(name, known))
    return limits


def limits_as_json(limits: Accept) -> dict[str, dict[str, float]]:
    """As a manifest keeps them."""
    return {name: dataclasses.asdict(limit) for name, limit in limits.items()}


def shipped_limits(manifest: Mapping[str, Any]) -> Accept:
    """The limits of the recipe that a build was made with; none if it has none. Raises ConfigError."""
    problems: list[str] = []
    limits = parse_limits(
        manifest["recipe"].get("accept", {}), "recipe.accept", lambda where, what: problems.append(f"{where}: {what}")
    )
    if problems:
        raise ConfigError("manifest.json", problems)
    return limits


def choose_latency(manifest: Mapping[str, Any], asked: float) -> LatencyLimit | None:
    """That of --max-latency if it is above 0, else the one that the build was shipped with, if any."""
    shipped = shipped_limits(manifest).get(LATENCY)
    return LatencyLimit(asked) if asked > 0 else shipped if isinstance(shipped, LatencyLimit) else None


def choose_limits(manifest: Mapping[str, Any], max_drops: Sequence[str]) -> dict[str, Limit]:
    """Those of --max-drop if there are any, else those that the build was shipped with.

    max_drops: texts like verdict_accuracy=0.005. Raises DefakerError if one is wrong, or there is none at all.
    """
    asked: dict[str, Limit] = {}
    for text in max_drops:
        name, limit = _parse_max_drop(text)
        if name in asked:
            raise DefakerError(f"--max-drop {text}: {name} given twice; give each metric one limit")
        asked[name] = limit
    shipped = shipped_limits(manifest).items()
    limits = asked or {name: limit for name, limit in shipped if isinstance(limit, Limit)}
    if not limits:
        raise DefakerError(
            "no limit to judge by: the build's recipe has no `accept`; say how much it may lose, "
            "for example --max-drop verdict_accuracy=0.005"
        )
    return limits


def _parse_max_drop(text: str) -> tuple[str, Limit]:
    name, equals, value = text.partition("=")
    if name not in LIMITABLE:
        raise DefakerError(f"--max-drop {text}: {one_of(name, LIMITABLE)}")
    try:
        drop = float(value)
    except ValueError:
        drop = math.nan
    problem = _wrong_drop(drop) if equals else "must be METRIC=DROP, such as verdict_accuracy=0.005"
    if problem:
        raise DefakerError(f"--max-drop {text}: {problem}")
    return name, Limit(drop)
