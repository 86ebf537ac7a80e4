"""One stage from torch to a checked file in the build; a receipt lets a later run find it finished."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.detector import Detector, linear_weights
from defaker_opt.errors import PassError
from defaker_opt.files import read_json_object, write_json
from defaker_opt.graph import Graph
from defaker_opt.graph.accepted import check_accepted
from defaker_opt.graph.codes import fill_weights_
from defaker_opt.graph.qdq import code_operands_, narrow_attention_
from defaker_opt.graph.traced import traced_stage
from defaker_opt.graph.write import check_decoded, write_graph
from defaker_opt.runtime.build import Build, file_sha256
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.images import image_tiles, mask_image
from defaker_opt.runtime.self_test import relative_difference
from defaker_opt.runtime.session import Session, open_session
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.sample import sample_image
from defaker_opt.target import Target

Tensors = Mapping[str, NDArray[Any]]

# How far a stage may be from torch with the same decoded weights, as ‖difference‖ / ‖torch‖ of any output. Float leaves
# only the order of additions; 8-bit activations and bfloat16 leave their own rounding, which grows with depth.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "quantized": 0.1}


def build_stage(detector: Detector, target: Target, stage: str, build: Build, receipt: Path) -> dict[str, Any]:
    """Export, encode, write and check one stage; its entry in the manifest. Raises PassError.

    `receipt` remembers a finished stage: if it is there and its files are unchanged, nothing is done.
    """
    finished = read_json_object(receipt)
    if finished and all(_unchanged(build.folder / name, digest) for name, digest in finished["files"].items()):
        entry: dict[str, Any] = finished["entry"]
        return entry
    graph = traced_stage(detector, stage)
    fill_stage_(graph, detector, target)
    files = write_graph(graph, build.folder)
    check_decoded(files[0], detector, stage)
    if target.graph:
        check_accepted(files[0], target.graph, target.name)
    session = open_session(build)
    parity = measure_parity(detector, stage, session)
    scheme = stage_scheme(detector, stage)
    tolerance = _TOLERANCE[target.compute_here if scheme == "float" else "quantized"]
    if not all(math.isfinite(value) for value in parity.values()):
        wrong = next(name for name, value in parity.items() if not math.isfinite(value))
        raise PassError(
            f"{stage}: {wrong} is not a finite number on the sample picture, in torch or in the graph; "
            "are all weights of the source finite?"
        )
    entry = {
        "spec": graph.spec.as_json(),
        "bytes": sum(path.stat().st_size for path in files),
        "scheme": scheme,
        "parity": max(parity.values()),
        "parity_by_output": parity,
        "parity_tolerance": tolerance,
    }
    if not entry["parity"] <= tolerance:
        raise PassError(
            f"{stage}: {max(parity, key=lambda name: parity[name])} is {entry['parity']:.2%} away from torch with the "
            f"same weights, where {tolerance:.2%} is allowed; keep more of it in float, first of all "
            f'{{match: "{stage}.*", scheme: float}}'
        )
    digests = {path.name: file_sha256(path) for path in files}
    write_json(receipt, {"entry": entry, "files": digests})
    return entry


def fill_stage_(graph: Graph, detector: Detector, target: Target) -> None:
    """Give a traced stage its weights and codes in the target's encodings, and its attention the target's type."""
    fill_weights_(graph, detector, target.encodings)
    scales = {n: s for n, s in detector.operand_scales.items() if n.startswith(f"{graph.spec.name}.")}
    if target.attention == "int8" and scales:
        code_operands_(graph.model.graph, scales)
    if target.attention == "float16" and stage_scheme(detector, graph.spec.name) != "float":
        narrow_attention_(graph.model.graph)


def stage_scheme(detector: Detector, stage: str) -> str:
    """The schemes of a stage's linear layers, the most frequent first, e.g. "int8" or "int4-g64+float"."""
    names = [
        str(detector.codes[name].scheme) if name in detector.codes else "float"
        for name in linear_weights(detector.config, stage)
    ]
    return "+".join(sorted(set(names), key=lambda name: (-names.count(name), name)))


def measure_parity(detector: Detector, stage: str, session: Session) -> dict[str, float]:
    """Largest ‖difference‖ / ‖torch‖ of each output between the written stage and torch, on the sample picture.

    The graph has run and is closed before torch begins, which then holds one block's weights at a time.
    """
    cases = [(given, session.run(stage, given, Clock())) for given in stage_inputs(stage, session)]
    session.close()
    module = detector.stream_stage(stage)
    worst: dict[str, float] = {}
    with torch.inference_mode():
        for given, got in cases:
            expected = module(
                *(torch.from_numpy(np.asarray(given[tensor.name])) for tensor in session.spec(stage).inputs)
            )
            for tensor, reference in zip(session.spec(stage).outputs, expected):
                difference = relative_difference(got[tensor.name], reference.numpy())
                # NaN is kept whichever side of the comparison it stands on.
                worst[tensor.name] = float(np.maximum(worst.get(tensor.name, 0.0), difference))
    return worst


def stage_inputs(stage: str, session: Session) -> Iterator[Tensors]:
    """What a stage is given on the sample picture; the stages before it run as they were written."""
    image = Image.fromarray(sample_image())
    facts, clock = session.build.manifest.data["input"], Clock()
    pixels = {"image": mask_image(image, facts["mask_image_size"])}
    if stage == "mask_encoder":
        yield pixels
        return
    tiles = {"tiles": image_tiles(image, facts["tile_size"], facts["min_tiles"], facts["max_tiles"])}
    if stage == "vision_encoder":
        yield tiles
        return
    vision = session.see(tiles["tiles"], clock)
    session.close()
    if stage == "language":
        yield session.prefix_input(vision)
    prefix = session.read_prefix(vision, clock)
    if stage == VOCABULARY_HEAD:
        yield session.run("language", session.question_input("verdict", prefix), clock, ("last_hidden",))
        return
    if stage == "language":
        yield session.question_input("mask", prefix)
        return
    embedding = session.ask("mask", prefix, clock)
    session.close()
    yield {**session.run("mask_encoder", pixels, clock), "seg_embedding": embedding}


def _unchanged(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest
