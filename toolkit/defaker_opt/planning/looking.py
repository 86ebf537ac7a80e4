"""What it costs to look at pictures before codes are chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, linear_weights
from defaker_opt.device import Device
from defaker_opt.methods import Need
from defaker_opt.planning.formulas import picture_load, stage_blocks, stage_counts, tile_count
from defaker_opt.samples import expected_samples

_FLOAT, _DOUBLE = 4, 8
# What does not decide a layer's codes, so that they are there when it is looked at.
_RANGES = {"histogram"}
# Width / height of usual pictures; upright ones are cut into as many tiles.
_ASPECTS = (1.0, 4 / 3, 4 / 3, 3 / 2, 16 / 9)
# What torch, transformers and decoded pictures take, and the heap keeps of stages that were looked at before. Measured.
_BASE_BYTES = 700e6
# One call of a block, with its hooks, however small it is. Measured.
_CALL_SECONDS = 2e-3
# GPTQ in float64 by columns reaches this share of the rate of float32 products.
_FACTOR_SHARE = 0.1


@dataclass(frozen=True)
class LookingCost:
    """Seconds, and the most bytes at once, on the machine that makes the build."""

    seconds: float
    memory_bytes: float


def torch_rate(here: Device) -> float:
    """Float32 operations a second that torch reaches."""
    return here.peaks["fp32"].value * 1e12 * here.efficiency.compute.value


def looking_cost(
    detector: Detector, needs: Mapping[str, Collection[Need]], calibration: str, here: Device
) -> LookingCost:
    """needs: of each layer that is looked at. Pictures of unknown size are taken for the largest."""
    config, (images, side) = detector.config, expected_samples(calibration)
    load = picture_load(config, picture_tiles(config, side), 0, shared_prefix=False)
    shifted = any("shift" in wanted for wanted in needs.values())
    stages = _walked({name.partition(".")[0] for name in needs})
    counts = stage_counts(config, load)
    # The picture's tiles are encoded once here, whatever is asked.
    operations = {name: counts[name].total / (load.readings if name == "vision_encoder" else 1) for name in stages}
    runs = {name: images * (_block_runs(name, needs) + shifted) for name in stages}
    shapes = {name: shape for stage in stages for name, shape in linear_weights(config, stage).items()}
    factored = sum(
        columns**3 + 2 * columns**2 * rows
        for name, (rows, columns) in shapes.items()
        if "hessian" in needs.get(name, ())
    )
    # The language part is called for each question.
    calls = {name: stage_blocks(config, name) * (load.readings if name == "language" else 1) for name in stages}
    seconds = sum(runs[name] * operations[name] for name in stages) / torch_rate(here)
    seconds += factored / (_FACTOR_SHARE * torch_rate(here))
    seconds += sum(runs[name] * calls[name] for name in stages) * _CALL_SECONDS
    states = {
        "vision_encoder": load.tiles
        * (config.tiling.tile_size // config.vision.patch_size) ** 2
        * config.vision.hidden_size,
        "language": (2 * load.prefix + load.verdict + load.mask) * config.language.hidden_size,
        "mask_encoder": (config.segmenter.image_size // 4) ** 2 * config.segmenter.widths[0],
    }
    kept = _FLOAT * images * (1 + shifted) * max(states.get(name, 0) for name in stages)
    squares = max((shape[1] ** 2 for name, shape in shapes.items() if "hessian" in needs.get(name, ())), default=0)
    return LookingCost(seconds, _BASE_BYTES + kept + _DOUBLE * (4 + shifted) * squares)


def _block_runs(stage: str, needs: Mapping[str, Collection[Need]]) -> int:
    """A block runs to be observed and with its codes, at once if those do not depend on what is seen."""
    asked = [set(wanted) for name, wanted in needs.items() if name.startswith(f"{stage}.")]
    return 2 if any(not wanted <= _RANGES for wanted in asked) else 1


def picture_tiles(config: DetectorConfig, side: int) -> int:
    """Of a picture of that longest side in px, the mean over usual shapes, rounded up; the most if it is 0."""
    tiling = config.tiling
    if not side:
        return tiling.max_tiles + (tiling.max_tiles > 1)
    counts = [tile_count(config, side, round(side / aspect)) for aspect in _ASPECTS]
    return math.ceil(sum(counts) / len(counts))


def _walked(looked_at: set[str]) -> tuple[str, ...]:
    """Stages that run: those looked at, and what they are given comes from."""
    order = {
        "vision_encoder": {"vision_encoder", "language", "mask_decoder"},
        "language": {"language", "mask_decoder"},
        "mask_encoder": {"mask_encoder", "mask_decoder"},
        "mask_decoder": {"mask_decoder"},
    }
    return tuple(stage for stage, users in order.items() if users & looked_at)
