"""How large the inputs of a build's stages are: the ranges that engines are tuned for."""

from __future__ import annotations

from dataclasses import dataclass

from defaker_opt.compiling import Ranges
from defaker_opt.runtime.session import Session


@dataclass(frozen=True)
class Sizes:
    """What decides them. tiles: the most of a picture; tiles_at_once and tokens_at_once: of one call, the target's.

    before and shared: tokens of the prompt before the picture and of the questions' common start; question: of the
    longer rest; words: the most of an answer that is decoded. reads_whole: whether questions bring the prefix along, in
    one call.
    """

    tiles: int
    tokens_per_tile: int
    tiles_at_once: int
    tokens_at_once: int
    before: int
    shared: int
    question: int
    words: int = 0
    reads_whole: bool = False


def sizes_of(session: Session) -> Sizes:
    """The sizes of a build."""
    data, prompts = session.build.manifest.data, session.prompts()
    options, most = data["target"]["session"], int(data["input"]["max_tiles"])
    return Sizes(
        tiles=most + (most > 1 or not session.build.manifest.saves("no_padding")),
        tokens_per_tile=int(data["input"]["tokens_per_tile"]),
        tiles_at_once=int(options["tiles"]),
        tokens_at_once=int(options["tokens"]),
        before=len(prompts["before"]),
        shared=len(prompts["shared"]),
        question=max(len(prompts["verdict"]), len(prompts["mask"])),
        words=int(data.get("explain", {}).get("max_tokens", 0)),
        reads_whole=not session.build.manifest.saves("shared_prefix"),
    )


def stage_ranges(sizes: Sizes, stage: str) -> tuple[Ranges, ...]:
    """One range for each way in which a stage is used; none of its sizes change where there is one empty range.

    A picture alone is one tile, a larger one some tiles and a thumbnail. The language stage reads the whole prefix
    once, block by block where the target says so, and then a few tokens of a question, or the words of an answer one by
    one, on the key/values of all of it.
    """
    if stage == "vision_encoder":
        at_once = min(sizes.tiles_at_once or sizes.tiles, sizes.tiles)
        return ({"tiles": (1, 1, 1)},) if at_once == 1 else ({"tiles": (1, 1, 1)}, {"tiles": (2, at_once, at_once)})
    if stage != "language":
        return ({},)
    prefix = sizes.before + sizes.tiles * sizes.tokens_per_tile + sizes.shared
    whole = prefix + sizes.question * sizes.reads_whole
    block = whole if sizes.reads_whole else min(sizes.tokens_at_once or prefix, prefix)
    usual = min(block, sizes.before + 3 * sizes.tokens_per_tile)
    reading: Ranges = {"tokens": (1, usual, block), "past": (0, 0, prefix - 1 if block < prefix else 0)}
    asking: Ranges = {
        "tokens": (1, max(1, sizes.question), sizes.question + 1),
        "past": (1, prefix, prefix + sizes.question + sizes.words),
    }
    return (asking, reading)
