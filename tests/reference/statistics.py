"""Statistics and metrics the long way: loops over pictures, pairs and outcomes."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import optimize


def tango_score_plain(losses: float, gains: float, pictures: float, drop: float) -> float:
    """The score with the likeliest rates searched for, instead of solved for."""

    def unlikeliness(gain: float) -> float:
        rest = pictures - losses - gains
        terms = ((losses, gain + drop), (gains, gain), (rest, 1 - 2 * gain - drop))
        return -sum(count * math.log(max(rate, 1e-300)) for count, rate in terms if count > 0)

    low, high = max(0.0, -drop), (1 - drop) / 2
    inner = optimize.minimize_scalar(unlikeliness, bounds=(low, high), method="bounded", options={"xatol": 1e-14}).x
    gain = min((low, float(inner), high), key=unlikeliness)
    variance = pictures * (2 * gain + drop - drop**2)
    return (losses - gains - pictures * drop) / math.sqrt(variance)


def crossing_plain(looks, accept, reject, limit, loss, gain, score):
    """Chances to end with ACCEPT and with REJECT, over every path of losses and gains from look to look."""
    steps = np.diff(looks, prepend=0)

    def walk(number, losses, gains, chance):
        if number == len(looks):
            return 0.0, 0.0
        accepted = rejected = 0.0
        for more_losses, more_gains in itertools.product(range(steps[number] + 1), repeat=2):
            rest = steps[number] - more_losses - more_gains
            if rest < 0:
                continue
            share = math.factorial(steps[number]) / math.prod(map(math.factorial, (more_losses, more_gains, rest)))
            share *= loss**more_losses * gain**more_gains * (1 - loss - gain) ** rest * chance
            found = score(losses + more_losses, gains + more_gains, looks[number], limit)
            if found <= -accept[number]:
                accepted += share
            elif found >= reject[number]:
                rejected += share
            else:
                deeper = walk(number + 1, losses + more_losses, gains + more_gains, share)
                accepted, rejected = accepted + deeper[0], rejected + deeper[1]
        return accepted, rejected

    return walk(0, 0, 0, 1.0)


def auc_plain(labels, scores):
    """Share of pairs in the right order, ties half."""
    pairs = [(a, b) for a, la in zip(scores, labels) for b, lb in zip(scores, labels) if la == 1 and lb == 0]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def delong_variance_plain(labels, first, second):
    """Variance of the difference of two AUCs, from placements by loops (DeLong 1988)."""
    forged, authentic = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)

    def order(a, b):
        return (a > b) + (a == b) / 2

    of_forged = [[np.mean([order(s[i], s[j]) for j in authentic]) for i in forged] for s in (first, second)]
    of_authentic = [[np.mean([order(s[i], s[j]) for i in forged]) for j in authentic] for s in (first, second)]
    covariance = np.cov(of_forged) / len(forged) + np.cov(of_authentic) / len(authentic)
    return covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]


def calibration_error_plain(labels, probabilities, bins):
    """Mean gap of probability and share of forged over bins between quantiles, picture by picture."""
    edges = [np.quantile(probabilities, number / bins) for number in range(1, bins)]
    gaps: dict[int, list[float]] = {}
    for label, probability in zip(labels, probabilities):
        gaps.setdefault(sum(probability > edge for edge in edges), []).append(probability - label)
    return sum(abs(sum(gap)) for gap in gaps.values()) / len(labels)


def roc_plain(labels, scores):
    """(false-positive rate, true-positive rate) at every threshold, from none found to all."""
    corners = [(0.0, 0.0)]
    for threshold in sorted(set(scores), reverse=True):
        found = scores >= threshold
        corners.append((found[labels == 0].mean(), found[labels == 1].mean()))
    return corners


def crossing_of_line(corners, height):
    """Point of a chain of straight lines at which height(point) is 0, by bisection on each."""
    for start, end in itertools.pairwise(corners):
        if height(start) <= 0 <= height(end):
            share = optimize.brentq(lambda t: height(tuple(np.array(start) * (1 - t) + np.array(end) * t)), 0, 1)  # noqa: B023
            return np.array(start) * (1 - share) + np.array(end) * share
    raise AssertionError


def best_f1_plain(logits, truth, thresholds):
    """Highest F1 over thresholds, by comparing masks."""

    def f1(threshold):
        found = logits > threshold
        return 2 * (found & truth).sum() / (found.sum() + truth.sum())

    return max(f1(threshold) for threshold in thresholds)
