"""Judge pictures look by look, and stop when the answer is clear: the rows of one look are kept for the next."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from defaker_opt.benchmarks import Benchmark, Item
from defaker_opt.drift.validate import Comparison
from defaker_opt.errors import DefakerError
from defaker_opt.limits import Limit
from defaker_opt.report.evidence import gather
from defaker_opt.report.figures import Sample, measure
from defaker_opt.report.judge import threshold_of
from defaker_opt.report.values import LookReport, Sequential
from defaker_opt.statistics.clusters import choose_clusters
from defaker_opt.statistics.decision import Decision, decide_all
from defaker_opt.statistics.paired_proportions import count_pairs
from defaker_opt.statistics.sequential import Look, Plan, even_looks, judge_look, plan_looks

LOOKS = 10
_SEED = 0
# The metric with boundaries of its own; other limits share their error evenly among the looks (Bonferroni).
_COUNTED = "verdict_accuracy"
# Units of clusters, the coarsest first, and where an item has them.
_UNITS = {"photograph": "source", "pair": "pair"}

# Both builds on these suites, as they are: rows that were judged before come from the cache.
Compare = Callable[[tuple[Benchmark, ...]], Comparison]


@dataclass(frozen=True)
class Stopped:
    """What was judged of every suite by the end, in the order of judging, and what was decided of each limit."""

    suites: tuple[Benchmark, ...]
    decisions: Mapping[str, Mapping[str, Decision]]
    report: Sequential


def run_looks(suites: Sequence[Benchmark], limits: Mapping[str, Limit], compare: Compare) -> Stopped:
    """Judge suite after suite until each is decided; a REJECT ends everything.

    Raises DefakerError if accuracy has no limit, as looks are planned by it.
    """
    if _COUNTED not in limits:
        raise DefakerError(f"--sequential: looks are planned by a limit of {_COUNTED}; add --max-drop {_COUNTED}=0.005")
    looks: list[LookReport] = []
    judged: list[Benchmark] = []
    decisions: dict[str, Mapping[str, Decision]] = {}
    for suite in suites:
        ordered = shuffled(suite)
        stopped = _one_suite(ordered, limits, compare, looks)
        judged.append(dataclasses.replace(ordered, items=ordered.items[: looks[-1].images]))
        decisions[suite.name] = stopped
        if "REJECT" in stopped.values():
            break
    planned = sum(len(suite.items) for suite in suites)
    done = sum(len(suite.items) for suite in judged)
    return Stopped(tuple(judged), decisions, Sequential(LOOKS, tuple(looks), done, planned))


def shuffled(suite: Benchmark) -> Benchmark:
    """The items in an order that chance decides, alike every time, clusters staying together."""
    groups: dict[str, list[Item]] = {}
    for name, item in zip(_cluster_names(suite), suite.items):
        groups.setdefault(name, []).append(item)
    order = list(groups.values())
    random.Random(_SEED).shuffle(order)  # noqa: S311 - no secret
    return dataclasses.replace(suite, items=tuple(item for group in order for item in group))


def cluster_unit(suite: Benchmark) -> str:
    """What is independent in the whole suite, which its first looks alone could not tell."""
    columns = {name: [getattr(item, field) for item in suite.items] for name, field in _UNITS.items()}
    return choose_clusters(columns).unit


def _cluster_names(suite: Benchmark) -> list[str]:
    field = _UNITS.get(cluster_unit(suite))
    return [(getattr(item, field) if field else "") or f"\0{place}" for place, item in enumerate(suite.items)]


def look_ends(suite: Benchmark) -> tuple[int, ...]:
    """Items judged by the end of each look; no cluster is torn apart."""
    names = _cluster_names(suite)
    ends = []
    for end in even_looks(len(names), LOOKS):
        while end < len(names) and names[end] == names[end - 1]:
            end += 1
        ends.append(end)
    return tuple(sorted(set(ends)))


def _one_suite(
    suite: Benchmark, limits: Mapping[str, Limit], compare: Compare, looks: list[LookReport]
) -> Mapping[str, Decision]:
    ends, unit = look_ends(suite), cluster_unit(suite)
    counted = limits[_COUNTED]
    plan = plan_looks(ends, counted.max_drop, counted.confidence)
    shared = {
        name: dataclasses.replace(limit, confidence=1 - (1 - limit.confidence) / len(ends))
        for name, limit in limits.items()
        if name != _COUNTED
    }
    settled: dict[str, Decision] = {}
    for place, end in enumerate(ends):
        comparison = compare((dataclasses.replace(suite, items=suite.items[:end]),))
        evidence = gather(comparison.runs[0])
        thresholds = threshold_of(comparison.reference), threshold_of(comparison.candidate)
        sample = Sample(evidence, evidence.clusters_by(unit), thresholds)
        detail = _settle_(settled, sample, plan, place, shared)
        decision = decide_all([settled.get(name, "UNDECIDED") for name in limits])
        hopeless = settled.get(_COUNTED) == "UNDECIDED"
        finished = decision != "UNDECIDED" or hopeless or place == len(ends) - 1
        looks.append(LookReport(suite.name, end, decision, finished, detail))
        if finished:
            return {name: settled.get(name, "UNDECIDED") for name in limits}
    raise AssertionError("the last look is always finished")


def _settle_(settled: dict[str, Decision], sample: Sample, plan: Plan, place: int, shared: Mapping[str, Limit]) -> str:
    """Keep every answer that is clear at this look; an answer once given stays. What was found, in words."""
    details = []
    if _COUNTED not in settled:
        look = _counted_look(sample, plan, place)
        if look.finished:
            settled[_COUNTED] = look.decision
        details.append(f"score {look.score:+.2f}, chance of an answer by the last look {look.hope:.0%}")
    open_limits = {name: limit for name, limit in shared.items() if name not in settled}
    for figure in measure(sample, open_limits, only=open_limits).figures if open_limits else ():
        if figure.check and figure.check.decision != "UNDECIDED":
            settled[figure.metric] = figure.check.decision
    return "; ".join((*details, *(f"{name} {decision}" for name, decision in settled.items())))


def _counted_look(sample: Sample, plan: Plan, place: int) -> Look:
    evidence = sample.evidence
    counts = count_pairs(evidence.right(evidence.reference), evidence.right(evidence.build), sample.clusters.index)
    # Pictures that could not be judged are missing whatever the builds would say, so a look may be a little smaller.
    looks = list(plan.boundaries.looks)
    looks[place] = len(evidence)
    boundaries = dataclasses.replace(plan.boundaries, looks=tuple(looks))
    return judge_look(dataclasses.replace(plan, boundaries=boundaries), place, counts)
