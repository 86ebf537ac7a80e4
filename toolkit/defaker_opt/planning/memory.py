"""The most bytes at once of a running build, and of making one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from defaker_opt.detector import Detector
from defaker_opt.planning.formulas import Counts, Load, picture_load, stage_counts, tile_count
from defaker_opt.runtime.spec import PHASES
from defaker_opt.sample import HEIGHT, WIDTH

# Measured: 58 MB for a process with numpy, pillow and onnxruntime, 37 MB for four sessions without weights; and what
# torch, transformers and the exporter take.
RUN_BASE_BYTES, MAKE_BASE_BYTES = 95e6, 600e6
# onnxruntime holds a stage's weights once more, laid out for its kernels, and its arena grows by powers of two.
_ARENA = 1.5
_FLOAT = 4


def running_bytes(
    detector: Detector,
    sizes: Mapping[str, float],
    counts: Mapping[str, Counts],
    load: Load,
    open_mb: int,
) -> float:
    """Libraries, the weights of stages that are open at once, what their arenas keep, embeddings and key/values."""
    embeddings = _FLOAT * load.prefix * detector.config.language.hidden_size
    # New key/values replace old ones layer by layer; a graph's own are beside those it is given.
    keys = _key_bytes(detector, load) * (1 + 1 / detector.config.language.layers)
    open_ = {name: size + _arena(counts, name) for name, size in sizes.items()}
    return RUN_BASE_BYTES + _at_once(open_, sum(sizes.values()), open_mb) + keys + embeddings


def making_bytes(detector: Detector, sizes: Mapping[str, float], open_mb: int) -> float:
    """The same for the machine that makes the build and compares it with torch on the sample picture.

    Torch reads the whole prefix at once; both keep their key/values.
    """
    load = picture_load(detector.config, tile_count(detector.config, WIDTH, HEIGHT), 0)
    counts = stage_counts(detector.config, load)
    open_ = {name: size + _arena(counts, name) for name, size in sizes.items()}
    return MAKE_BASE_BYTES + _at_once(open_, sum(sizes.values()), open_mb) + 2 * _key_bytes(detector, load)


def _at_once(parts: Mapping[str, float], total: float, open_mb: int) -> float:
    """All parts, or those of the largest phase where stages of a build as large as this take turns."""
    if not open_mb or total <= open_mb * 1e6:
        return sum(parts.values())
    phases: dict[int, float] = defaultdict(float)
    for stage, part in parts.items():
        phases[PHASES[stage]] += part
    return max(phases.values())


def _arena(counts: Mapping[str, Counts], stage: str) -> float:
    return _FLOAT * _ARENA * counts[stage].peak_values if stage in counts else 0.0


def _key_bytes(detector: Detector, load: Load) -> float:
    language = detector.config.language
    return _FLOAT * 2 * language.layers * language.kv_heads * language.head_dim * (load.prefix + load.mask)
