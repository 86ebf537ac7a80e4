"""The fixed prompts of a build, and the key/values of what was read of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.runtime.build import EMBEDDINGS, PROMPTS, Build

Array = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Prefix:
    """What both questions share: key/values of what was read of it, and what each question has yet to read itself.

    past: past_key_i, past_value_i → [1, kv, P, d]. embeds [n, H] and positions [n]: unread.
    """

    past: Tensors
    next_position: int
    embeds: Array
    positions: NDArray[np.int64]


def load_prompts(build: Build) -> dict[str, Array]:
    """Embeddings [tokens, H]: `before` the image, `shared` by both questions, the rest of `verdict` and of `mask`."""
    if build.manifest.saves("prompt_embeddings"):
        with np.load(build.folder / PROMPTS, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    facts = build.manifest.data["prompt"]
    table = open_table(build)
    shared = facts["shared_tokens"]
    ids = {
        "before": facts["before"],
        "shared": facts["verdict"][:shared],
        "verdict": facts["verdict"][shared:],
        "mask": facts["mask"][shared:],
    }
    return {name: np.array(table[rows]) for name, rows in ids.items()}


def open_table(build: Build) -> Array:
    """Embeddings of all tokens [V, H], memory-mapped; only in builds that look tokens up."""
    table: Array = np.load(build.folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    return table


def extend_(past: dict[str, NDArray[Any]], present: dict[str, NDArray[Any]]) -> None:
    """Append new key/values, taking them out of `present`: present_key_i after past_key_i, and so on.

    One tensor at a time, so that the old and the new key/values are never there together.
    """
    for name in past:
        past[name] = np.concatenate([past[name], present.pop(name.replace("past_", "present_", 1))], axis=2)


def question_input(prefix: Prefix, question: Array) -> dict[str, NDArray[Any]]:
    """Input of the language stage for a question's embeddings [n, H], after what is unread of its prefix."""
    positions = np.concatenate([prefix.positions, prefix.next_position + np.arange(len(question))])
    embeds = np.concatenate([prefix.embeds, question])
    return {"inputs_embeds": embeds[None], "position_ids": positions[None].astype(np.int64), **prefix.past}
