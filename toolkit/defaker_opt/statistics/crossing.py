"""Exact chances that losses and gains cross a boundary, look by look, on independent pictures.

Score tests lean on the normal distribution; with the handful of discordant pictures that a good build leaves, their
error can be half as large again as promised. So error rates are summed over all outcomes, not approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import signal, special, stats

from defaker_opt.statistics import Floats, Integers
from defaker_opt.statistics.paired_proportions import PairedCounts, doubted, independent, score_tail, tango_score

# Outcomes further out than this many standard deviations have a chance below 1e-13.
_REACH = 8.0
# From so many discordant pictures on, the score's error is within 0.1 pp of what the normal distribution says.
_MANY = 300


@dataclass(frozen=True)
class Rates:
    """Chances that a picture is a loss, and a gain."""

    loss: float
    gain: float


@dataclass(frozen=True)
class Boundaries:
    """At each of the looks (pictures judged by then): ACCEPT below −accept[k], REJECT above reject[k], in scores."""

    looks: tuple[int, ...]
    accept: tuple[float, ...]
    reject: tuple[float, ...]


def crossings(boundaries: Boundaries, limit: float, rates: Rates) -> tuple[Floats, Floats]:
    """Chances to end at each look with ACCEPT and with REJECT, each [looks]; the rest is UNDECIDED.

    The score is Tango's, for a drop of `limit`. Losses and gains of a look follow the trinomial distribution, and
    those that have not crossed are carried on to the next.
    """
    carried, before = np.ones((1, 1)), 0
    accepted, rejected = [], []
    fresh: dict[int, Floats] = {}
    for pictures, low, high in zip(boundaries.looks, boundaries.accept, boundaries.reject):
        step, before = pictures - before, pictures
        if step not in fresh:
            fresh[step] = _outcomes(step, rates)
        carried = np.maximum(signal.fftconvolve(carried, fresh[step]), 0.0)
        losses, gains = np.indices(carried.shape, np.float64)
        score = tango_score(losses, gains, pictures, limit)
        possible = losses + gains <= pictures
        accept, reject = (score <= -low) & possible, (score >= high) & possible
        accepted.append(float(carried[accept].sum()))
        rejected.append(float(carried[reject].sum()))
        carried = _trimmed(np.where(accept | reject, 0.0, carried))
    return np.array(accepted), np.array(rejected)


def _outcomes(pictures: int, rates: Rates) -> Floats:
    """Chance of each number of losses and gains among so many pictures, [losses, gains]."""
    losses, gains = (np.arange(_furthest(pictures, rate) + 1) for rate in (rates.loss, rates.gain))
    return _chances(pictures, rates, losses, gains)


def _furthest(pictures: int, rate: float) -> int:
    return min(pictures, int(pictures * rate + _REACH * np.sqrt(pictures * rate) + 12)) if rate > 0 else 0


def _chances(pictures: int, rates: Rates, losses: Integers, gains: Integers) -> Floats:
    """Trinomial chances [losses, gains] of the numbers asked for."""
    rest = pictures - losses[:, None] - gains
    others = max(1 - rates.loss - rates.gain, 0.0)
    ways = special.gammaln(losses + 1.0)[:, None] + special.gammaln(gains + 1.0)
    # One table of logarithms, as there are far fewer different numbers than pairs of them.
    table = np.arange(max(pictures - losses[-1] - gains[-1], 0), pictures + 1)
    place = np.clip(rest - table[0], 0, None)
    left = (special.xlogy(table, others) - special.gammaln(table + 1.0))[place]
    weights = special.xlogy(losses, rates.loss)[:, None] + special.xlogy(gains, rates.gain)
    chance: Floats = np.where(rest >= 0, np.exp(special.gammaln(pictures + 1.0) - ways + weights + left), 0.0)
    return chance


def _trimmed(chance: Floats) -> Floats:
    """Without the rows and columns at the far end that have no weight."""
    rows, columns = np.flatnonzero(chance.sum(1) > 1e-14), np.flatnonzero(chance.sum(0) > 1e-14)
    return chance[: rows[-1] + 1, : columns[-1] + 1] if len(rows) and len(columns) else np.zeros((1, 1))


def at_limit(limit: float, discordances: Sequence[float]) -> list[Rates]:
    """Rates whose drop is exactly `limit`, for discordances ≥ |limit|."""
    return [Rates((share + limit) / 2, (share - limit) / 2) for share in discordances]


@dataclass(frozen=True)
class LimitTest:
    """p_accept: of "the drop is the limit or more"; p_reject: of "the drop is the limit or less"."""

    p_accept: float
    p_reject: float


def limit_test(counts: PairedCounts, limit: float) -> LimitTest:
    """Exact unconditional test of the drop against a limit, −1 < limit < 1, outcomes ordered by Tango's score.

    p is the largest chance of such a score over all discordances (Lloyd and Moldovan 2008 compare such tests), so
    neither answer errs more often than it says on independent pictures. Clustered counts are tested as their effective
    number of pictures with their design effect `doubted`, and never called surer than Student's t over clusters allows.
    """
    counts = doubted(counts)
    score = float(tango_score(counts.losses, counts.gains, counts.pictures, limit))
    pictures = max(int(counts.pictures), 1)
    p_accept, p_reject = exact_tails(pictures, limit, score)
    if independent(counts):
        return LimitTest(p_accept, p_reject)
    return LimitTest(max(p_accept, score_tail(counts, -score)), max(p_reject, score_tail(counts, score)))


def exact_tails(pictures: int, limit: float, score: float) -> tuple[float, float]:
    """Largest chances, over all discordances, of a score at most, and at least, this one where the drop is the limit.

    Never less than the normal distribution says, which takes over where many pictures are discordant.
    """
    low, high = float(stats.norm.cdf(score)), float(stats.norm.sf(score))
    for chance, scores in _scored(pictures, limit):
        # A hair of slack keeps the observed outcome on its own side of rounding.
        low = max(low, float(chance[scores <= score + 1e-9].sum()))
        high = max(high, float(chance[scores >= score - 1e-9].sum()))
    return min(1.0, low), min(1.0, high)


def critical_scores(pictures: int, limit: float, alpha: float) -> tuple[float, float]:
    """Scores below −first and above second that `exact_tails` give a chance of at most alpha."""
    accept = reject = float(stats.norm.isf(alpha))
    for chance, scores in _scored(pictures, limit):
        accept = max(accept, _least_critical(chance, -scores, alpha))
        reject = max(reject, _least_critical(chance, scores, alpha))
    return accept, reject


def _least_critical(chance: Floats, scores: Floats, alpha: float) -> float:
    """Just above the highest score that is reached or exceeded with a chance of more than alpha."""
    order = np.argsort(-scores)
    falling = scores[order]
    # Outcomes of one score go together: the last of them carries the chance of all.
    last = np.append(np.diff(falling) < -1e-9, True)
    too_likely = falling[last & (np.cumsum(chance[order]) > alpha)]
    return float(too_likely[0]) + 1e-8 if len(too_likely) else -np.inf


def _scored(pictures: int, limit: float) -> Iterator[tuple[Floats, Floats]]:
    """Chances and scores of all likely outcomes, flat, at each of the discordances."""
    for rates in at_limit(limit, discordances(pictures, limit)):
        losses, gains = (
            np.arange(max(0, int(pictures * rate - _REACH * np.sqrt(pictures * rate))), _furthest(pictures, rate) + 1)
            for rate in (rates.loss, rates.gain)
        )
        chance = _chances(pictures, rates, losses, gains).reshape(-1)
        scores = tango_score(losses[:, None], gains, pictures, limit).reshape(-1)
        likely = chance > 1e-13
        yield chance[likely], scores[likely]


def discordances(pictures: int, limit: float) -> list[float]:
    """Where exact chances are looked at: from the least that the limit allows to some 300 discordant pictures."""
    least = max(abs(limit), 0.5 / pictures)
    most = min(1.0, _MANY / pictures)
    return np.geomspace(least, most, 12).tolist() if most > least * 1.01 else [min(least, 1.0)]
