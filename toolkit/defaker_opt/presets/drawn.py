"""Random weights with the traits of trained ones that matter to quantization, each drawn from its own name.

- A matrix is normal with variance 1 / fan-in, so that activations keep their scale through any depth; what ends a
  residual branch is smaller by √(2 · 24), as deep transformers are initialized (Radford et al. 2019, section 2.3).
- Its rows differ in scale, log-normally with σ = 0.25, as rows of trained weights do.
- Each residual stream has outlier channels, one in 512 and at least one, the same in every layer. Whatever writes the
  stream is 8 times larger there, and norms have a quarter of their gain, so the input of the next product has a few
  channels that are larger than the others, as in large language models (Dettmers et al. 2022, section 4).
- Gains of norms and layer scales are near 1, biases small.

Streams are known by their width, so that what reads and what writes one agree without knowing each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from defaker_opt.presets.tables import GENERATION
from defaker_opt.weights import Shapes

Floats = NDArray[np.float32]

DTYPE = torch.bfloat16

# Values drawn at a time, so that no more than that is ever held.
_BLOCK_VALUES = 1 << 22

_ROW_SPREAD = 0.25
_OUTLIER_SHARE = 512
_OUTLIER_WRITE = 8.0
_OUTLIER_GAIN = 0.25
_BRANCH_GAIN = (2 * 24) ** -0.5

# What is added to a residual stream: the ends of branches, and what begins the stream.
_BRANCH_ENDS = (
    "o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight", "attn.proj.weight", "proj_out.weight",
)  # fmt: skip

# Tables are looked up or added, not multiplied; their own standard deviation, by the end of the name.
_TABLE = "embed_tokens.weight"
_TABLES = {
    _TABLE: 1.0, "position_matrix": 1.0, "position_embeddings": 0.1, "cls_token": 0.1, "pos_embed": 0.1,
    "pos_embed_window": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class RandomWeights:
    """Every tensor is drawn from the seed and its own name: the same in any order, block by block or whole."""

    drawn: Shapes
    seed: int = 0

    def shapes(self) -> Shapes:
        """See `Weights`."""
        return self.drawn

    def dtype(self, name: str) -> torch.dtype:
        """The type tensors are drawn in."""
        return DTYPE

    def read(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        return torch.cat(list(self.blocks(name))).reshape(self.drawn[name])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a tensor, some at a time."""
        shape = self.drawn[name]
        generator = _generator(self.seed, name)
        if len(shape) < 2:
            yield _rounded(_vector(name, shape, generator))
            return
        rows, width = shape[0], math.prod(shape[1:])
        scales = _row_scales(name, shape, generator)
        columns = _column_scales(name, shape)
        step = max(1, _BLOCK_VALUES // width)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            values = generator.standard_normal((count, width), np.float32)
            values *= scales[start : start + count, None]
            if columns is not None:
                values *= columns
            yield _rounded(values.reshape(count, *shape[1:]))

    def digest(self) -> str:
        """See `Weights`: of what they are drawn from."""
        text = f"{GENERATION} {self.seed} {sorted(self.drawn.items())}"
        return hashlib.sha256(text.encode()).hexdigest()


def outlier_channels(width: int) -> NDArray[np.int64]:
    """The outlier channels of every residual stream of this width; none in streams too narrow to have one."""
    if width < _OUTLIER_SHARE // 2:
        return np.zeros(0, np.int64)
    return _generator(0, f"outlier channels {width}").permutation(width)[: max(1, width // _OUTLIER_SHARE)]


def _generator(seed: int, name: str) -> np.random.Generator:
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:8], "little")))


def _vector(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    values: Floats = generator.standard_normal(shape, np.float32) * (0.02 if name.endswith("bias") else 0.1)
    if name.endswith("bias"):
        return values
    values += 1
    if "norm" in name:
        values[outlier_channels(shape[0])] *= _OUTLIER_GAIN
    return values


def _row_scales(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """Standard deviation of each row."""
    deviation = next((value for end, value in _TABLES.items() if name.endswith(end)), math.prod(shape[1:]) ** -0.5)
    scales = np.exp(_ROW_SPREAD * generator.standard_normal(shape[0], np.float32)) * deviation
    if name.endswith(_BRANCH_ENDS):
        scales *= _BRANCH_GAIN
        scales[outlier_channels(shape[0])] *= _OUTLIER_WRITE
    rounded: Floats = scales.astype(np.float32)
    return rounded


def _column_scales(name: str, shape: tuple[int, ...]) -> Floats | None:
    """A table of tokens writes the stream with its columns."""
    if not name.endswith(_TABLE):
        return None
    scales = np.ones(shape[1], np.float32)
    scales[outlier_channels(shape[1])] *= _OUTLIER_WRITE
    return scales


def _rounded(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(DTYPE)
