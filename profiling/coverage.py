"""Do intervals cover, decisions err and looks save as promised? python profiling/coverage.py [--quick].

Prints a table for people and one JSON object as its last line. Every row is a simulation from a fixed seed, or, where
it says exact, a sum over all outcomes. `allowed` is what the row is held to, before the error of the simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from defaker_opt.benchmarks.localization import mean_over_forged
from defaker_opt.benchmarks.metrics import CALIBRATION_BINS, VERDICT_METRICS, VerdictRows
from defaker_opt.statistics import Interval
from defaker_opt.statistics.auc import compare_auc
from defaker_opt.statistics.bootstrap import bca_interval, bootstrap_clusters
from defaker_opt.statistics.crossing import Rates, critical_scores, limit_test
from defaker_opt.statistics.decision import decide
from defaker_opt.statistics.intervals import clopper_pearson, wilson
from defaker_opt.statistics.paired_proportions import (
    PairedCounts,
    count_pairs,
    critical_value,
    score_tail,
    tango_bounds,
    tango_score,
)
from defaker_opt.statistics.sample_size import answer_power, images_needed
from defaker_opt.statistics.sequential import Plan, even_looks, judge_look, plan_looks

Floats = NDArray[np.float64]
COVERAGE = Interval(0.93, 0.97)
ERROR = Interval(0.0, 0.05)


@dataclass(frozen=True)
class Row:
    """One figure, 0…1. runs: how many simulations it is the mean of, 0 for exact."""

    what: str
    setting: str
    value: float
    allowed: Interval
    runs: int

    @property
    def tolerance(self) -> float:
        """Three standard errors of a share of that many runs, at the end of what is allowed that is nearer."""
        nearest = min(max(self.value, self.allowed.low), self.allowed.high)
        return 3 * float(np.sqrt(max(nearest * (1 - nearest), 1e-4) / self.runs)) if self.runs else 1e-9

    @property
    def holds(self) -> bool:
        """Whether the figure is allowed, as far as the runs can tell."""
        return self.allowed.low - self.tolerance <= self.value <= self.allowed.high + self.tolerance


def simulate(runs: int, seed: int, once: Callable[[np.random.Generator], float]) -> float:
    """Mean over runs, each with a generator of its own."""
    return float(np.mean([once(np.random.default_rng((seed, run))) for run in range(runs)]))


# Accuracy


def tango_independent(runs: int) -> Iterator[Row]:
    """Coverage of the score interval on independent pictures."""
    random = np.random.default_rng(1)
    for pictures, discordance, drop in ((300, 0.03, 0.0), (1200, 0.01, 0.0), (1200, 0.02, 0.01), (1200, 0.03, 0.0),
                                        (1200, 0.015, 0.01), (5000, 0.01, 0.005)):  # fmt: skip
        gain, loss = (discordance - drop) / 2, (discordance + drop) / 2
        losses, gains, _ = random.multinomial(pictures, [loss, gain, 1 - discordance], size=20 * runs).T
        low, high = tango_bounds(losses, gains, pictures, 1.959964)
        value = float(((low <= drop) & (drop <= high)).mean())
        setting = f"n {pictures}, flips {discordance:.1%}, drop {drop:.1%}"
        yield Row("Tango, independent", setting, value, COVERAGE, 20 * runs)


def clustered_rows(
    random: np.random.Generator, clusters: int, size: int, rates: Rates, alike: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Reference right, build right, cluster, each [clusters · size]; alike: share of clusters of one mind, 0…1."""
    kinds = random.choice(3, (clusters, size), p=[rates.loss, rates.gain, 1 - rates.loss - rates.gain])
    same = random.random(clusters) < alike
    kinds[same] = kinds[same, :1]
    flat = kinds.reshape(-1)
    right = random.random(len(flat)) < 0.9
    return (
        np.where(flat == 0, True, np.where(flat == 1, False, right)),
        np.where(flat == 0, False, np.where(flat == 1, True, right)),
        np.repeat(np.arange(clusters), size),
    )


def tango_clustered(runs: int) -> Iterator[Row]:
    """Coverage of the score interval with a design effect, against none."""
    for clusters, size, alike, discordance, drop in ((600, 2, 0.0, 0.02, 0.0), (600, 2, 0.5, 0.02, 0.005),
                                                    (100, 12, 0.2, 0.03, 0.01), (40, 30, 0.1, 0.05, 0.0)):  # fmt: skip
        rates = Rates((discordance + drop) / 2, (discordance - drop) / 2)

        def covers(random: np.random.Generator) -> float:
            # Called before the loop goes on.
            counts = count_pairs(*clustered_rows(random, clusters, size, rates, alike))  # noqa: B023
            # The interval ends where the score is critical, so it need not be searched for.
            score = tango_score(counts.losses, counts.gains, counts.pictures, drop)  # noqa: B023
            return float(abs(score) <= critical_value(counts, 0.025))

        setting = f"{clusters} clusters of {size}, {alike:.0%} of one mind, flips {discordance:.0%}, drop {drop:.1%}"
        yield Row("Tango, clustered", setting, simulate(2 * runs, 2, covers), COVERAGE, 2 * runs)


def one_proportion(runs: int) -> Iterator[Row]:
    """Exact coverage of one share's intervals."""
    for trials, share in ((300, 0.02), (1200, 0.01), (1200, 0.3)):
        chances = scipy.stats.binom.pmf(np.arange(trials + 1), trials, share)
        for name, interval in (("Clopper-Pearson", clopper_pearson), ("Wilson", wilson)):
            near = np.flatnonzero(chances > 1e-12)
            value = float(sum(chances[k] * (share in interval(int(k), trials)) for k in near))
            # Clopper and Pearson promise at least, not about, their confidence.
            allowed = Interval(0.95, 1.0) if name == "Clopper-Pearson" else COVERAGE
            yield Row(f"{name}, exact", f"n {trials}, share {share:.0%}", value, allowed, 0)


# AUC


def auc_rows(
    random: np.random.Generator, pairs: int, spread: float, noise: float
) -> tuple[NDArray[np.int64], Floats, Floats, NDArray[np.int64]]:
    """Twins of one photograph: labels, two scorings, cluster. spread: of what twins share; noise: of the build."""
    labels = np.tile([0, 1], pairs).astype(np.int64)
    shared = np.repeat(random.normal(0, spread, pairs), 2)
    reference = 2.2 * labels + shared + random.normal(size=2 * pairs)
    build = reference + np.repeat(random.normal(0, noise, pairs), 2) + random.normal(0, noise, 2 * pairs)
    return labels, reference, build, np.repeat(np.arange(pairs), 2)


def delong(runs: int) -> Iterator[Row]:
    """Coverage of the interval of an AUC drop."""
    for spread, pairs in ((0.0, 150), (0.7, 150), (0.7, 600)):
        noise = 0.4
        # Scores of the two classes differ by 2.2, with these variances: Φ(2.2 / √(2 · variance)).
        variances = (1 + spread**2, 1 + spread**2 + 2 * noise**2)
        first, second = (scipy.stats.norm.cdf(2.2 / np.sqrt(2 * variance)) for variance in variances)

        def covers(random: np.random.Generator) -> float:
            labels, reference, build, cluster = auc_rows(random, pairs, spread, noise)  # noqa: B023
            found = compare_auc(labels, reference, build, cluster)
            assert found is not None
            return float(first - second in found.interval)  # noqa: B023

        setting = f"{pairs} twin pairs, shared spread {spread}"
        yield Row("DeLong, clustered", setting, simulate(runs, 3, covers), COVERAGE, runs)


# Everything else, by bootstrap


def judged(random: np.random.Generator, pairs: int, collapsed: float) -> tuple[VerdictRows, Floats, NDArray[np.int64]]:
    """Verdicts of twins by two builds, IoU of both [pictures, 2] (forged ones only), cluster.

    collapsed: share of masks that the build loses a part of.
    """
    labels = np.tile([0, 1], pairs).astype(np.int64)
    logits = np.repeat(random.normal(0, 0.7, pairs), 2) + 1.6 * (2 * labels - 1) + random.normal(0, 1.3, 2 * pairs)
    changed = 1.1 * logits + random.normal(0, 0.5, 2 * pairs)
    iou = random.beta(4, 1.5, 2 * pairs)
    kept = np.where(random.random(2 * pairs) < collapsed, random.random(2 * pairs), 1.0)
    masks = np.stack([iou, np.clip(iou + random.normal(0, 0.02, 2 * pairs), 0, 1) * kept], axis=1)
    rows = VerdictRows(labels, scipy.special.expit(logits), scipy.special.expit(changed))
    return rows, masks, np.repeat(np.arange(pairs), 2)


def drops(rows: VerdictRows, masks: Floats, weights: Floats) -> Floats:
    """All figures' drops under weights [B, N], [B, figures]; IoU last."""
    forged = rows.labels == 1
    values = [metric.drop(*metric.compute(rows, weights)) for metric in VERDICT_METRICS.values()]
    iou = [mean_over_forged(masks[:, build], forged, weights) for build in (0, 1)]
    return np.stack([*values, iou[0] - iou[1]], axis=1)


def bca(runs: int, pairs: int, resamples: int, collapsed: float) -> Iterator[Row]:
    """Coverage of the bootstrap's interval, for every figure; the truth is that of 200,000 pairs."""
    rows, masks, _ = judged(np.random.default_rng(4), 200_000, collapsed)
    truth = drops(rows, masks, np.ones((1, len(masks))))[0]
    names = [*VERDICT_METRICS, "mask_iou"]
    covered = np.zeros(len(names))
    for run in range(runs):
        rows, masks, cluster = judged(np.random.default_rng((5, run)), pairs, collapsed)
        result = bootstrap_clusters(lambda weights: drops(rows, masks, weights), cluster, resamples, run)  # noqa: B023
        covered += [truth[figure] in bca_interval(result, figure) for figure in range(len(names))]
    for name, value in zip(names, covered / runs):
        # With fewer than 80 pictures in a bin, chance outweighs calibration: known, and said at the figure.
        crowded = name != "calibration_error" or 2 * pairs / CALIBRATION_BINS >= 80
        allowed = COVERAGE if crowded else Interval(0.0, 1.0)
        yield Row("BCa, clustered", f"{name}, {pairs} twin pairs", float(value), allowed, runs)


def bca_of_rare(runs: int) -> Iterator[Row]:
    """Coverage for a mean of changes that few clusters carry: not held to anything, but known."""
    for pairs, collapsed in ((300, 0.01), (600, 0.005), (600, 0.01), (600, 0.02), (600, 0.05)):
        sample = judged(np.random.default_rng(6), 400_000, collapsed)[1][1::2]
        truth, covered = float((sample[:, 0] - sample[:, 1]).mean()), 0
        for run in range(runs):
            masks = judged(np.random.default_rng((7, run)), pairs, collapsed)[1][1::2]
            change = masks[:, 0] - masks[:, 1]
            mean = lambda weights: (weights @ change / weights.sum(axis=1))[:, None]  # noqa: B023, E731
            covered += truth in bca_interval(bootstrap_clusters(mean, np.arange(pairs), 500, run), 0)
        setting = f"mean IoU, {pairs} masks, {pairs * collapsed:.0f} collapsed"
        yield Row("BCa, rare changes", setting, covered / runs, Interval(0.0, 1.0), runs)


# Decisions


def false_accept(runs: int) -> Iterator[Row]:
    """How often a drop of exactly the limit is accepted, and rejected, summed over all outcomes."""
    for pictures, limit in ((300, 0.01), (600, 0.005), (1200, 0.005), (1200, 0.01), (1200, 0.02), (5000, 0.005)):
        losses, gains = np.meshgrid(np.arange(120), np.arange(120))
        scores = tango_score(losses, gains, pictures, limit).reshape(-1)
        accept, reject = critical_scores(pictures, limit, 0.05)
        cells = np.stack([losses, gains, pictures - losses - gains], axis=-1).reshape(-1, 3)
        for discordance in (limit, 1.3 * limit, 0.025):
            if discordance >= limit:
                shares = [(discordance + limit) / 2, (discordance - limit) / 2, 1 - discordance]
                chances = scipy.stats.multinomial.pmf(cells, pictures, shares)
                setting = f"n {pictures}, limit {limit:.1%}, flips {discordance:.2%}"
                yield Row("false ACCEPT, exact", setting, float(chances[scores <= -accept].sum()), ERROR, 0)
                yield Row("false REJECT, exact", setting, float(chances[scores >= reject].sum()), ERROR, 0)


def false_accept_clustered(runs: int) -> Iterator[Row]:
    """The same for pictures in clusters."""
    for clusters, size, alike, limit, discordance in (
        (600, 2, 0.5, 0.01, 0.01), (600, 2, 0.5, 0.01, 0.02), (150, 8, 0.2, 0.01, 0.01), (150, 8, 0.2, 0.01, 0.03),
        (60, 20, 0.1, 0.01, 0.03),
    ):  # fmt: skip
        rates = Rates((discordance + limit) / 2, (discordance - limit) / 2)

        def accepts(random: np.random.Generator) -> float:
            counts = count_pairs(*clustered_rows(random, clusters, size, rates, alike))  # noqa: B023
            score = float(tango_score(counts.losses, counts.gains, counts.pictures, limit))  # noqa: B023
            # The test is never surer than the score's own tail; only where that is small need it be asked.
            return float(score_tail(counts, -score) <= 0.05 and decide(limit_test(counts, limit)) == "ACCEPT")  # noqa: B023

        setting = f"{clusters} clusters of {size}, {alike:.0%} of one mind, limit {limit:.1%}, flips {discordance:.0%}"
        yield Row("false ACCEPT, clustered", setting, simulate(runs, 6, accepts), ERROR, runs)


def power(runs: int) -> Iterator[Row]:
    """Whether the number of images that was said to be needed gives the answer as often as asked, 80 %."""
    for losses, gains, limit in ((6, 6, 0.005), (12, 11, 0.01), (0, 0, 0.005), (20, 4, 0.005)):
        needed = images_needed(PairedCounts(losses, gains, 1200, 1200), limit)
        assert needed is not None
        rates, random = needed.rates, np.random.default_rng(7)
        shares = [rates.loss, rates.gain, 1 - rates.loss - rates.gain]
        b, c, _ = random.multinomial(needed.images, shares, size=10 * runs).T
        accept, reject = critical_scores(needed.images, limit, 0.05)
        scores = tango_score(b, c, needed.images, limit)
        answers = scores <= -accept if needed.answer == "ACCEPT" else scores >= reject
        value = float(answers.mean())
        setting = f"seen {losses}:{gains} of 1200, limit {limit:.1%}: {needed.images} images"
        # Discordant pictures come one by one, so the power jumps past what was asked for where they are few.
        yield Row(f"power of {needed.answer}", setting, value, Interval(0.78, 0.96), len(answers))


# Looks


def looks_once(random: np.random.Generator, plan: Plan, clusters: int, rates: Rates, alike: float) -> tuple[str, float]:
    """The decision, and the share of the pictures that it took; all pictures of a cluster come together."""
    looks = plan.boundaries.looks
    size = looks[-1] // clusters
    rows = clustered_rows(random, clusters, size, rates, alike)
    for number, pictures in enumerate(looks):
        reference, build, cluster = (part[:pictures] for part in rows)
        look = judge_look(plan, number, count_pairs(reference, build, cluster if size > 1 else None))
        if look.finished:
            return look.decision, pictures / looks[-1]
    raise AssertionError("the last look always finishes")


def sequential(runs: int) -> Iterator[Row]:
    """Errors at the limit, and pictures saved where nothing was lost."""
    plans = {(n, limit): plan_looks(even_looks(n), limit) for n in (1200, 2400) for limit in (0.005, 0.01)}
    for pictures, limit, size, alike in ((1200, 0.005, 1, 0.0), (1200, 0.01, 1, 0.0), (1200, 0.01, 2, 0.5)):
        for factor in (1.0, 3.0):
            rates = Rates(limit * (factor + 1) / 2, limit * (factor - 1) / 2)
            plan, clusters = plans[pictures, limit], pictures // size
            ends = [looks_once(np.random.default_rng((8, run)), plan, clusters, rates, alike)[0] for run in range(runs)]
            setting = f"n {pictures}, clusters of {size}, limit {limit:.1%}, flips {limit * factor:.1%}"
            for answer in ("ACCEPT", "REJECT"):
                yield Row(f"looks, false {answer}", setting, float(np.mean([e == answer for e in ends])), ERROR, runs)
    for pictures, limit in plans:
        for discordance in (0.005, 0.01, 0.02, 0.03):
            yield from saving(plans[pictures, limit], discordance, runs)


def saving(plan: Plan, discordance: float, runs: int) -> Iterator[Row]:
    """Share of the pictures saved without a drop; held to 30 % where all pictures together would nearly surely tell."""
    rates, pictures = Rates(discordance / 2, discordance / 2), plan.boundaries.looks[-1]
    found = [looks_once(np.random.default_rng((9, run)), plan, pictures, rates, 0.0) for run in range(runs)]
    setting = f"n {pictures}, limit {plan.limit:.1%}, flips {discordance:.1%}, drop 0"
    single = answer_power(pictures, plan.limit, rates, plan.confidence)
    yield Row("one look, ACCEPT", setting, single, Interval(0.0, 1.0), 0)
    yield Row("looks, ACCEPT", setting, float(np.mean([end == "ACCEPT" for end, _ in found])), Interval(0.0, 1.0), runs)
    saved = 1 - float(np.mean([share for _, share in found]))
    yield Row("looks, saved", setting, saved, Interval(0.3 if single > 0.88 else 0.0, 1.0), runs)


def measure(quick: bool) -> Iterator[Row]:
    """Every row; quick: fewer runs, about a minute."""
    runs, slow_runs = (200, 60) if quick else (2000, 300)
    parts = (tango_independent, tango_clustered, one_proportion, delong, false_accept, false_accept_clustered, power,
             sequential)  # fmt: skip
    for part in parts:
        yield from part(runs)
    yield from bca(slow_runs, 300, 200 if quick else 500, 0.1)
    yield from bca_of_rare(slow_runs)


def main() -> None:
    """Print every row, and say which do not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = []
    for row in measure(options.quick):
        rows.append(row)
        mark = "" if row.holds else "   <- outside"
        print(f"{row.what:<40} {row.setting:<62} {row.value:7.2%} of {row.runs or 'all':>5}{mark}", flush=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
    result = {"quick": options.quick, "seconds": round(time.perf_counter() - start), "rows": [asdict(r) for r in rows]}
    print(json.dumps({**result, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
