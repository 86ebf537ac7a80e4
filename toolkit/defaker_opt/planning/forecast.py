"""Sizes, memory and time of a job and of its build, from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.device import Device
from defaker_opt.planning.engines import engine_bytes
from defaker_opt.planning.formulas import Counts, picture_load, stage_blocks, stage_counts
from defaker_opt.planning.looking import looking_cost, torch_rate
from defaker_opt.planning.memory import RUN_BASE_BYTES, making_bytes, running_bytes
from defaker_opt.preview import quantized_bytes
from defaker_opt.recipe import Recipe
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.sample import HEIGHT, WIDTH
from defaker_opt.samples import require_named
from defaker_opt.target import Target

# Nodes and names of a graph: of each block, and of the rest; quantized blocks have more nodes. Bytes, read off builds.
_BLOCK_BYTES = {"float": 7_000, "quantized": 12_500}
_REST_BYTES = {"vision_encoder": 6_000, "language": 4_500, "mask_encoder": 6_000, "mask_decoder": 68_000}
_MANIFEST_BYTES, _MANIFEST_ENTRY_BYTES = 8_500, 150
_FLOAT = 4
# Making a build on two cores: what does not depend on size, tracing one block, and bytes of weights a second through
# quantizing, writing and hashing. Seconds, between those measured with and without graphs in the cache.
_START_SECONDS, _BLOCK_SECONDS, _WEIGHT_RATE = 8.0, 0.4, 60e6
# Pictures that a stage is compared on and tests itself with, in units of one run in torch.
_CHECK_RUNS = 4.0
# On CPUs a product of this width reaches half of the rate that wide ones reach, and twice the width two thirds.
_HALF_WIDTH = 75
# Cutting, resizing and normalizing, a pixel of what the encoders see. Seconds, measured.
_PIXEL_SECONDS = 40e-9
# Parsing, timing kernels and writing an engine: bytes of its weights a second, a guess.
_ENGINE_RATE = 10e6


@dataclass(frozen=True)
class Sizes:
    """Bytes of each stage with its graph, and of the build's folder."""

    stages: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class Step:
    """One thing that will be done: seconds and the most bytes of memory at once, on the machine that is named."""

    name: str
    where: str
    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds of an image by stage, and together; floor_ms: what the device's stated rates would allow at best."""

    stages: Mapping[str, float]
    total_ms: float
    floor_ms: float


@dataclass(frozen=True)
class Forecast:
    """fits: whether the run, and building an engine there, stay within the target's share of memory. why: if not.

    engines: bytes of each stage's engine, on targets that have them.
    """

    recipe: str
    sizes: Sizes
    engines: Mapping[str, float]
    steps: tuple[Step, ...]
    run_memory_bytes: float
    latency: Latency
    memory_limit_bytes: float
    fits: bool
    why: str
    warnings: tuple[str, ...]


def forecast(recipe: Recipe, target: Target, device: Device, detector: Detector, tiles: int, here: Device) -> Forecast:
    """Forecast a job for pictures of so many tiles. `here` are the facts of the machine that makes the build.

    Raises PassError if the recipe cannot be carried out.
    """
    previews = [each.check(detector.config, target) for each in recipe.passes]
    schemes = {name: scheme for preview in previews for name, scheme in preview.schemes.items()}
    sizes = predict_sizes(detector, schemes, recipe)
    load = picture_load(detector.config, tiles, target.session.tokens, recipe.savings.shared_prefix)
    counts = stage_counts(detector.config, load)
    open_mb = target.session.open_mb
    engines = engine_bytes(detector.config, sizes.stages) if device.engine_build_memory else {}
    run_memory = running_bytes(detector, engines or sizes.stages, counts, load, open_mb)
    needs = {name: wanted for preview in previews for name, wanted in preview.needs.items()}
    require_named(recipe.name, recipe.calibration, [preview.looks for preview in previews if preview.looks])
    looking = [looking_cost(detector, needs, recipe.calibration, here)] if needs and recipe.calibration else []
    steps = [Step("look at pictures", "this machine", cost.seconds, cost.memory_bytes) for cost in looking]
    making = making_bytes(detector, sizes.stages, open_mb)
    steps.append(Step("quantize and export", "this machine", _make_seconds(detector, sizes, counts, here), making))
    if device.engine_build_memory:
        largest = max(sizes.stages.values())
        seconds = sum(sizes.stages.values()) / _ENGINE_RATE
        memory = RUN_BASE_BYTES + device.engine_build_memory * largest
        steps.append(Step("engines", target.name, seconds, memory))
    latency = predict_latency(detector, schemes, counts, device, sizes, tiles)
    limit = device.budget.memory_share * device.memory.value * 1e9
    steps.append(Step("run", target.name, latency.total_ms / 1e3, run_memory))
    too_large = [step for step in steps if step.where == target.name and step.memory_bytes > limit]
    why = "; ".join(
        f"{step.name} needs {step.memory_bytes / 1e9:.1f} GB of the {limit / 1e9:.1f} GB" for step in too_large
    )
    warnings = [f"unverified facts of {target.name}: {', '.join(device.unverified())}"] if device.unverified() else []
    unforeseen = [preview.looks for preview in previews if preview.looks and not preview.needs]
    if unforeseen:
        warnings.append(f"what it takes to look at pictures is not foreseen: {', '.join(unforeseen)}")
    if device.budget.latency_ms and latency.total_ms > device.budget.latency_ms:
        warnings.append(
            f"{latency.total_ms:.0f} ms an image is over the target's budget of {device.budget.latency_ms:g} ms"
        )
    fits = not too_large
    return Forecast(recipe.name, sizes, engines, tuple(steps), run_memory, latency, limit, fits, why, tuple(warnings))


def predict_sizes(detector: Detector, schemes: Mapping[str, str], recipe: Recipe) -> Sizes:
    """Bytes of each stage's files, and of the folder."""
    config, savings = detector.config, recipe.savings
    stages, names = {}, 0
    for stage in savings.stages():
        linear = linear_weights(config, stage)
        shapes = parameter_shapes(config, stage)
        names += len(shapes)
        weights = sum(
            quantized_bytes(shape, schemes.get(name, "float")) if name in linear else _FLOAT * math.prod(shape)
            for name, shape in shapes.items()
        )
        kind = "quantized" if any(schemes.get(name, "float") != "float" for name in linear) else "float"
        stages[stage] = weights + stage_blocks(config, stage) * _BLOCK_BYTES[kind] + _REST_BYTES.get(stage, 2_000)
    width, prompt = config.language.hidden_size, config.prompt
    assert prompt is not None
    tokens = len(prompt.before) + len(prompt.verdict) + len(prompt.mask) - prompt.shared()
    prompts = _FLOAT * width * (tokens if savings.prompt_embeddings else config.language.vocab_size)
    picture = WIDTH * HEIGHT * 4  # three colours and the mask
    entry = _MANIFEST_ENTRY_BYTES if schemes else 0
    return Sizes(stages, sum(stages.values()) + prompts + picture + _MANIFEST_BYTES + names * entry)


def _make_seconds(detector: Detector, sizes: Sizes, counts: Mapping[str, Counts], here: Device) -> float:
    """Quantizing, exporting and checking, on the machine at hand."""
    shapes = {stage: parameter_shapes(detector.config, stage) for stage in sizes.stages}
    floats = {stage: _FLOAT * sum(map(math.prod, found.values())) for stage, found in shapes.items()}
    blocks = sum(stage_blocks(detector.config, stage) for stage in sizes.stages)
    checks = _CHECK_RUNS * sum(stage.total for stage in counts.values()) / torch_rate(here)
    return _START_SECONDS + blocks * _BLOCK_SECONDS + sum(floats.values()) / _WEIGHT_RATE + checks


def predict_latency(
    detector: Detector,
    schemes: Mapping[str, str],
    counts: Mapping[str, Counts],
    device: Device,
    sizes: Sizes,
    tiles: int,
) -> Latency:
    """Each stage's operations at what good engines reach of the device's rates, or its weights through its memory.

    On CPUs elementwise operators are not fused into products, so their traffic is added.
    """
    stages, floors = {}, 0.0
    for stage, found in counts.items():
        linear = linear_weights(detector.config, stage)
        seconds = (found.attention + found.convolution) / _rate(device, "float")
        weights = {name: math.prod(shape) for name, shape in linear.items()}
        whole = sum(weights.values())
        for name, count in weights.items():
            kind = schemes.get(name, "float").partition("-g")[0]
            seconds += found.linear * count / whole / _rate(device, kind)
        moved = sizes.stages[stage] / (device.bandwidth.value * 1e9)
        floors += max(seconds, moved)
        elementwise = 0.0
        if device.kind in ("cpu", "browser"):
            elementwise = (
                _FLOAT * found.traffic_values / (device.bandwidth.value * 1e9 * device.efficiency.bandwidth.value)
            )
            seconds *= 1 + _HALF_WIDTH / _width(detector, stage)
        reached = max(seconds / device.efficiency.compute.value, moved / device.efficiency.bandwidth.value)
        stages[stage] = (reached + elementwise) * 1e3
    stages["preprocess"] = 1e3 * _PIXEL_SECONDS * _pixels(detector, tiles)
    return Latency(stages, sum(stages.values()), floors * 1e3)


def _width(detector: Detector, stage: str) -> float:
    """How wide a stage's products are, about."""
    config = detector.config
    widths = {"vision_encoder": config.vision.hidden_size, "language": config.language.hidden_size}
    return widths.get(stage, sum(config.segmenter.widths[:3]) / 3)


def _pixels(detector: Detector, tiles: int) -> float:
    return tiles * detector.config.tiling.tile_size**2 + detector.config.segmenter.image_size**2


def _rate(device: Device, kind: str) -> float:
    name = device.best_format(kind)
    assert name is not None, f"{kind} on a device that cannot run it; the recipe's check should have said so"
    return device.peaks[name].value * 1e12


def has_vocabulary(recipe: Recipe) -> bool:
    """Whether the build decodes text, which this forecast leaves out of latency."""
    return VOCABULARY_HEAD in recipe.savings.stages()
