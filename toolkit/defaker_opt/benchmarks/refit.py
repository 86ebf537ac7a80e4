"""The threshold and the temperature that give a build the reference's habits back, from calibration pictures only.

Never fit them on the pictures that a build is judged by: the figures there would promise what no other picture keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from defaker_opt.benchmarks.metrics import Floats, Labels
from defaker_opt.errors import DefakerError

# A temperature outside is no correction but a sign that verdicts are all right or upside down.
_TEMPERATURES = (0.05, 20.0)
# Probabilities of exactly 0 and 1 have no logit; float32 softmax reaches them.
_LEAST = 1e-7


@dataclass(frozen=True)
class FittedThreshold:
    """Above `threshold` a picture is forged. reference_rate, rate: false positives of the reference and the build."""

    threshold: float
    reference_rate: float
    rate: float
    authentic: int


@dataclass(frozen=True)
class FittedTemperature:
    """Logits are divided by `temperature`. loss: mean negative log likelihood in nats, before and after."""

    temperature: float
    loss_before: float
    loss: float


def fit_threshold(
    labels: Labels, reference: Floats, build: Floats, reference_threshold: float = 0.5
) -> FittedThreshold:
    """The threshold at which the build calls as many authentic pictures forged as the reference does.

    labels [N], probabilities [N] of calibration pictures. Where ties allow no equal rate, the next lower one is taken.
    A threshold that already holds is kept; a new one lies in the middle between two pictures. Raises DefakerError
    without authentic pictures.
    """
    authentic = labels == 0
    count = int(authentic.sum())
    if not count:
        raise DefakerError("calibration: no authentic images, so there is no false-positive rate to restore; add some")
    wanted = int((reference[authentic] > reference_threshold).sum())
    scores = np.sort(build[authentic])[::-1]
    holds = (scores > reference_threshold).sum() == wanted
    threshold = reference_threshold if holds else _gap_above(scores, wanted)
    return FittedThreshold(threshold, wanted / count, float((scores > threshold).mean()), count)


def _gap_above(scores: Floats, wanted: int) -> float:
    """A threshold that at most `wanted` of the falling scores exceed, and as many as ties allow."""
    if wanted == len(scores):
        return float(scores[-1]) / 2
    below = scores[wanted]
    higher = scores[scores > below]
    above = float(higher[-1]) if len(higher) else 1.0
    # Between neighbouring floats the middle may round up to the upper one.
    middle = float((below + above) / 2)
    return middle if middle < above else float(below)


def fit_temperature(labels: Labels, probabilities: Floats) -> FittedTemperature:
    """The temperature of least negative log likelihood: Guo et al. 2017, section 4.2, for two classes.

    Raises DefakerError where the best one is beyond 0.05…20: verdicts that are all right want certainty, and such
    that are often upside down want none.
    """
    if not (labels == 1).any() or not (labels == 0).any():
        raise DefakerError("calibration: a temperature needs authentic and forged images; add those that are missing")
    logits = special.logit(np.clip(probabilities, _LEAST, 1 - _LEAST))

    def loss(log_temperature: float) -> float:
        scaled = logits * np.exp(-log_temperature)
        return float(np.mean(np.logaddexp(0.0, scaled) - labels * scaled))

    low, high = np.log(_TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    if min(found.x - low, high - found.x) < 1e-3:
        raise DefakerError(
            f"calibration: no temperature in {_TEMPERATURES[0]:g}…{_TEMPERATURES[1]:g} fits {len(labels)} verdicts "
            f"best, its end {np.exp(found.x):.3g} does; use more or harder images, or keep temperature 1"
        )
    return FittedTemperature(float(np.exp(found.x)), loss(0.0), float(found.fun))


def at_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities after their logits are divided by the temperature."""
    scaled: NDArray[np.float64] = special.expit(special.logit(np.clip(probabilities, _LEAST, 1 - _LEAST)) / temperature)
    return scaled
