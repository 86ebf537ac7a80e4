"""Operations and traffic of each stage from a detector's sizes alone, without a graph.

Counts are those of the exported graphs (a test compares them): 2 operations for each pair of numbers multiplied, and
attention over all keys, as the graphs compute it; a causal kernel would need half of what is within a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from defaker_opt.config import DetectorConfig, SegmenterConfig
from defaker_opt.runtime.images import tile_grid

# How often elementwise operators read or write each number of a block. They make the forecast of the reference detector
# and of InternViT-300M agree with what was measured; about half of it stays in caches, and is not counted.
_WIDTH_PASSES, _INNER_PASSES, _SCORE_PASSES = 16, 4, 4


@dataclass(frozen=True)
class Counts:
    """linear: operations with weights. attention, convolution: other products.

    peak_values: the most numbers alive at once. traffic_values: numbers that elementwise operators read and write.
    """

    linear: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    peak_values: float = 0.0
    traffic_values: float = field(default=0.0)

    @property
    def total(self) -> float:
        """All operations."""
        return self.linear + self.attention + self.convolution


def _add(parts: Iterator[Counts]) -> Counts:
    found = list(parts)
    return Counts(
        sum(part.linear for part in found),
        sum(part.attention for part in found),
        sum(part.convolution for part in found),
        max(part.peak_values for part in found),
        sum(part.traffic_values for part in found),
    )


def vision_counts(config: DetectorConfig, tiles: int) -> Counts:
    """InternViT: L (2 N (4 d² + 2 d d_ff) + 4 N² d) a tile, and patches and projector."""
    vision = config.vision
    width, inner, side = vision.hidden_size, vision.intermediate_size, config.tiling.tile_size // vision.patch_size
    patches = side * side
    n = patches + 1
    shuffled, out = width * vision.shuffle**2, config.language.hidden_size
    linear = vision.layers * 2 * n * (4 * width**2 + 2 * width * inner)
    linear += 2 * config.tokens_per_tile * (shuffled * out + out**2)
    scores = vision.heads * n * n
    return Counts(
        linear=tiles * linear,
        attention=tiles * vision.layers * 4 * n * n * width,
        convolution=tiles * 2 * patches * 3 * vision.patch_size**2 * width,
        peak_values=2 * scores + n * (6 * width + inner),
        traffic_values=tiles
        * vision.layers
        * (n * (_WIDTH_PASSES * width + _INNER_PASSES * inner) + _SCORE_PASSES * scores),
    )


def language_counts(config: DetectorConfig, tokens: int, past: int = 0) -> Counts:
    """Decoder layers on `tokens` new rows after `past`: 2 P S + 4 S (past + S) d L, every layer on every row."""
    language = config.language
    width, inner = language.hidden_size, language.intermediate_size
    queries, keys = language.heads * language.head_dim, language.kv_heads * language.head_dim
    layer = width * (queries + 2 * keys) + queries * width + 3 * width * inner
    seen = past + tokens
    scores = language.heads * tokens * seen
    heads = 2 * (width * 8 + width**2 + width * config.segmenter.hidden_size)  # of the last row alone
    return Counts(
        linear=language.layers * 2 * tokens * layer + heads,
        attention=language.layers * 4 * tokens * seen * queries,
        peak_values=2 * scores + tokens * (8 * width + 3 * inner),
        traffic_values=language.layers
        * (tokens * (_WIDTH_PASSES * width + 2 * _INNER_PASSES * inner) + _SCORE_PASSES * scores),
    )


def mask_encoder_counts(config: DetectorConfig) -> Counts:
    """Hiera with padded windows, and the neck with the decoder's two 1x1 convolutions."""
    segmenter = config.segmenter
    side = segmenter.image_size // 4
    neck = sum(2 * (side >> level) ** 2 * width * segmenter.hidden_size for level, width in enumerate(segmenter.widths))
    neck += 2 * side**2 * segmenter.hidden_size**2 // 8 + 2 * (side // 2) ** 2 * segmenter.hidden_size**2 // 4
    patch = Counts(convolution=2 * side**2 * 3 * 49 * segmenter.widths[0] + neck)
    return _add(iter([patch, *_hiera_blocks(segmenter, side)]))


def _hiera_blocks(segmenter: SegmenterConfig, side: int) -> Iterator[Counts]:
    index = 0
    for stage, count in enumerate(segmenter.blocks):
        for place in range(count):
            pools = stage > 0 and place == 0
            window = segmenter.windows[stage - 1 if pools else stage]
            if index in segmenter.global_blocks:
                window = side
            before = segmenter.widths[stage - 1 if pools else stage]
            yield _hiera_block(side, window, before, segmenter.widths[stage], segmenter.heads[stage], pools)
            side = side // 2 if pools else side
            index += 1


def _hiera_block(side: int, window: int, before: int, width: int, heads: int, pools: bool) -> Counts:
    windows = -(-side // window)
    padded = (windows * window) ** 2
    # A block that pools asks with a quarter of its tokens.
    asking = padded // 4 if pools else padded
    after = (side // 2) ** 2 if pools else side**2
    linear = 2 * padded * before * 3 * width + 2 * asking * width**2 + 2 * after * 2 * width * 4 * width
    linear += 2 * side**2 * before * width if pools else 0
    scores = heads * asking * window**2
    return Counts(
        linear=linear,
        attention=4 * asking * window**2 * width,
        peak_values=2 * scores + padded * 5 * width,
        # Windows are cut out and put back, which other blocks do not do.
        traffic_values=padded * 2 * _WIDTH_PASSES * width + after * _INNER_PASSES * 4 * width + _SCORE_PASSES * scores,
    )


def mask_decoder_counts(config: DetectorConfig) -> Counts:
    """The two-way transformer on the picture's feature map: as much as its linear layers on each cell, about."""
    segmenter = config.segmenter
    width, cells = segmenter.hidden_size, segmenter.feature_size**2
    cross = width // segmenter.attention_downsample
    layer = 2 * cells * width * cross * 4
    upscale = 2 * cells * width * (width // 4) * 4 + 2 * 4 * cells * (width // 4) * (width // 8) * 4
    return Counts(
        linear=segmenter.decoder_layers * layer + layer // 2,
        convolution=upscale,
        peak_values=cells * width * 8,
        traffic_values=cells * width * 60,
    )


def stage_blocks(config: DetectorConfig, stage: str) -> int:
    """Blocks of a stage that repeat; 0 where none do."""
    blocks = {"vision_encoder": config.vision.layers, "language": config.language.layers}
    return {**blocks, "mask_encoder": sum(config.segmenter.blocks)}.get(stage, 0)


@dataclass(frozen=True)
class Load:
    """What one picture asks for. tiles: with the thumbnail. prefix: tokens of prompt, picture and questions' start.

    readings: how often picture and prefix are read, once or for each of the two questions.
    """

    tiles: int
    prefix: int
    verdict: int
    mask: int
    blocks: tuple[int, ...]
    readings: int = 1


def tile_count(config: DetectorConfig, width: int, height: int) -> int:
    """Tiles of a picture of that size in px, with the thumbnail."""
    tiling = config.tiling
    columns, rows = tile_grid(width, height, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)
    return columns * rows + (columns * rows > 1)


def picture_load(config: DetectorConfig, tiles: int, block: int, shared_prefix: bool = True) -> Load:
    """The load of a picture cut into so many tiles, whose prefix is read in blocks of `block` tokens (0: at once).

    Without shared_prefix it is read whole with each question.
    """
    prompt = config.prompt
    assert prompt is not None
    shared = prompt.shared()
    prefix = len(prompt.before) + tiles * config.tokens_per_tile + shared
    verdict, mask = len(prompt.verdict) - shared, len(prompt.mask) - shared
    if not shared_prefix:
        return Load(tiles, prefix, verdict, mask, (), readings=2)
    step = block or prefix
    blocks = tuple(min(step, prefix - start) for start in range(0, prefix, step))
    return Load(tiles, prefix, verdict, mask, blocks)


def stage_counts(config: DetectorConfig, load: Load) -> Mapping[str, Counts]:
    """Each stage for one picture whose mask is made."""
    done, calls = 0, []
    for block in load.blocks:
        calls.append(language_counts(config, block, done))
        done += block
    unread = load.prefix - done
    calls += [language_counts(config, unread + question, done) for question in (load.verdict, load.mask)]
    return {
        "vision_encoder": _add(iter([vision_counts(config, load.tiles)] * load.readings)),
        "language": _add(iter(calls)),
        "mask_encoder": mask_encoder_counts(config),
        "mask_decoder": mask_decoder_counts(config),
    }
