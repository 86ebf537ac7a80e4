"""Grain: what a sensor leaves on all of a picture, and a forgery only on what it did not touch."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from defaker_opt.forgery import Edit, Pixels
from defaker_opt.forgery.pixels import add_noise, blur, feather, to_pixels

# Standard deviation of a sensor's noise, grey values.
WEAKEST_GRAIN, STRONGEST_GRAIN = 2.5, 6.0


def add_grain(rng: Generator, pixels: Pixels) -> Pixels:
    """Sensor noise of one strength all over a picture."""
    return add_noise(rng, pixels, rng.uniform(WEAKEST_GRAIN, STRONGEST_GRAIN))


def leave_trace(rng: Generator, edit: Edit) -> Edit:
    """Give what was forged another past than its surroundings: smoothed by resampling, or with stronger noise.

    Nothing changes outside the mask; a border of up to 2 px inside it keeps some of the grain.
    """
    smoothed = rng.random() < 0.65
    other = blur(edit.forged, rng.uniform(0.9, 1.6)) if smoothed else add_noise(rng, edit.forged, rng.uniform(8, 14))
    opacity = feather(edit.mask, rng.uniform(0, 2) if rng.random() < 0.5 else 0.0)[..., None]
    forged = edit.forged.astype(np.float32)
    changed = to_pixels(forged + opacity * (other.astype(np.float32) - forged))
    return Edit(edit.authentic, changed, edit.mask, edit.sources)
