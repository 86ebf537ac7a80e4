"""Milliseconds of every layer in every format, measured here: products of equal shape and rows are timed once.

All formats of a shape run in turn, round by round, so that what disturbs the machine disturbs them alike. Inputs that
several layers share are rounded once in a build and once a layer here; the finished build is timed as a whole.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from defaker_opt.graph.product import write_product
from defaker_opt.methods import SchemeName
from defaker_opt.methods.round_to_nearest import METHOD as ROUND
from defaker_opt.progress import Progress
from defaker_opt.runtime.backends import OpenStage, find_backend
from defaker_opt.search import fitted
from defaker_opt.target import Target

ROUNDS = 7

# A product is repeated until a round takes this long: a clock and a scheduler disturb shorter ones.
_ROUND_MS = 2.0

Shape = tuple[int, int]
Times = dict[str, dict[SchemeName, float]]


def time_layers(
    shapes: Mapping[str, Shape],
    offered: Mapping[str, tuple[SchemeName, ...]],
    rows: Mapping[str, Sequence[int]],
    target: Target,
    progress: Progress,
) -> Times:
    """Milliseconds of all of a layer's calls on one picture, by weight name and scheme.

    shapes: [out, in] by weight name; rows: of the input of each call. A layer that is never called takes no time.
    """
    kinds = sorted({(shapes[name], offered[name]) for name in shapes})
    with tempfile.TemporaryDirectory() as folder:
        found: dict[tuple[Shape, tuple[SchemeName, ...]], dict[int, dict[SchemeName, float]]] = {}
        for index, (shape, schemes) in enumerate(kinds):
            progress(f"time products of {shape[1]} → {shape[0]}", index / len(kinds))
            counts = {
                count for name in shapes if (shapes[name], offered[name]) == (shape, schemes) for count in rows[name]
            }
            opened = _open(Path(folder), shape, schemes, target)
            found[shape, schemes] = {count: _time(opened, shape[1], count) for count in sorted(counts)}
    times: Times = {}
    for name, shape in shapes.items():
        by_rows = found[shape, offered[name]]
        times[name] = {scheme: sum(by_rows[count][scheme] for count in rows[name]) for scheme in offered[name]}
    return times


def _open(folder: Path, shape: Shape, schemes: tuple[SchemeName, ...], target: Target) -> dict[SchemeName, OpenStage]:
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    opened: dict[SchemeName, OpenStage] = {}
    for scheme in schemes:
        rounded = fitted(scheme, shape[1])
        codes = ROUND().quantize(weight, rounded) if rounded else None
        file = folder / f"{shape[0]}-{shape[1]}-{scheme}.onnx"
        spec = write_product(file, weight, codes, target.encodings)
        opened[scheme] = find_backend(target.backend).open_stage(file, spec, dataclasses.asdict(target.session))
    return opened


def _time(opened: Mapping[SchemeName, OpenStage], columns: int, rows: int) -> dict[SchemeName, float]:
    """The median over rounds of each, with `rows` rows."""
    given = {"x": np.random.default_rng(1).standard_normal((rows, columns), np.float32)}
    repeats = {
        scheme: max(1, int(_ROUND_MS / max(1e-3, _milliseconds(run, given, 2)))) for scheme, run in opened.items()
    }
    taken: dict[SchemeName, list[float]] = {scheme: [] for scheme in opened}
    for _ in range(ROUNDS):
        for scheme, run in opened.items():
            taken[scheme].append(_milliseconds(run, given, repeats[scheme]))
    return {scheme: statistics.median(each) for scheme, each in taken.items()}


def _milliseconds(run: OpenStage, given: Mapping[str, np.ndarray], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run(given, ("y",))
    return (time.perf_counter() - started) * 1e3 / repeats
