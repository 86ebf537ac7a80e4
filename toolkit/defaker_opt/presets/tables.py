"""The sizes of released models, by the names users give.

From the releases' own `config.json` and SAM2's yaml; a test compares the numbers of parameters with what was published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Raised whenever other weights are drawn, so that folders of an older generation are not taken for new ones.
GENERATION = 1


@dataclass(frozen=True)
class Family:
    """What language models of one family have in common."""

    architecture: Literal["llama", "qwen2", "phi3"]
    norm_eps: float
    rope_theta: float
    max_positions: int
    rope_scale: float = 1.0


@dataclass(frozen=True)
class Decoder:
    """A language model. vocab_size includes the five tokens that joining it with a segmenter appends."""

    title: str
    family: Family
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int


@dataclass(frozen=True)
class Trunk:
    """SAM2's image encoder. width and heads: of the first stage; they double from stage to stage."""

    width: int
    heads: int
    blocks: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    position_grid: tuple[int, int]


_QWEN2 = Family("qwen2", 1e-6, 1e6, 32768)
_INTERNLM2 = Family("llama", 1e-5, 1e6, 32768)

# Phi-3-mini-128k within its original context of 4096; LongRoPE scales its waves by √(1 + ln 32 / ln 4096).
_PHI3 = Family("phi3", 1e-5, 1e4, 4096, rope_scale=math.sqrt(1 + math.log(32) / math.log(4096)))

DECODERS = {
    "sa2va-1b": Decoder("Sa2VA-1B (Qwen2.5-0.5B)", _QWEN2, 896, 4864, 24, 14, 2, 151679),
    "sa2va-4b": Decoder("Sa2VA-4B (Qwen2.5-3B)", _QWEN2, 2048, 11008, 36, 16, 2, 151679),
    "sa2va-8b": Decoder("Sa2VA-8B (InternLM2.5-7B)", _INTERNLM2, 4096, 14336, 32, 32, 8, 92558),
    "internvl2-1b": Decoder("InternVL2-1B (Qwen2-0.5B)", _QWEN2, 896, 4864, 24, 14, 2, 151660),
    "internvl2-2b": Decoder("InternVL2-2B (InternLM2-1.8B)", _INTERNLM2, 2048, 8192, 24, 16, 8, 92558),
    "internvl2-4b": Decoder("InternVL2-4B (Phi-3-mini)", _PHI3, 3072, 8192, 32, 32, 32, 32025),
    "internvl2-8b": Decoder("InternVL2-8B (InternLM2.5-7B)", _INTERNLM2, 4096, 14336, 32, 32, 8, 92558),
}

SAM2_TRUNKS = {
    "tiny": Trunk(96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), (7, 7)),
    "small": Trunk(96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), (7, 7)),
    "base+": Trunk(112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), (14, 14)),
    "large": Trunk(144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), (7, 7)),
}

# Joint detectors as released: decoder and trunk. DeFakerOne-2B is InternVL2-2B joined as Sa2VA is.
JOINED = {
    "defakerone-2b": ("internvl2-2b", "large"),
    "sa2va-1b": ("sa2va-1b", "large"),
    "sa2va-4b": ("sa2va-4b", "large"),
    "sa2va-8b": ("sa2va-8b", "large"),
}
