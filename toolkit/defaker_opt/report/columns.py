"""Metrics as functions of weights, for the bootstrap: the reference's and the build's value under each weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from defaker_opt.benchmarks.metrics import VERDICT_METRICS, VerdictRows
from defaker_opt.report.evidence import Bools, Evidence, Floats
from defaker_opt.report.values import Better


@dataclass(frozen=True)
class Column:
    """used [N]: the pictures that count. sides: weights [B, used] → both builds' values, each [B]."""

    better: Better
    used: Bools = field(repr=False)
    sides: Callable[[Floats], tuple[Floats, Floats]] = field(repr=False)

    def drop(self, weights: Floats) -> Floats:
        """How much worse the build is, [B]."""
        reference, build = self.sides(weights)
        return build - reference if self.better == "lower" else reference - build


def column(metric: str, evidence: Evidence, thresholds: tuple[float, float]) -> Column:
    """A metric of `limits.LIMITABLE`, or mask_area, on these pictures."""
    if metric.startswith("verdict_"):
        return _verdict_column(metric.removeprefix("verdict_"), evidence, thresholds)
    if metric == "mask_agreement":
        # The reference agrees with itself.
        return _mean_column("higher", np.ones(len(evidence)), evidence.agreement)
    better: Better = "neither" if metric == "mask_area" else "higher"
    return _mean_column(better, evidence.reference[metric], evidence.build[metric])


def _verdict_column(name: str, evidence: Evidence, thresholds: tuple[float, float]) -> Column:
    metric = VERDICT_METRICS[name]
    scores = evidence.reference["probability"], evidence.build["probability"]
    rows = VerdictRows(evidence.labels, *scores, *thresholds)
    return Column(metric.better, np.ones(len(evidence), bool), lambda weights: metric.compute(rows, weights))


def _mean_column(better: Better, reference: Floats, build: Floats) -> Column:
    used = ~np.isnan(reference) & ~np.isnan(build)
    pair = np.stack([reference[used], build[used]], axis=1)  # [used, 2]

    def sides(weights: Floats) -> tuple[Floats, Floats]:
        means = weights @ pair / weights.sum(axis=1, keepdims=True)
        return means[:, 0], means[:, 1]

    return Column(better, used, sides)
