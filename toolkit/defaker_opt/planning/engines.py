"""How large a stage's engine is: what is stored of it, and the kernels around it, which are the same for all widths."""

from __future__ import annotations

from collections.abc import Mapping

from defaker_opt.config import DetectorConfig
from defaker_opt.planning.formulas import stage_blocks

# Kernels and names of an engine beside its weights: of each block, and of the rest. Bytes, fitted to what TensorRT for
# RTX 1.7 made of the embedded detector and of DeFakerOne-2B (`profiling/engine_gate.py`); TensorRT itself may differ.
_BLOCK_BYTES = {"vision_encoder": 1.22e6, "language": 2.0e6, "mask_encoder": 0.77e6}
_REST_BYTES = {"vision_encoder": 2.4e6, "language": 1.7e6, "mask_encoder": 3.6e6, "mask_decoder": 7.9e6}
_OTHER_BYTES = 1e6


def engine_bytes(config: DetectorConfig, stages: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each stage's engine. stages: bytes of each stage's files."""
    return {
        stage: stored + stage_blocks(config, stage) * _BLOCK_BYTES.get(stage, 0) + _REST_BYTES.get(stage, _OTHER_BYTES)
        for stage, stored in stages.items()
    }
