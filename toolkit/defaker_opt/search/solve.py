"""One format a layer, with the least harm within a budget: a mixed-integer linear program, solved exactly by HiGHS."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from defaker_opt.errors import DefakerError
from defaker_opt.search import Budget, Formats, Ledger

# Points of a front, between the smallest build and the one without harm.
FRONT = 24

# A sum of floats must not make a budget impossible that a choice keeps to the last digit; relative.
_SLACK = 1e-9

# HiGHS takes differences below 1e-6 for none, so sums are scaled until what is asked of them is large beside that.
_SCALE = 1e4

Numbers = NDArray[np.float64]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """SciPy's HiGHS prints lines of debugging (1.17), which would come before what --json prints."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C's library has not written yet
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


class _Table:
    """Every offer of every layer in one row: cost, megabytes, milliseconds."""

    def __init__(self, ledger: Ledger) -> None:
        worst = ledger.worst()
        self.pairs = [(name, scheme) for name, offers in ledger.offers.items() for scheme in offers]
        offers = [ledger.offers[name][scheme] for name, scheme in self.pairs]
        self.harm = np.array([ledger.share(offer, worst) for offer in offers])
        self.size_mb = np.array([offer.bytes / 1e6 for offer in offers])
        self.ms = np.array([offer.ms for offer in offers])
        layer = {name: index for index, name in enumerate(ledger.offers)}
        rows = [layer[name] for name, _ in self.pairs]
        self.one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))

    def least(self, what: Numbers, limits: list[tuple[Numbers, float]]) -> Formats | None:
        """The choice with the least sum of `what` among those whose sums keep the limits; None if there is none."""
        constraints = [LinearConstraint(self.one_each, 1, 1)]
        for spent, most in limits:
            if math.isfinite(most):
                scale = _SCALE / abs(most) if most else 1.0
                constraints.append(LinearConstraint(spent[None] * scale, -np.inf, most * scale + _SLACK * _SCALE))
        largest = what.max(initial=0.0)
        with _silence():
            answer = milp(
                what * (_SCALE / largest) if largest > 0 else what,
                integrality=np.ones(len(what)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 1e-6},
            )
        if answer.x is None:
            return None
        return {name: scheme for (name, scheme), taken in zip(self.pairs, answer.x) if taken > 0.5}


def solve(ledger: Ledger, budget: Budget) -> Formats:
    """The choice with the least predicted harm whose predicted size and latency the budget allows.

    Without a budget the smallest. Raises DefakerError if there is none, with the least there is.
    """
    table = _Table(ledger)
    if budget == Budget():
        smallest = table.least(table.size_mb, [])
        assert smallest is not None
        return smallest
    found = table.least(table.harm, _limits(table, ledger, budget))
    if found is not None:
        return found
    smallest, fastest = table.least(table.size_mb, []), table.least(table.ms, [])
    assert smallest is not None and fastest is not None
    raise DefakerError(
        f"--budget: no build of these formats has {budget}; the smallest has {ledger.size_mb(smallest):.2f} MB and "
        f"{ledger.latency_ms(smallest):.1f} ms, the fastest {ledger.size_mb(fastest):.2f} MB and "
        f"{ledger.latency_ms(fastest):.1f} ms here; allow more"
    )


def _limits(table: _Table, ledger: Ledger, budget: Budget) -> list[tuple[Numbers, float]]:
    return [
        (table.size_mb, budget.size_mb - ledger.other_bytes / 1e6),
        (table.ms, budget.latency_ms - ledger.other_ms),
    ]


def smallest_within(ledger: Ledger, harm: float, latency_ms: float = math.inf) -> Formats | None:
    """The smallest choice that does at most so much harm, predicted; None if no choice is that fast."""
    table = _Table(ledger)
    return table.least(table.size_mb, [(table.harm, harm), (table.ms, latency_ms - ledger.other_ms)])


def front(ledger: Ledger, latency_ms: float = math.inf) -> list[Formats]:
    """Choices with the least harm for a range of sizes, the smallest first, all within `latency_ms`."""
    table = _Table(ledger)
    ends = [
        sum(pick(offer.bytes for offer in offers.values()) for offers in ledger.offers.values()) for pick in (min, max)
    ]
    choices = []
    for size_mb in np.geomspace(ledger.other_bytes + ends[0], ledger.other_bytes + ends[1], FRONT) / 1e6:
        found = table.least(table.harm, _limits(table, ledger, Budget(float(size_mb), latency_ms)))
        if found is not None:
            choices.append(found)
    # A size between two choices gives the smaller one again.
    return [choice for choice, _ in itertools.groupby(choices)]
