"""How many images it would take to tell whether the drop is below the limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from defaker_opt.statistics import Floats, check_share
from defaker_opt.statistics.crossing import Rates, critical_scores
from defaker_opt.statistics.paired_proportions import PairedCounts, tango_score

# Nobody labels more images than this to tell a drop from its limit.
_MOST_IMAGES = 50_000_000


@dataclass(frozen=True)
class Needed:
    """images: in all, those at hand included; more: beyond those. answer: the one they would give.

    rates: what was taken to be true; power: the chance of the answer if it is.
    """

    images: int
    more: int
    answer: Literal["ACCEPT", "REJECT"]
    rates: Rates
    power: float


def images_needed(
    counts: PairedCounts, limit: float, confidence: float = 0.95, power: float = 0.8, drop: float | None = None
) -> Needed | None:
    """Images for an answer with the power, if losses and gains go on as observed; None if the drop is the limit.

    drop: what to take for true, the observed one unless said; only the discordance is then taken from the counts. A
    discordance of 0 is never believed: one more picture is taken to be discordant. Images are counted in the design of
    the sample: a design effect multiplies them. Starts below n = (z_α + z_β)² (discordance − drop²) / (limit − drop)²
    (Lachenbruch and Lynch 1998) and takes the first step of 3 % at which `answer_power` reaches the power.
    """
    check_share("confidence", confidence)
    check_share("power", power)
    rates = assumed_rates(counts, counts.drop if drop is None else drop)
    gap = limit - (rates.loss - rates.gain)
    if abs(gap) < 1e-9:
        return None
    variance = rates.loss + rates.gain - (rates.loss - rates.gain) ** 2
    z_alpha, z_beta = stats.norm.ppf([confidence, power])
    pictures = max(2, round(0.4 * (z_alpha + max(z_beta, 0.0)) ** 2 * variance / gap**2))
    while pictures * counts.design_effect <= _MOST_IMAGES:
        reached = answer_power(pictures, limit, rates, confidence)
        if reached >= power:
            images = math.ceil(pictures * counts.design_effect)
            at_hand = round(counts.pictures * counts.design_effect)
            return Needed(images, max(0, images - at_hand), "ACCEPT" if gap > 0 else "REJECT", rates, reached)
        pictures = math.ceil(pictures * 1.03)
    return None


def assumed_rates(counts: PairedCounts, drop: float) -> Rates:
    """Rates with this drop and the observed discordance, one more discordant picture where none or too few are."""
    discordance = max(counts.discordance, 1 / (counts.pictures + 1), abs(drop))
    return Rates((discordance + drop) / 2, (discordance - drop) / 2)


def answer_power(pictures: int, limit: float, rates: Rates, confidence: float) -> float:
    """Chance that `limit_test` finds the drop of the rates on its side of the limit.

    Summed over losses and gains as independent Poisson numbers, which the trinomial is close to when few are
    discordant; with many, by the normal distribution of the score.
    """
    sign = 1.0 if rates.loss - rates.gain < limit else -1.0
    mean_losses, mean_gains = pictures * rates.loss, pictures * rates.gain
    if mean_losses + mean_gains > 400:
        return _normal_power(pictures, limit, rates, float(stats.norm.ppf(confidence)))
    losses, gains = _likely(mean_losses), _likely(mean_gains)
    chance = stats.poisson.pmf(losses, mean_losses)[:, None] * stats.poisson.pmf(gains, mean_gains)
    score = sign * tango_score(losses[:, None], gains, pictures, limit)
    possible = losses[:, None] + gains <= pictures
    critical = critical_scores(pictures, limit, 1 - confidence)[0 if sign > 0 else 1]
    return float(chance[(score <= -critical) & possible].sum())


def _normal_power(pictures: int, limit: float, rates: Rates, z: float) -> float:
    mean = float(tango_score(pictures * rates.loss, pictures * rates.gain, pictures, limit))
    true_variance = rates.loss + rates.gain - (rates.loss - rates.gain) ** 2
    drop = rates.loss - rates.gain
    at_limit = pictures * (drop - limit) ** 2 / mean**2
    return float(stats.norm.cdf((abs(mean) - z) * math.sqrt(at_limit / max(true_variance, 1e-12))))


def _likely(mean: float) -> Floats:
    """Numbers that a Poisson number of this mean takes, but for a chance of 1e-9."""
    low, high = stats.poisson.ppf([1e-9, 1 - 1e-9], mean) if mean > 0 else (0, 0)
    return np.arange(low, high + 1, dtype=np.float64)
