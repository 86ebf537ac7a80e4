"""Work that is left out without changing any result; each is on unless a recipe turns it off for comparison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from defaker_opt.runtime.spec import STAGES, VOCABULARY_HEAD
from defaker_opt.strict import Invalid


@dataclass(frozen=True)
class Savings:
    """What each means when it is on; off, the build does what the original code does."""

    # The verdict from the eight answer rows of the vocabulary head. Off: every word's logit, of which eight are read.
    verdict_head: bool = True
    # The fixed prompts as embeddings. Off: token ids, and the whole table of embeddings to look them up in.
    prompt_embeddings: bool = True
    # Picture encoded, and read with its prompt, once for both questions. Off: once for each.
    shared_prefix: bool = True
    # The mask's fixed answer read with its question. Off: one step a word, each with every word's logit.
    appended_answer: bool = True
    # The last decoder layer computes only what is read of it. Off: every row.
    last_layer_rows: bool = True
    # No mask, and no mask encoder, for pictures that look authentic. Off: always.
    gated_mask: bool = True
    # Where a mask is made in any case, its encoder runs beside the other stages, if there are cores for it.
    concurrent_mask_encoder: bool = True
    # As many tiles as the picture has. Off: empty tiles up to the largest number, as a graph of fixed size needs.
    no_padding: bool = True
    # Tiles of equal pixels encoded once.
    identical_tiles: bool = True

    def __post_init__(self) -> None:
        if not self.appended_answer and (self.verdict_head or self.prompt_embeddings):
            raise Invalid(
                "appended_answer: false decodes the answer, which takes the whole vocabulary; "
                "set verdict_head: false and prompt_embeddings: false too, or leave it on"
            )

    def stages(self) -> tuple[str, ...]:
        """The stages a build then has, in the order they are made."""
        return STAGES if self.verdict_head else (*STAGES, VOCABULARY_HEAD)


EVERY_SAVING = Savings()

# The model as it was trained: what torch runs, and what graphs are compared with.
NO_SAVING = Savings(**{each.name: False for each in dataclasses.fields(Savings)})
