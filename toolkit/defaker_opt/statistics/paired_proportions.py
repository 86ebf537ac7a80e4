"""How often the build is right against how often the reference is, on the same pictures.

losses: the reference is right and the build wrong (b of the literature); gains: the other way round (c). The drop of
accuracy is (losses − gains) / pictures. Counts may be fractions: clustered counts are divided by a design effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from defaker_opt.statistics import Floats, Interval, check_share

# How many discordant clusters it takes to believe the design effect half, against the largest there can be.
_DOUBT = 1.0


@dataclass(frozen=True)
class PairedCounts:
    """losses, gains and pictures; as counted, or divided by a design effect ≥ 1, so that pictures count once.

    design_effect says by what they were divided, largest_effect what it were if the pictures of each cluster always
    agreed. clusters: how many independent groups there are, discordant_clusters those with any discordant picture.
    """

    losses: float
    gains: float
    pictures: float
    clusters: int
    design_effect: float = 1.0
    largest_effect: float = 1.0
    discordant_clusters: int = 0

    @property
    def drop(self) -> float:
        """Reference's accuracy − build's, −1…1."""
        return (self.losses - self.gains) / self.pictures

    @property
    def discordance(self) -> float:
        """Share of pictures that one gets right and the other wrong."""
        return (self.losses + self.gains) / self.pictures


def count_pairs(
    reference_right: NDArray[np.bool_], build_right: NDArray[np.bool_], clusters: ArrayLike | None = None
) -> PairedCounts:
    """Losses and gains over pictures [N]; with clusters [N] (any numbers), divided by the design effect.

    The design effect is the variance of the drop between clusters over that of independent pictures: Rao and Scott
    1992, "A simple method for the analysis of clustered binary data", section 2, with the residuals of Obuchowski 1998
    for pairs. It is never taken below 1: pictures never count more than once. Where no picture is discordant, nothing
    tells how alike pictures of a cluster are, and each cluster counts as one picture.
    """
    difference = reference_right.astype(np.float64) - build_right
    pictures = len(difference)
    assert pictures, "no pictures"
    losses, gains = float((difference > 0).sum()), float((difference < 0).sum())
    if clusters is None:
        return PairedCounts(losses, gains, pictures, pictures)
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    largest = float((sizes**2).sum() / sizes.sum())
    effect = _design_effect(difference, index, sizes, largest)
    discordant = int(np.count_nonzero(np.bincount(index, difference != 0)))
    return PairedCounts(losses / effect, gains / effect, pictures / effect, len(sizes), effect, largest, discordant)


def _design_effect(difference: Floats, index: NDArray[np.intp], sizes: NDArray[np.intp], largest: float) -> float:
    """difference [N] of −1, 0, 1; index [N] of a picture's cluster; sizes [K]."""
    drop = float(difference.mean())
    independent = float((difference**2).sum() - len(difference) * drop**2)
    if not difference.any() or independent <= 0 or len(sizes) < 2:
        return largest
    residual = np.bincount(index, difference, len(sizes)) - sizes * drop
    between = float((residual**2).sum()) * len(sizes) / (len(sizes) - 1)
    return float(np.clip(between / independent, 1.0, largest))


def doubted(counts: PairedCounts) -> PairedCounts:
    """The same counts with a design effect nearer to the largest, the fewer clusters are discordant.

    Clusters that fail as a whole are rare, so a few discordant clusters seldom show one. An interval may err to either
    side, but a decision by the design effect as seen accepted losses of the limit twice as often as it may.
    """
    trust = counts.discordant_clusters / (_DOUBT + counts.discordant_clusters)
    effect = trust * counts.design_effect + (1 - trust) * max(counts.largest_effect, counts.design_effect)
    shrunk = counts.design_effect / effect
    return dataclasses.replace(
        counts,
        losses=counts.losses * shrunk,
        gains=counts.gains * shrunk,
        pictures=counts.pictures * shrunk,
        design_effect=effect,
    )


def mcnemar_exact(losses: int, gains: int) -> float:
    """Two-sided exact p of equal accuracy on independent pictures; 1 where none is discordant. McNemar 1947."""
    discordant = losses + gains
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * stats.binom.cdf(min(losses, gains), discordant, 0.5)))


def tango_score(losses: ArrayLike, gains: ArrayLike, pictures: ArrayLike, drop: ArrayLike) -> Floats:
    """How many standard errors the observed drop lies above `drop`; negative means below it.

    The standard error is that of the likeliest rates whose difference is `drop`, so it is not 0 without discordant
    pictures. Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", section 3. All arguments broadcast; −1 < drop < 1.
    """
    b, c, n, d = (np.asarray(value, np.float64) for value in (losses, gains, pictures, drop))
    # The likeliest rate of gains is the larger root of 2n q² + linear q − constant = 0.
    linear = (2 * n - b + c) * d - b - c
    constant = c * d * (1 - d)
    rate = (np.sqrt(np.maximum(linear**2 + 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * np.maximum(2 * rate + d * (1 - d), 0.0)
    distance = b - c - n * d
    score: Floats = np.divide(
        distance, np.sqrt(variance), out=np.zeros(np.broadcast(distance, variance).shape), where=variance > 0
    )
    return score


def tango_bounds(losses: ArrayLike, gains: ArrayLike, pictures: ArrayLike, z: ArrayLike) -> tuple[Floats, Floats]:
    """Drops whose score is z and −z, lower and upper, by bisection; arguments broadcast, z > 0."""
    b, c, n, z = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (losses, gains, pictures, z)))
    return _crossing(b, c, n, z), -_crossing(c, b, n, z)


def _crossing(b: Floats, c: Floats, n: Floats, z: Floats) -> Floats:
    """The smallest drop with a score of at most z; the score falls as the drop rises."""
    low, high = np.full(b.shape, -1.0), np.array((b - c) / n, np.float64)
    # 53 halvings of an interval of length 2 leave nothing but rounding.
    for _ in range(54):
        middle = (low + high) / 2
        above = tango_score(b, c, n, np.maximum(middle, -1 + 1e-15)) > z
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high


def tango_interval(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of the drop, robust without discordant pictures (then ± z² / (n + z²)).

    Student's t over clusters takes the normal's place, which matters where there are few.
    """
    check_share("confidence", confidence)
    z = critical_value(counts, (1 - confidence) / 2)
    low, high = tango_bounds(counts.losses, counts.gains, counts.pictures, z)
    return Interval(float(low), float(high))


def independent(counts: PairedCounts) -> bool:
    """Whether every picture is a cluster of its own."""
    return counts.clusters >= round(counts.pictures * counts.design_effect)


def critical_value(counts: PairedCounts, tail: float) -> float:
    """The score exceeded with chance `tail`: normal for independent pictures, else Student's t over clusters."""
    if independent(counts):
        return float(stats.norm.isf(tail))
    return float(stats.t.isf(tail, max(counts.clusters - 1, 1)))


def score_tail(counts: PairedCounts, score: float) -> float:
    """Chance of a larger score, by the same distribution as `critical_value`."""
    if independent(counts):
        return float(stats.norm.sf(score))
    return float(stats.t.sf(score, max(counts.clusters - 1, 1)))
