"""Metrics of both builds on the same pictures, with what each picture adds to the error of the drop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from defaker_opt.benchmarks import influence
from defaker_opt.benchmarks.metrics import VERDICT_METRICS, VerdictRows
from defaker_opt.errors import DefakerError
from defaker_opt.report.evidence import Bools, Evidence, Floats
from defaker_opt.report.values import Better


@dataclass(frozen=True)
class Column:
    """used [N]: the pictures that count. influence [used]: of each on the drop."""

    better: Better
    used: Bools = field(repr=False)
    reference: float
    build: float
    influence: Floats = field(repr=False)

    @property
    def drop(self) -> float:
        """How much worse the build is."""
        return self.build - self.reference if self.better == "lower" else self.reference - self.build


def column(metric: str, evidence: Evidence, thresholds: tuple[float, float]) -> Column:
    """A metric of `limits.LIMITABLE` but accuracy and AUC, or mask_area. Raises DefakerError if undefined."""
    if metric.startswith("verdict_"):
        return _verdict_column(metric.removeprefix("verdict_"), evidence, thresholds)
    if metric == "mask_agreement":
        # The reference agrees with itself.
        return _mean_column("higher", np.ones(len(evidence)), evidence.agreement)
    better: Better = "neither" if metric == "mask_area" else "higher"
    return _mean_column(better, evidence.reference[metric], evidence.build[metric])


def _verdict_column(name: str, evidence: Evidence, thresholds: tuple[float, float]) -> Column:
    metric = VERDICT_METRICS[name]
    rows = VerdictRows(evidence.labels, evidence.reference["probability"], evidence.build["probability"], *thresholds)
    n = len(evidence)
    reference, build = (float(value[0]) for value in metric.compute(rows, np.ones((1, n))))
    if np.isnan(reference + build):
        raise DefakerError("needs authentic and forged images")
    return Column(metric.better, np.ones(n, bool), reference, build, influence.DROPS[name](rows))


def _mean_column(better: Better, reference: Floats, build: Floats) -> Column:
    used = ~np.isnan(reference) & ~np.isnan(build)
    if not used.any():
        raise DefakerError("no forged image with a ground truth mask")
    first, second = reference[used], build[used]
    return Column(
        better,
        used,
        float(first.mean()),
        float(second.mean()),
        influence.of_mean(first - second, np.ones(len(first), bool)),
    )
