"""What each stage is given for the sample pictures, by the stages before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from defaker_opt.detector import Detector
from defaker_opt.runtime.images import image_tiles, mask_image
from defaker_opt.samples import Samples


@dataclass(frozen=True)
class Balance:
    """By how much tokens of the language stage count in a layer's statistics: the total of each kind in a question.

    answer: the last position, where the answer is read; the others by what stands there. As many image tokens as a
    picture has would else drown all others (Li et al. 2025, MBQ).
    """

    image: float = 1.0
    text: float = 1.0
    answer: float = 1.0


@dataclass(frozen=True)
class StageInput:
    """One call of a stage. weights: of its tokens [tokens], None for 1 each. unread: beginnings of the names of layers
    whose results nobody reads in this call.
    """

    tensors: tuple[torch.Tensor, ...]
    weights: torch.Tensor | None = None
    unread: tuple[str, ...] = ()


def tile_inputs(detector: Detector, samples: Samples) -> Iterator[StageInput]:
    """Normalized tiles [T, 3, t, t] of each picture."""
    tiling = detector.config.tiling
    for image in samples.images():
        tiles = image_tiles(image, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)
        yield StageInput((torch.from_numpy(tiles),))


def whole_inputs(detector: Detector, samples: Samples) -> Iterator[StageInput]:
    """Each picture [1, 3, s, s] as the mask encoder sees it."""
    size = detector.config.segmenter.image_size
    return (StageInput((torch.from_numpy(mask_image(image, size)),)) for image in samples.images())


# A question's head is not read in the other's call.
_UNREAD = {"verdict": ("seg_projection.",), "mask": ("verdict_head.",)}


def question_inputs(
    detector: Detector, vision: list[tuple[torch.Tensor, ...]], balance: Balance | None
) -> list[StageInput]:
    """Both questions for each picture, without a shared prefix: verdict, mask, verdict, mask …

    vision: for each picture vision_tokens [T, K, H] and kept_positions [T, K].
    """
    prompt, language = detector.config.prompt, detector.config.language
    assert prompt is not None
    past = torch.zeros(1, language.kv_heads, 0, language.head_dim)
    inputs = []
    for tokens, kept in vision:
        tiles, per_tile = tokens.shape[0], detector.config.tokens_per_tile
        image = len(prompt.before) + torch.arange(tiles)[:, None] * per_tile + kept
        for question, ids in (("verdict", prompt.verdict), ("mask", prompt.mask)):
            before, after = (detector.rows("language.embed_tokens.weight", rows) for rows in (prompt.before, ids))
            embeds = torch.cat((before, tokens.flatten(0, 1), after))
            rest = len(prompt.before) + tiles * per_tile + torch.arange(len(ids))
            positions = torch.cat((torch.arange(len(prompt.before)), image.flatten(), rest))
            given = (embeds[None], positions[None], *[past] * (2 * language.layers))
            weights = _weights(len(prompt.before), image.numel(), len(ids), balance)
            inputs.append(StageInput(given, weights, _UNREAD[question]))
    return inputs


def calibration_inputs(detector: Detector, stage: str, samples: Samples) -> Iterator[StageInput]:
    """What a stage that pictures or the vision encoder feed is given, by the stages before it as they are now."""
    if stage == "vision_encoder":
        return tile_inputs(detector, samples)
    if stage == "mask_encoder":
        return whole_inputs(detector, samples)
    assert stage == "language", f"{stage} is fed by others too"
    vision = detector.stream_stage("vision_encoder")
    tiles = tile_inputs(detector, samples)
    return (call for each in tiles for call in question_inputs(detector, [vision(*each.tensors)], None))


def _weights(before: int, image: int, after: int, balance: Balance | None) -> torch.Tensor | None:
    if balance is None:
        return None
    text = torch.full((1,), balance.text / (before + after - 1))
    return torch.cat(
        (
            text.expand(before),
            torch.full((image,), balance.image / image),
            text.expand(after - 1),
            torch.full((1,), balance.answer),
        )
    )
