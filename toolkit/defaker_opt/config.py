"""`config.json` of a detector folder: every size of the joint model, and the token ids of its prompts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from defaker_opt.strict import Invalid, read_json

FORMAT = 1

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True)
class VisionConfig:
    """InternViT, pixel shuffle and the projector into the language model's width."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    patch_size: int
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    # Pixel shuffle: this many patches a side become one token.
    shuffle: int = 2

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "layers", "heads", "patch_size", "norm_eps", "shuffle")
        _divides("hidden_size", self.hidden_size, "heads", self.heads)


@dataclass(frozen=True)
class LanguageConfig:
    """The decoder. InternLM2 is Llama with its fused projections taken apart, so it has no architecture of its own."""

    architecture: Literal["llama", "qwen2", "phi3"]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    activation: Activation = "silu"
    # LongRoPE: each frequency is divided by its factor (none: by 1), and both waves are multiplied by the scale.
    rope_factors: tuple[float, ...] = ()
    rope_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size")
        _positive(self, "norm_eps", "rope_theta", "max_positions", "rope_factors", "rope_scale")
        _divides("heads", self.heads, "kv_heads", self.kv_heads)
        _divides("head_dim", self.head_dim, "the two halves of a rotation", 2)
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise Invalid(f"rope_factors must have {self.head_dim // 2} numbers, got {len(self.rope_factors)}")


@dataclass(frozen=True)
class SegmenterConfig:
    """SAM2: the Hiera trunk by stage (high resolution first), and one width for neck, prompts and decoder."""

    image_size: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    position_grid: tuple[int, int]
    hidden_size: int
    decoder_layers: int
    decoder_heads: int
    decoder_intermediate_size: int
    iou_hidden_size: int
    # Widths are divided by this inside the decoder's cross attention.
    attention_downsample: int = 2

    def __post_init__(self) -> None:
        for name in ("blocks", "widths", "heads", "windows"):
            if len(getattr(self, name)) != 4:
                raise Invalid(f"{name} must have 4 numbers, one a stage, got {len(getattr(self, name))}")
        _positive(self, "image_size", "blocks", "widths", "heads", "windows", "position_grid", "hidden_size")
        _positive(self, "decoder_layers", "decoder_heads", "decoder_intermediate_size", "iou_hidden_size")
        _positive(self, "attention_downsample")
        for width, heads in zip(self.widths, self.heads):
            _divides("width", width, "its heads", heads)
        if any(a == b for a, b in zip(self.widths, self.widths[1:])):
            raise Invalid(f"widths must change from stage to stage, where the trunk halves its grid, got {self.widths}")
        if self.image_size % 32:
            raise Invalid(f"image_size must be a multiple of 32, the trunk's largest stride, got {self.image_size}")
        _divides("image_size / 4", self.image_size // 4, "the first window", self.windows[0])
        if any(window % 2 for window in self.windows[:3]):
            raise Invalid(f"windows must be even where the trunk halves its grid, got {list(self.windows)}")
        starts = [sum(self.blocks[:stage]) for stage in range(1, 4)]
        if set(starts) & set(self.global_blocks):
            raise Invalid(f"global_blocks {list(self.global_blocks)} must not begin a stage; those blocks are {starts}")
        if not set(self.global_blocks) <= set(range(sum(self.blocks))):
            raise Invalid(f"global_blocks {list(self.global_blocks)} must be among blocks 0 to {sum(self.blocks) - 1}")
        _divides(
            "hidden_size",
            self.hidden_size,
            "decoder_heads * attention_downsample",
            self.decoder_heads * self.attention_downsample,
        )
        _divides("hidden_size", self.hidden_size, "the mask decoder's upscaling", 8)

    @property
    def feature_size(self) -> int:
        """Side of the image embedding, which has stride 16."""
        return self.image_size // 16


@dataclass(frozen=True)
class TilingConfig:
    """How a picture is cut for the vision encoder; a thumbnail follows where there is more than one tile."""

    tile_size: int
    min_tiles: int
    max_tiles: int

    def __post_init__(self) -> None:
        _positive(self, "tile_size")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise Invalid(f"needs 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}")


@dataclass(frozen=True)
class PromptConfig:
    """Token ids of the fixed prompts and of the eight answer words.

    before: up to and including <img>. verdict: from </img> to the position where the answer's first word is predicted.
    mask: from </img> through the question and the fixed answer to [SEG], at whose position the mask is read.
    """

    before: tuple[int, ...]
    verdict: tuple[int, ...]
    mask: tuple[int, ...]
    fake_answers: tuple[int, ...]
    real_answers: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("fake_answers", "real_answers"):
            if len(getattr(self, name)) != 4:
                raise Invalid(f"{name} must have 4 token ids, got {len(getattr(self, name))}")
        if len({*self.answers}) != 8:
            raise Invalid(f"the 8 answer words need 8 different token ids, got {list(self.answers)}")
        if not self.verdict or not self.mask:
            raise Invalid("verdict and mask must not be empty")

    @property
    def answers(self) -> tuple[int, ...]:
        """The eight rows of the verdict head: four that say fake, then four that say real."""
        return self.fake_answers + self.real_answers

    def answer_tokens(self) -> int:
        """How many tokens at the end of `mask` are its fixed answer: those after what also ends `verdict`."""
        for length in range(len(self.verdict), 0, -1):
            ending = self.verdict[-length:]
            for end in range(len(self.mask) - 1, length - 1, -1):
                if self.mask[end - length : end] == ending:
                    return len(self.mask) - end
        return 1

    def shared(self) -> int:
        """How many tokens the two questions share, at least one of each left to ask on its own."""
        limit = min(len(self.verdict), len(self.mask)) - 1
        return next((i for i in range(limit) if self.verdict[i] != self.mask[i]), limit)


@dataclass(frozen=True)
class DetectorConfig:
    """Everything about a detector but its weights. `prompt` is None where the checkpoint had no tokenizer."""

    format: int
    name: str
    trained: bool
    tiling: TilingConfig
    vision: VisionConfig
    language: LanguageConfig
    segmenter: SegmenterConfig
    prompt: PromptConfig | None = None

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise Invalid(f"format {self.format} is not {FORMAT}, the one this version reads; convert it again")
        _divides("tiling.tile_size", self.tiling.tile_size, "vision.patch_size", self.vision.patch_size)
        _divides("patches a side", self.tiling.tile_size // self.vision.patch_size, "shuffle", self.vision.shuffle)
        if self.prompt:
            self._check_ids(self.prompt, self.language.vocab_size)
            longest = (self.tiling.max_tiles + 1) * self.tokens_per_tile
            longest += len(self.prompt.before) + max(len(self.prompt.verdict), len(self.prompt.mask))
            if longest > self.language.max_positions:
                raise Invalid(
                    f"max_positions {self.language.max_positions} is less than the {longest} of a full prompt"
                )

    def _check_ids(self, prompt: PromptConfig, vocab_size: int) -> None:
        for name in ("before", "verdict", "mask", "fake_answers", "real_answers"):
            for token in getattr(prompt, name):
                if not 0 <= token < vocab_size:
                    raise Invalid(f"prompt.{name}: {token} is no token id, which are 0 to {vocab_size - 1}")

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of one tile before any are removed."""
        side: int = self.tiling.tile_size // self.vision.patch_size // self.vision.shuffle
        return side * side

    def as_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def load_config(folder: Path) -> DetectorConfig:
    """Read `config.json` of a detector folder. Raises ConfigError with every problem."""
    return read_json(DetectorConfig, folder / "config.json")


def _positive(config: object, *names: str) -> None:
    """Every named number, or all numbers of a named list, must be finite and above 0."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not 0 < number < math.inf:
                raise Invalid(f"{name} must be above 0, got {number}")


def _divides(larger: str, value: int, smaller: str, divisor: int) -> None:
    if value % divisor:
        raise Invalid(f"{larger} ({value}) must be a multiple of {smaller} ({divisor})")
