"""Do intervals cover, decisions err and looks save as promised? python profiling/coverage.py [--runs N].

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
import scipy.signal
from numpy.typing import NDArray

from defaker_opt.benchmarks.influence import DROPS, of_mean
from defaker_opt.benchmarks.metrics import VERDICT_METRICS, VerdictRows, calibration_error
from defaker_opt.statistics import Interval
from defaker_opt.statistics.auc import compare_auc
from defaker_opt.statistics.crossing import Rates, critical_scores, limit_test
from defaker_opt.statistics.decision import decide
from defaker_opt.statistics.intervals import clopper_pearson_upper
from defaker_opt.statistics.paired_proportions import (
    PairedCounts,
    count_pairs,
    critical_value,
    score_tail,
    tango_bounds,
    tango_score,
)
from defaker_opt.statistics.sample_size import answer_power, images_needed
from defaker_opt.statistics.sequential import Plan, chance_of_answer, even_looks, judge_look, plan_looks
from defaker_opt.statistics.spread import deciding_interval, spread_interval, spread_of

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


def flip_bound(runs: int) -> Iterator[Row]:
    """Exact coverage of the upper bound of a share of flips, which promises at least 95 %."""
    for trials, share in ((300, 0.02), (1200, 0.01), (1200, 0.3)):
        chances = scipy.stats.binom.pmf(np.arange(trials + 1), trials, share)
        near = np.flatnonzero(chances > 1e-12)
        value = float(sum(chances[k] * (share <= clopper_pearson_upper(int(k), trials)) for k in near))
        yield Row("Clopper-Pearson, exact", f"n {trials}, share {share:.0%}", value, Interval(0.95, 1.0), 0)


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
    # authentic: of how many pairs the authentic twin is there too.
    for spread, pairs, authentic in ((0.0, 150, 150), (0.7, 150, 150), (0.7, 600, 600), (0.7, 300, 40), (0.7, 300, 20)):
        noise = 0.4
        # Scores of the two classes differ by 2.2, with these variances: Φ(2.2 / √(2 · variance)).
        variances = (1 + spread**2, 1 + spread**2 + 2 * noise**2)
        first, second = (scipy.stats.norm.cdf(2.2 / np.sqrt(2 * variance)) for variance in variances)

        covered, accepted = 0, 0
        for run in range(runs):
            rows = auc_rows(np.random.default_rng((3, run)), pairs, spread, noise)
            kept = (rows[0] == 1) | (np.arange(2 * pairs) < 2 * authentic)
            rows = tuple(each[kept] for each in rows)
            shown, deciding = compare_auc(*rows), compare_auc(*rows, 0.9)
            assert shown is not None and deciding is not None
            covered += first - second in shown.interval
            accepted += deciding.deciding.high < first - second
        setting = f"{pairs} forged, {authentic} with authentic twin, shared spread {spread}"
        yield Row("DeLong, clustered", setting, covered / runs, COVERAGE, runs)
        yield Row("DeLong, false ACCEPT", setting, accepted / runs, ERROR, runs)


# Everything else, by influences


@dataclass(frozen=True)
class Change:
    """What a build does to logits: noise of their own, and a slope, which takes their calibration away."""

    noise: float
    slope: float


def judged(random: np.random.Generator, pairs: int, change: Change) -> tuple[VerdictRows, NDArray[np.int64]]:
    """Verdicts of twins by two builds; cluster."""
    labels = np.tile([0, 1], pairs).astype(np.int64)
    logits = np.repeat(random.normal(0, 0.7, pairs), 2) + 1.6 * (2 * labels - 1) + random.normal(0, 1.3, 2 * pairs)
    changed = change.slope * logits + random.normal(0, change.noise, 2 * pairs)
    return VerdictRows(labels, scipy.special.expit(logits), scipy.special.expit(changed)), np.repeat(
        np.arange(pairs), 2
    )


def drop_of(name: str, rows: VerdictRows, bins: int) -> float:
    """A figure's drop; bins: those of the calibration error."""
    metric = VERDICT_METRICS[name]
    one = np.ones((1, len(rows.labels)))
    if name != "calibration_error":
        return float(metric.drop(*metric.compute(rows, one))[0])
    first, second = (calibration_error(rows.labels, side, one, bins)[0] for side in (rows.reference, rows.build))
    return float(second - first)


def verdict_figures(runs: int) -> Iterator[Row]:
    """Coverage for figures of verdicts; the truth is that of 200,000 pairs."""
    for pairs, change in (
        (150, Change(0.3, 1.05)),
        (300, Change(0.5, 1.1)),
        (300, Change(0.2, 1.0)),
        (600, Change(0.1, 1.02)),
    ):
        # As many as the samples have.
        bins = min(15, 2 * pairs // 80)
        large = judged(np.random.default_rng(4), 200_000, change)[0]
        truth = {name: drop_of(name, large, bins) for name in DROPS}
        covered, accepted = dict.fromkeys(DROPS, 0), dict.fromkeys(DROPS, 0)
        for run in range(runs):
            rows, cluster = judged(np.random.default_rng((5, run)), pairs, change)
            for name, influence in DROPS.items():
                spread = spread_of(drop_of(name, rows, bins), influence(rows), cluster)
                covered[name] += truth[name] in spread_interval(spread)
                accepted[name] += deciding_interval(spread, 0.9).high < truth[name]
        for name, hits in covered.items():
            setting = f"{name}, {pairs} twin pairs, noise {change.noise}, slope {change.slope}"
            yield Row("influences, clustered", setting, hits / runs, COVERAGE, runs)
            yield Row("influences, false ACCEPT", setting, accepted[name] / runs, ERROR, runs)


def mask_changes(random: np.random.Generator, masks: int, collapsed: float, repaired: float) -> Floats:
    """Change of IoU: a little of all masks, and shares of them that are lost in part or found better."""
    iou = random.beta(4, 1.5, masks)
    little = iou - np.clip(iou + random.normal(0, 0.02, masks), 0, 1)
    kind = random.random(masks)
    return np.where(
        kind < collapsed,
        iou * random.random(masks),
        np.where(kind > 1 - repaired, (iou - 1) * random.random(masks), little),
    )


def mask_means(runs: int) -> Iterator[Row]:
    """Coverage for means over masks; with some three collapsed ones, a sample often has none that is like them."""
    for masks, collapsed, repaired in (
        (300, 0.01, 0.0),
        (600, 0.005, 0.0),
        (600, 0.01, 0.0),
        (600, 0.01, 0.01),
        (600, 0.02, 0.0),
        (600, 0.05, 0.02),
        (300, 0.1, 0.0),
    ):
        large = mask_changes(np.random.default_rng(6), 2_000_000, collapsed, repaired)
        truth, covered, accepted = float(large.mean()), 0, 0
        for run in range(runs):
            change = mask_changes(np.random.default_rng((7, run)), masks, collapsed, repaired)
            spread = spread_of(float(change.mean()), of_mean(change, np.ones(masks, bool)), np.arange(masks))
            covered += truth in spread_interval(spread)
            accepted += deciding_interval(spread, 0.9).high < truth
        setting = f"mean IoU, {masks} masks, some {masks * collapsed:.0f} collapsed, {masks * repaired:.0f} repaired"
        allowed = COVERAGE if masks * collapsed > 5 else Interval(0.85, 0.97)
        yield Row("influences of masks", setting, covered / runs, allowed, runs)
        error = ERROR if masks * collapsed > 5 else Interval(0.0, 0.12)
        yield Row("masks, false ACCEPT", setting, accepted / runs, error, runs)


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
        for discordance in (0.002, 0.005, 0.01, 0.02, 0.03):
            yield from saving(plans[pictures, limit], discordance)


def saving(plan: Plan, discordance: float) -> Iterator[Row]:
    """Chance of ACCEPT, and the share of the pictures saved, without a drop; summed over all outcomes."""
    rates, looks = Rates(discordance / 2, discordance / 2), plan.boundaries.looks
    carried, before, accepted, judged_pictures = np.ones((1, 1)), 0, 0.0, 0.0
    for number, pictures in enumerate(looks):
        counts = np.arange(pictures - before + 1)
        counts = counts[scipy.stats.poisson.pmf(counts, (pictures - before) * discordance / 2) > 1e-9]
        cells = np.stack(np.meshgrid(counts, counts, indexing="ij"), axis=-1)
        rest = pictures - before - cells.sum(axis=-1, keepdims=True)
        fresh = scipy.stats.multinomial.pmf(
            np.concatenate([cells, rest], axis=-1), pictures - before, [rates.loss, rates.gain, 1 - discordance]
        )
        carried = np.maximum(scipy.signal.fftconvolve(carried, fresh), 0.0)
        losses, gains = np.indices(carried.shape, np.float64)
        scores = tango_score(losses, gains, pictures, plan.limit)
        accept = scores <= -plan.boundaries.accept[number]
        hope = chance_of_answer(plan, number, (losses + gains) / pictures, scores)
        ends = accept | (scores >= plan.boundaries.reject[number]) | (hope < plan.hopeless) | (pictures == looks[-1])
        accepted += float(carried[accept].sum())
        judged_pictures += pictures * float(carried[ends].sum())
        carried, before = np.where(ends, 0.0, carried), pictures
    setting = f"n {looks[-1]}, limit {plan.limit:.1%}, flips {discordance:.1%}, drop 0"
    single = answer_power(looks[-1], plan.limit, rates, plan.confidence)
    # It takes 3 / limit pictures to accept without a flip, and half of these pictures would be all there are to save.
    saved = Interval(0.3 if looks[-1] * plan.limit >= 10 else 0.15, 1.0)
    yield Row("one look, ACCEPT", setting, single, Interval(0.0, 1.0), 0)
    yield Row("looks, ACCEPT, exact", setting, accepted, Interval(0.0, 1.0), 0)
    yield Row("looks, saved, exact", setting, 1 - judged_pictures / looks[-1], saved, 0)


def measure(runs: int) -> Iterator[Row]:
    """Every row, each of about so many runs."""
    parts = (tango_independent, tango_clustered, flip_bound, delong, verdict_figures, mask_means, false_accept,
             false_accept_clustered, power, sequential)  # fmt: skip
    for part in parts:
        yield from part(runs)


def main() -> None:
    """Print every row, and say which do not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="of each simulation; 200 take about a minute")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = []
    for row in measure(options.runs):
        rows.append(row)
        mark = "" if row.holds else "   <- outside"
        print(f"{row.what:<40} {row.setting:<62} {row.value:7.2%} of {row.runs or 'all':>5}{mark}", flush=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
    result = {"runs": options.runs, "seconds": round(time.perf_counter() - start), "rows": [asdict(r) for r in rows]}
    print(json.dumps({**result, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
