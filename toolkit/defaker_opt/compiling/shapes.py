"""How large the inputs of a build's stages are: the ranges that engines are tuned for."""

from __future__ import annotations

from defaker_opt.compiling import Ranges
from defaker_opt.runtime.session import Session


def stage_ranges(session: Session, stage: str) -> tuple[Ranges, ...]:
    """One range for each way in which a stage is used; none of its sizes change where there is one empty range.

    A picture alone is one tile, a larger one some tiles and a thumbnail. The language stage reads the whole prefix
    once, block by block where the target says so, and then a few tokens of a question, or the words of an answer one by
    one, on the key/values of all of it.
    """
    facts = session.build.manifest.data["input"]
    options = session.build.manifest.data["target"]["session"]
    most = int(facts["max_tiles"]) + (facts["max_tiles"] > 1)
    if stage == "vision_encoder":
        at_once = min(options["tiles"] or most, most)
        return ({"tiles": (1, 1, 1)},) if at_once == 1 else ({"tiles": (1, 1, 1)}, {"tiles": (2, at_once, at_once)})
    if stage != "language":
        return ({},)
    prompts = session.prompts()
    prefix = len(prompts["before"]) + most * int(facts["tokens_per_tile"]) + len(prompts["shared"])
    question = max(len(prompts["verdict"]), len(prompts["mask"]))
    whole = prefix if session.build.manifest.saves("shared_prefix") else prefix + question
    block = min(options["tokens"] or whole, whole)
    words = int(session.build.manifest.data.get("explain", {}).get("max_tokens", 0))
    usual = min(block, len(prompts["before"]) + 3 * int(facts["tokens_per_tile"]))
    reading: Ranges = {"tokens": (1, max(usual, 1), block), "past": (0, 0, prefix - 1 if block < prefix else 0)}
    asking: Ranges = {"tokens": (1, max(1, question), question + 1), "past": (1, prefix, prefix + question + words)}
    return (asking, reading)
