"""Stop early, at declared numbers of pictures, when the answer is clear: a group-sequential test of the drop.

Error is spent over the looks (Lan and DeMets 1983; Kim and DeMets 1987). The boundaries are then checked by summing
over all outcomes (`crossing`) and moved outwards if need be, because with few discordant pictures the normal
distribution promises too much. Pictures must come in random order, whole clusters together, and looks must be declared
beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal, stats

from defaker_opt.errors import DefakerError
from defaker_opt.statistics import Floats, check_share
from defaker_opt.statistics.crossing import Boundaries, at_limit, crossings, discordances
from defaker_opt.statistics.decision import Decision
from defaker_opt.statistics.paired_proportions import PairedCounts, critical_value, doubted, tango_score

# Error spent by a share t of the pictures is α · t^1.25. Even spending (t) stops hardly sooner; that of O'Brien and
# Fleming, which loses least at the last look, saves some 5 % fewer pictures.
_SPENDING_POWER = 1.25

# Below this chance of an answer a test is given up. At 0.1 tests of too few pictures, which seldom end with an answer
# anyway, saved less than 30 %; at 0.3 those that would tell with a chance of three quarters lost too much of it.
HOPELESS = 0.2


@dataclass(frozen=True)
class Plan:
    """A test before it begins. hopeless: give up where the chance of either answer at the last look is below this."""

    limit: float
    confidence: float
    boundaries: Boundaries
    hopeless: float


def even_looks(pictures: int, looks: int = 10) -> tuple[int, ...]:
    """So many looks at equal distances, the last with all pictures; fewer if there are fewer pictures."""
    return tuple(sorted({math.ceil(pictures * turn / looks) for turn in range(1, looks + 1)}))


def plan_looks(looks: Sequence[int], limit: float, confidence: float = 0.95, hopeless: float = HOPELESS) -> Plan:
    """Boundaries for looks after these numbers of pictures, the last with all of them.

    limit: 0 < limit < 1. Raises DefakerError if looks do not rise from 1, or the limit is out of range.
    hopeless: 0 never gives up. Chances of a false ACCEPT, and of a false REJECT, are each at most 1 − confidence.
    """
    check_share("confidence", confidence)
    problem = _wrong_plan(looks, limit, hopeless)
    if problem:
        raise DefakerError(problem)
    accept, reject = (_boldest(looks, limit, 1 - confidence, side) for side in (0, 1))
    return Plan(limit, confidence, Boundaries(tuple(looks), accept, reject), hopeless)


def _boldest(looks: Sequence[int], limit: float, alpha: float, side: int) -> tuple[float, ...]:
    """Scores for one side that spend as much error as the exact check allows, found by halving."""
    times = np.asarray(looks, np.float64) / looks[-1]
    holds, fails = 0.0, 2 * alpha
    best = (math.inf,) * len(looks)
    # The first try, alpha itself, is nearly right.
    for _ in range(7):
        tried = (holds + fails) / 2
        scores = spending_boundaries(times, tried)
        if _worst_error(looks, scores, limit, side) <= alpha:
            holds, best = tried, tuple(scores.tolist())
        else:
            fails = tried
    return best


def _wrong_plan(looks: Sequence[int], limit: float, hopeless: float) -> str:
    if not looks or looks[0] < 1 or any(later <= sooner for sooner, later in itertools.pairwise(looks)):
        return f"looks: must be rising numbers of images from 1, got {list(looks)}; for example 120, 240, 360"
    if not 0 < limit < 1:
        return (
            f"limit: must be above 0 and below 1 to be tested early, got {limit}; use 0.005 for half a percentage point"
        )
    if not 0 <= hopeless < 1:
        return f"hopeless: must be 0 (never give up) or a chance below 1, got {hopeless}"
    return ""


def _worst_error(looks: Sequence[int], scores: Floats, limit: float, side: int) -> float:
    """Largest chance of a false answer (side 0: ACCEPT, 1: REJECT) at a drop of exactly the limit."""
    never, ours = (math.inf,) * len(looks), tuple(scores.tolist())
    boundaries = Boundaries(tuple(looks), never if side else ours, ours if side else never)
    rates = at_limit(limit, discordances(looks[-1], limit))
    return max(float(crossings(boundaries, limit, rate)[side].sum()) for rate in rates)


def spending_boundaries(times: Floats, alpha: float) -> Floats:
    """One-sided scores [looks] that a Brownian motion crosses first at each look with the chance spent there.

    times [looks]: share of the information, rising to 1. By recursion of its density on a grid (Armitage, McPherson and
    Rowe 1969).
    """
    grid = np.linspace(-8.0, 8.0, 3201)
    step = grid[1] - grid[0]
    spent = np.diff(alpha * times**_SPENDING_POWER, prepend=0.0)
    scores, density, before = [], np.zeros(0), 0.0
    for time, chance in zip(times, spent):
        moves = stats.norm.pdf(grid, scale=math.sqrt(time - before))
        density = moves if before == 0 else np.maximum(signal.fftconvolve(density, moves, mode="same") * step, 0.0)
        beyond = (np.cumsum(density[::-1])[::-1] - density / 2) * step
        crossing = stats.norm.isf(chance) * math.sqrt(time) if before == 0 else np.interp(-chance, -beyond, grid)
        scores.append(float(crossing) / math.sqrt(time))
        density, before = np.where(grid >= crossing, 0.0, density), float(time)
    return np.array(scores)


@dataclass(frozen=True)
class Look:
    """What was found at a look. UNDECIDED and finished: no look is left, or going on is hopeless.

    score: standard errors from the limit, negative below it; the answer comes below −accept or above reject.
    """

    pictures: int
    decision: Decision
    finished: bool
    score: float
    hope: float


def judge_look(plan: Plan, look: int, counts: PairedCounts) -> Look:
    """Decide at look number `look`, from 0. counts: over all pictures so far, clustered if they are.

    Raises DefakerError if not as many pictures were judged as declared.
    """
    declared = plan.boundaries.looks[look]
    pictures = round(counts.pictures * counts.design_effect)
    if pictures != declared:
        raise DefakerError(f"look {look + 1} was declared at {declared} images, but {pictures} were judged; plan anew")
    counts = doubted(counts)
    score = float(tango_score(counts.losses, counts.gains, counts.pictures, plan.limit))
    accept, reject = plan.boundaries.accept[look], plan.boundaries.reject[look]
    # Few clusters call for larger scores, as Student's t does at the same tail.
    accept, reject = (critical_value(counts, float(stats.norm.sf(value))) for value in (accept, reject))
    hope = float(chance_of_answer(plan, look, counts.discordance, score, counts.design_effect))
    last = look == len(plan.boundaries.looks) - 1
    if score <= -accept or score >= reject:
        return Look(pictures, "ACCEPT" if score < 0 else "REJECT", True, score, hope)
    return Look(pictures, "UNDECIDED", last or hope < plan.hopeless, score, hope)


def chance_of_answer(
    plan: Plan, look: int, discordance: ArrayLike, score: ArrayLike, design_effect: float = 1.0
) -> Floats:
    """The larger chance at the last look: of ACCEPT if nothing is lost from here on, of REJECT if twice the limit is.

    discordance: share of pictures so far that only one build gets right; score: of the drop so far; both broadcast.
    Conditional power: Lan and Wittes 1988, "The B-value". Giving up on it never makes a false answer likelier.
    """
    looks, z = plan.boundaries.looks, np.asarray(score, np.float64)
    time = looks[look] / looks[-1]
    accept, reject = plan.boundaries.accept[-1], plan.boundaries.reject[-1]
    if time >= 1:
        return ((z <= -accept) | (z >= reject)).astype(np.float64)
    # One more picture may always be discordant, and at the limit as many are as it says.
    likely = np.maximum(discordance, max(design_effect / (looks[look] + design_effect), plan.limit))
    drift = plan.limit * np.sqrt(looks[-1] / design_effect / likely) * (1 - time)
    done, spread = z * math.sqrt(time), math.sqrt(1 - time)
    chances: Floats = stats.norm.cdf([(-done + drift - accept) / spread, (done + drift - reject) / spread]).max(axis=0)
    return chances
