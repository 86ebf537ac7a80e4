"""The contract of a stage: which tensors go in and out, by name, type and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STAGES = ("vision_encoder", "language", "mask_encoder", "mask_decoder")

# A fifth, in builds that are made without the eight-row verdict head.
VOCABULARY_HEAD = "vocabulary_head"

# Stages that take turns on a picture; those of one phase are needed by turns, so they stay open together.
PHASES = {"vision_encoder": 0, "language": 1, VOCABULARY_HEAD: 1, "mask_encoder": 2, "mask_decoder": 2}

# A size is a number, or the name of one that changes from image to image ("tiles", "tokens", "past").
Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a stage: `shape` holds numbers and the names of dimensions that change."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class StageSpec:
    """One exportable cut of the detector; said once, by the stage's module, and carried along from there."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def as_json(self) -> dict[str, Any]:
        """The form the manifest keeps."""
        return {
            "name": self.name,
            "inputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in self.inputs],
            "outputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in self.outputs],
        }


def spec_from_json(data: dict[str, Any]) -> StageSpec:
    """The inverse of `StageSpec.as_json`."""
    inputs, outputs = (
        tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in data[side])
        for side in ("inputs", "outputs")
    )
    return StageSpec(data["name"], inputs, outputs)
