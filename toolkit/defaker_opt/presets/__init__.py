"""Detectors of released sizes by name, with weights drawn at random: for speed, memory and exactness, not for verdicts.

defakerone-2b:random
internvl2-2b+sam2.1-large:random
sa2va-8b:random,layers=2          full widths, at most two layers a stack
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defaker_opt.config import (
    FORMAT,
    DetectorConfig,
    LanguageConfig,
    PromptConfig,
    SegmenterConfig,
    TilingConfig,
    VisionConfig,
)
from defaker_opt.errors import SourceError, one_of
from defaker_opt.files import default_cache_folder
from defaker_opt.presets.tables import DECODERS, GENERATION, JOINED, SAM2_TRUNKS, Decoder, Trunk

_VERSIONS = ("sam2", "sam2.1")


@dataclass(frozen=True)
class Preset:
    """A released size, or one with at most `layers` layers a stack."""

    name: str
    decoder: Decoder
    trunk: Trunk
    layers: int | None = None

    @property
    def title(self) -> str:
        """The name of its folder, and of the detector."""
        return f"{self.name}-random" + (f"-layers{self.layers}" if self.layers else "")


def preset_names() -> dict[str, str]:
    """Every name before `:random`, with what it stands for."""
    names = {name: f"{DECODERS[decoder].title} joined with SAM2 {trunk}" for name, (decoder, trunk) in JOINED.items()}
    names["defakerone-2b"] = "DeFakerOne-2B: " + names["defakerone-2b"]
    for decoder, sizes in DECODERS.items():
        if decoder.startswith("internvl2"):
            for version in _VERSIONS:
                for trunk in SAM2_TRUNKS:
                    names[f"{decoder}+{version}-{trunk}"] = f"{sizes.title} joined with {version.upper()} {trunk}"
    return names


def is_preset(source: str) -> bool:
    """Whether a source is meant as a preset: a name and `:random`, and no folder of that name."""
    return ":random" in source and not Path(source).exists()


def parse_preset(source: str) -> Preset:
    """Read NAME:random or NAME:random,layers=N. Raises SourceError with the nearest name."""
    name, _, rest = source.partition(":random")
    if name not in preset_names():
        raise SourceError(f"preset {one_of(name, preset_names())}; see: defaker-opt show presets")
    found = re.fullmatch(r"(?:,layers=([1-9]\d*))?", rest)
    if not found:
        raise SourceError(f"source {source!r}: after :random only ,layers=N may follow, with N from 1, got {rest!r}")
    decoder, trunk = JOINED.get(name) or _parts(name)
    return Preset(name, DECODERS[decoder], SAM2_TRUNKS[trunk], int(found[1]) if found[1] else None)


def _parts(name: str) -> tuple[str, str]:
    decoder, _, segmenter = name.partition("+")
    return decoder, segmenter.partition("-")[2]


def preset_config(preset: Preset) -> DetectorConfig:
    """All sizes, and prompts of a usual length whose token ids stand for nothing but their number."""
    decoder, layers = preset.decoder, preset.layers
    vision = VisionConfig(hidden_size=1024, intermediate_size=4096, layers=24, heads=16, patch_size=14)
    language = LanguageConfig(
        architecture=decoder.family.architecture,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        layers=_at_most(decoder.layers, layers),
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.hidden_size // decoder.heads,
        vocab_size=decoder.vocab_size,
        norm_eps=decoder.family.norm_eps,
        rope_theta=decoder.family.rope_theta,
        max_positions=decoder.family.max_positions,
        rope_scale=decoder.family.rope_scale,
    )
    return DetectorConfig(
        format=FORMAT,
        name=preset.title,
        trained=False,
        tiling=TilingConfig(tile_size=448, min_tiles=1, max_tiles=12),
        vision=dataclasses.replace(vision, layers=_at_most(vision.layers, layers)),
        language=language,
        segmenter=_segmenter(preset.trunk, layers),
        prompt=_prompt(decoder.vocab_size),
    )


def _at_most(layers: int, limit: int | None) -> int:
    return min(layers, limit or layers)


def _segmenter(trunk: Trunk, layers: int | None) -> SegmenterConfig:
    blocks = tuple(_at_most(count, layers) for count in trunk.blocks)
    return SegmenterConfig(
        image_size=1024,
        blocks=blocks,
        widths=tuple(trunk.width * 2**stage for stage in range(4)),
        heads=tuple(trunk.heads * 2**stage for stage in range(4)),
        windows=trunk.windows,
        global_blocks=trunk.global_blocks if blocks == trunk.blocks else tuple(_kept_global(trunk, blocks)),
        position_grid=trunk.position_grid,
        hidden_size=256,
        decoder_layers=2,
        decoder_heads=8,
        decoder_intermediate_size=2048,
        iou_hidden_size=256,
    )


def _kept_global(trunk: Trunk, blocks: tuple[int, ...]) -> Iterator[int]:
    """The last blocks of the third stage, as many as the whole trunk has; its first one only halves the grid."""
    start, end = sum(blocks[:2]), sum(blocks[:3])
    yield from range(max(start + 1, end - len(trunk.global_blocks)), end)


def _prompt(vocab_size: int) -> PromptConfig:
    """Five tokens before the picture, seventeen and nineteen after it, as with the real tokenizers."""
    image, end, seg = vocab_size - 14, vocab_size - 13, vocab_size - 5
    closing = (201, 202, 203, 204, 205)
    return PromptConfig(
        before=(1, 101, 102, 103, image),
        verdict=(end, 104, *range(110, 120), *closing),
        mask=(end, 104, *range(120, 128), *closing, 301, 302, 303, seg),
        fake_answers=(401, 402, 403, 404),
        real_answers=(405, 406, 407, 408),
    )


def preset_folder(preset: Preset) -> Path:
    """Where a preset's detector folder is, or will be: below $DEFAKER_CACHE_DIR, or the user's cache."""
    return default_cache_folder() / f"presets-{GENERATION}" / preset.title
