"""Whole pictures made anew by a generator; the mask is the whole picture, so areas do not apply."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from defaker_opt.forgery import Edit
from defaker_opt.forgery.canvas import Order, any_canvas
from defaker_opt.forgery.generators import GENERATORS

OPERATIONS = MappingProxyType(dict.fromkeys(GENERATORS, 1.0))


def forge(order: Order) -> Edit:
    """See `Domain`. The authentic twin is the photograph the generator was given."""
    base = any_canvas(order, procedural_share=0.0)
    made = GENERATORS[order.operation](order.rng, base.pixels)
    return Edit(base.pixels, made, np.ones(made.shape[:2], bool), (base.source,))
