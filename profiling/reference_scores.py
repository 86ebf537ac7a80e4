"""How good a build is on the forgery sets: verdicts and masks by domain, and under perturbations; or on another suite.

    python profiling/reference_scores.py BUILD [--perturb all] [--suite drift-test] [--suite FILE --data ROOT]

Every figure has a 95 % interval over pairs of twins; JSON is the last line. Masks are measured in
pixels of the picture, at the shipped threshold; authentic pictures count in verdicts only.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from defaker_opt.benchmarks.influence import of_calibration_error, of_mean
from defaker_opt.benchmarks.metrics import calibration_error
from defaker_opt.drift.perturbations import NONE, parse_perturbations
from defaker_opt.drift.rows import ImageRow
from defaker_opt.drift.run import JudgedRun, Run, asked_crew, fitted_crew, judge_runs
from defaker_opt.drift.suites import load_suite
from defaker_opt.files import default_cache_folder
from defaker_opt.runtime import open_build
from defaker_opt.statistics import Floats, Interval
from defaker_opt.statistics.auc import auc_influence
from defaker_opt.statistics.spread import spread_interval, spread_of

SMALL = 0.02
NAMES = ("auc", "accuracy", "ece", "tpr", "fpr", "iou", "iou_small")


@dataclass(frozen=True)
class Judged:
    """One entry an image: label, probability, IoU (NaN if none), forged share, number of its pair, domain."""

    label: NDArray[np.int64]
    probability: Floats
    iou: Floats
    share: Floats
    pair: NDArray[np.int64]
    domain: NDArray[np.str_]

    def only(self, chosen: NDArray[np.bool_]) -> Judged:
        """Some of the images."""
        return Judged(*(values[chosen] for values in vars(self).values()))


def collect(run: JudgedRun) -> Judged:
    """Rows that were judged, in order."""
    items = run.run.benchmark.items
    rows = [(item, row) for item, row in zip(items, run) if isinstance(row, ImageRow)]
    clusters = {name: number for number, name in enumerate(dict.fromkeys(cluster(item.key) for item, _ in rows))}
    return Judged(
        np.array([row.label for _, row in rows]),
        np.array([row.fake_probability for _, row in rows]),
        np.array([nan_if_none(row.mask.truth and row.mask.truth.iou) for _, row in rows]),
        np.array([row.mask.truth.forged_share if row.mask.truth else np.nan for _, row in rows]),
        np.array([clusters[cluster(item.key)] for item, _ in rows]),
        np.array([item.slices.get("domain", "") for item, _ in rows]),
    )


def cluster(key: str) -> str:
    """Twins are judged alike, so they are drawn together; their keys differ in what follows the pair's number."""
    return key.rsplit("-", 1)[0]


def nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else value


def score(judged: Judged) -> dict[str, dict[str, float]]:
    """Each figure that is defined: value, low, high."""
    found = {}
    for name in NAMES:
        figure = measure(name, judged)
        if figure is None:
            continue
        value, influence = figure
        interval = spread_interval(spread_of(value, influence, judged.pair), within=Interval(0.0, 1.0))
        found[name] = {"value": value, "low": interval.low, "high": interval.high}
    return {name: {key: round(number, 4) for key, number in entry.items()} for name, entry in found.items()}


def measure(name: str, judged: Judged) -> tuple[float, Floats] | None:
    """One figure, and what each image adds to its error [N]; None where it is undefined."""
    label, probability = judged.label, judged.probability
    if name == "auc":
        if len(set(label.tolist())) < 2:
            return None
        areas, parts = auc_influence(label, probability[None])
        return float(areas[0]), parts[0]
    if name == "ece":
        value = calibration_error(label, probability, np.ones((1, len(label))))[0]
        return float(value), of_calibration_error(label, probability)
    called = (probability > 0.5).astype(np.float64)
    everything = np.ones(len(label), bool)
    small = judged.share < SMALL
    masked = ~np.isnan(judged.iou)
    values, used = {
        "accuracy": (called == label, everything),
        "tpr": (called, label == 1),
        "fpr": (called, label == 0),
        "iou": (judged.iou, masked),
        "iou_small": (judged.iou, masked & small),
    }[name]
    return (float(values[used].mean()), of_mean(values, used)) if used.any() else None


def groups(judged: Judged) -> Iterator[tuple[str, Judged]]:
    yield "all", judged
    for domain in sorted(set(judged.domain) - {""}):
        yield domain, judged.only(judged.domain == domain)


def print_table(rows: Iterable[tuple[str, dict[str, dict[str, float]]]]) -> None:
    print(f"{'':34}" + "".join(f"{name:>20}" for name in NAMES))
    for title, scores in rows:
        cells = (as_text(scores.get(name)) for name in NAMES)
        print(f"{title:34}" + "".join(f"{cell:>20}" for cell in cells))


def as_text(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    if "low" not in entry:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} {entry['low']:.3f}-{entry['high']:.3f}"


def show_progress(what: str, fraction: float) -> None:
    print(f"\r{fraction:4.0%} {what:60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--suite", action="append", help="embedded (default), quick, a CSV or a benchmark's name")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--perturb", action="append", default=[])
    given = parser.parse_args()
    build, cache = open_build(given.build), default_cache_folder()
    suites = [load_suite(name, given.data, cache, show_progress) for name in given.suite or ["embedded"]]
    runs = [Run(suite, name) for suite in suites for name in (NONE, *parse_perturbations(given.perturb))]
    judged_runs = judge_runs(build, runs, cache, fitted_crew(asked_crew("processes", 0, 0), [build]), show_progress)
    print(file=sys.stderr)
    table = []
    for each in judged_runs:
        parts = groups(collect(each)) if each.run.perturbation == NONE else [("all", collect(each))]
        for part, judged in parts:
            title = f"{each.run.benchmark.name} {part} {each.run.perturbation}".removesuffix(" none")
            table.append((title, score(judged)))
    print_table(table)
    print(
        json.dumps(
            {"build": build.digest, "scores": dict(table), "machine": platform.processor() or platform.machine()}
        )
    )


if __name__ == "__main__":
    main()
