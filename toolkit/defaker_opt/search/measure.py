"""Fill the ledger: harm from a sweep over pictures, bytes from shapes, milliseconds from this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from defaker_opt.catalog import code_digest
from defaker_opt.detector import Detector, linear_weights, source_digest
from defaker_opt.files import read_json_object, whole_file
from defaker_opt.methods import SchemeName
from defaker_opt.pipeline import build_bytes
from defaker_opt.preview import quantized_bytes
from defaker_opt.profiles.measure import judge_in_turns
from defaker_opt.progress import Progress, part_of
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.session import open_session
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import Samples
from defaker_opt.search import Ledger, Offer, fitted, offered_schemes
from defaker_opt.search.latency import Shape, time_layers
from defaker_opt.search.sensitivity import Blocks, Seen, measure_harms
from defaker_opt.target import Target

# Rounds in which a build is timed, and those before them.
_ROUNDS, _WARM_UP = 7, 2


def layer_shapes(detector: Detector) -> dict[str, Shape]:
    """[out, in] of every linear layer by the name of its weight, in the order of stages."""
    return {
        name: (shape[0], shape[1]) for stage in STAGES for name, shape in linear_weights(detector.config, stage).items()
    }


def see(detector: Detector, samples: Samples, target: Target, cache: Path, progress: Progress) -> Seen:
    """The sweep of `sensitivity`, once for a detector, its pictures, formats and this code; kept in `cache`."""
    offered = {name: offered_schemes(target, shape) for name, shape in layer_shapes(detector).items()}
    blocks = Blocks(target.session.tiles, target.session.tokens)
    key = json.dumps(
        [source_digest(detector), samples.digest, offered, dataclasses.astuple(blocks), code_digest()], sort_keys=True
    )
    path = cache / "sensitivity" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    kept = read_json_object(path)
    if kept is not None:
        return Seen(
            {name: {scheme: tuple(harm) for scheme, harm in each.items()} for name, each in kept["harms"].items()},
            kept["picture"],
            {name: tuple(rows) for name, rows in kept["rows"].items()},
        )
    seen = measure_harms(detector, samples, offered, blocks, progress)
    with whole_file(path) as partial:
        text = json.dumps({"harms": seen.harms, "picture": seen.picture, "rows": seen.rows})
        partial.write_text(text, encoding="utf-8")
    return seen


def picture_of(samples: Samples, seen: Seen) -> Image.Image:
    """The picture that everything is timed on."""
    return next(itertools.islice(samples.images(), seen.picture, None))


def make_ledger(
    detector: Detector, reference: Build, seen: Seen, target: Target, image: Image.Image, progress: Progress
) -> Ledger:
    """reference: the float32 build; what that weighs and takes beside its linear layers, any build does."""
    shapes = layer_shapes(detector)
    offered: Mapping[str, tuple[SchemeName, ...]] = {
        name: offered_schemes(target, shape) for name, shape in shapes.items()
    }
    times = time_layers(shapes, offered, seen.rows, target, part_of(progress, 0.0, 0.8))
    offers = {
        name: {
            scheme: Offer(
                harm=seen.harms[name][scheme],
                bytes=quantized_bytes(shape, str(fitted(scheme, shape[1]) or "float")),
                ms=times[name][scheme],
            )
            for scheme in offered[name]
        }
        for name, shape in shapes.items()
    }
    other_bytes = build_bytes(reference) - sum(4 * math.prod(shape) for shape in shapes.values())
    whole_ms = time_build(reference, image, part_of(progress, 0.8, 0.2))
    # Below 0 where stages run at once.
    return Ledger(offers, other_bytes, whole_ms - sum(each["float"] for each in times.values()))


def time_build(build: Build, image: Image.Image, progress: Progress) -> float:
    """Milliseconds of one picture with its mask, the median of some rounds."""
    session = open_session(build)
    [samples] = judge_in_turns([session], [image], 0.0, _WARM_UP, _ROUNDS, progress)
    session.close()
    return statistics.median(sample.latency_ms["total"] for sample in samples)
