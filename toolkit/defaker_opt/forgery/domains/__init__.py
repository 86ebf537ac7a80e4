"""One kind of forgery a file. The file's name is the domain; each has OPERATIONS and `forge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from defaker_opt.forgery import Edit
from defaker_opt.forgery.canvas import Order


class Domain(Protocol):
    """OPERATIONS: name → the largest share of the canvas it can forge, 0…1."""

    OPERATIONS: Mapping[str, float]

    def forge(self, order: Order) -> Edit:
        """Make both twins; a pure function of the order. The area may miss the order's, the caller checks it."""
        ...
